"""Arrow: each token goes to the adapters whose strongest input direction it is most aligned with; nothing is trained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import LoralloyError
from ...factors import LoraFactors, compute_dtype
from ..gated import Pass, normalised

if TYPE_CHECKING:
    from ..composed import LiveModel


def top_directions(factors: Sequence[LoraFactors]) -> Tensor:
    """The top right singular vector of each dW, [n, in], of unit length (zero where dW is zero); signs are arbitrary.

    Exact: with QRs A^T = Q_a R_a and B = Q_b R_b the SVD of dW is that of the small core R_b R_a^T. Factors of one rank are
    done in one batch. float32, or float64 where the factors are.
    """
    dtype = compute_dtype(*(t for f in factors for t in (f.A, f.B)))
    found = factors[0].a.new_zeros(len(factors), factors[0].shape[1], dtype=dtype)
    by_rank: dict[int, list[int]] = defaultdict(list)
    for i, f in enumerate(factors):
        by_rank[f.rank].append(i)
    for group in by_rank.values():
        q, right = torch.linalg.qr(torch.stack([factors[i].a.to(dtype).T for i in group]))  # [g, in, k], [g, k, r]
        left = torch.linalg.qr(torch.stack([factors[i].b.to(dtype) for i in group]), mode="r").R
        _, s, vh = torch.linalg.svd(left @ right.mT, full_matrices=False)
        alive = torch.tensor([factors[i].scaling != 0 for i in group], device=s.device) & (s[:, 0] > 0)
        found[group] = (q @ vh[:, 0, :, None])[:, :, 0] * alive[:, None]
    return found


class Arrow:
    """Arrow routing (Ostapenko et al. 2024, arXiv 2405.11157), by token and module.

    With v_i the top right singular vector of B_i A_i: score_i = |x . v_i|; the `top_k` largest take softmax(score / temperature),
    the rest 0; y += sum_i c_i s_i B_i A_i x. Defaults are those of PEFT's ArrowConfig.

    PEFT finds v_i by 15 power iterations and asks for adapters of one rank and one set of modules; here v_i is exact, ranks may
    differ, and an adapter without a module does not compete there.

    Args:
        live: the model and the bank that the prototypes are made of.
        top_k: experts a token.
        temperature: of the softmax.

    Raises LoralloyError for a top_k below 1 or a temperature that is not positive.
    """

    averages = False

    def __init__(self, live: LiveModel, top_k: int = 3, temperature: float = 1.0) -> None:
        if top_k < 1:
            raise LoralloyError(f"top_k is {top_k}; a token needs at least one expert")
        if not temperature > 0:
            raise LoralloyError(f"temperature is {temperature}; it must be positive")
        self.names, self.top_k, self.temperature = list(live.names), top_k, temperature
        self.prototypes: dict[str, Tensor] = {}
        """module -> [n, in] on the model's device; a zero row for an adapter that changes nothing there."""
        self._absent: dict[str, Tensor] = {}
        for module in live.bank.modules:
            factors = live.bank.factors(module)
            if next(iter(factors.values())).kind != "linear":
                raise LoralloyError(f"module {module!r} is not linear; Arrow reads the inputs of linear modules alone")
            rows = [self.names.index(name) for name in factors]
            # On the model's device: there the many small decompositions of a layer are one batch.
            found = top_directions([f.to(device=live.device) for f in factors.values()])
            prototypes = found.new_zeros(len(self.names), found.shape[1])
            prototypes[rows] = found
            self.prototypes[module] = prototypes
            if len(rows) < len(self.names):
                absent = torch.ones(len(self.names), dtype=torch.bool, device=live.device)
                absent[rows] = False
                self._absent[module] = absent

    def __call__(self, module: str, x: Tensor, now: Pass) -> Tensor:
        v = self.prototypes[module]
        scores = (x.to(v.dtype) @ v.T).abs()  # [b, l, n]
        if module in self._absent:
            scores = scores.masked_fill(self._absent[module], -torch.inf)
        return normalised(scores / self.temperature, now.allowed, self.top_k)
