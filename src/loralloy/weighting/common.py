"""What all inputs have in common, and adapters that no longer answer to it.

The inputs of a module are far from centred: a few directions are in every token (the mean, those of massive
activations), whatever the text says. What an adapter answers to those is a constant, a bias that the module has learned
with it. On inputs like its own it does its work; elsewhere, and beside another adapter's, it shifts every answer alike.
With x-hat = x / ||x|| over the calibration tokens of a module and Q [in, k] the leading eigenvectors of the mean of
x-hat x-hat^T,

    dW -> dW (I - Q Q^T),    A -> A - (A Q) Q^T,

an adapter of the same rank that answers to what tells inputs apart and to nothing else. A function of dW and the inputs alone:
neither the size of dW nor the gauge of (A, B) matters to what is taken away. No labels, no training.

To take the leading directions of the *activations* out of adapters before merging is this project's own (projecting weights away
from them is known from continual learning, as in Saha et al., ICLR 2021, and from editing, Fang et al., ICLR 2025). The
eigenvectors are those of a Nystrom approximation from one pass (Tropp, Yurtsever, Udell, Cevher, NIPS 2017, algorithm 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bank import Bank
from ..errors import LoralloyError
from ..factors import LoraFactors, widest
from ..recipe.freed import freed_adapter, without

_BEYOND = 32  # directions of the sketch beyond those asked for; 8 leave a real module's third and fourth half noise
_NOTHING = 1e-5  # of the inputs' energy: a direction with less is rounding


@dataclass(frozen=True)
class Common:
    """The directions that a module's inputs have in common.

    Attributes:
        directions: [in, k], orthonormal, the strongest first; fewer than asked for where the inputs have fewer.
        energy: the mean over tokens of (q^T x)^2 / ||x||^2 for each, [k], as the sketch has it (a little less than it is).
    """

    directions: Tensor
    energy: Tensor

    def leading(self, count: int) -> Common:
        """The first `count` of them."""
        return Common(self.directions[:, :count], self.energy[:count])


class Sketch:
    """Of the mean of x-hat x-hat^T [in, in], in one pass and in memory for [in, k + 32]."""

    def __init__(self, width: int, count: int, device: torch.device) -> None:
        self.count, self.tokens = min(count, width), 0
        wide = widest(device)
        many = min(width, count + _BEYOND)
        test = torch.randn(width, many, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
        self.test = torch.linalg.qr(test).Q.to(device, torch.float32)  # what is multiplied is what the core is made of
        self.sketch = torch.zeros(width, many, dtype=wide, device=device)

    def add(self, x: Tensor) -> None:
        """Inputs [tokens, in]; those that are 0 count for nothing."""
        x = x.float()
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        unit = torch.where(size > 0, x / torch.where(size > 0, size, 1.0), 0.0)
        self.sketch += (unit.mT @ (unit @ self.test)).to(self.sketch.dtype)
        self.tokens += int((size > 0).sum())

    def common(self) -> Common:
        """The leading directions of what was added, on the CPU in float32."""
        sketch, test = self.sketch.cpu().double(), self.test.cpu().double()
        length = torch.linalg.matrix_norm(sketch)
        if not self.tokens or not bool(length > 0):
            return Common(torch.zeros(len(sketch), 0), torch.zeros(0))
        # float32 products: a shift below their rounding would leave a core that is not positive
        shift = 1e-6 * length
        shifted = sketch + shift * test
        core = test.mT @ shifted
        root, wrong = torch.linalg.cholesky_ex((core + core.mT) / 2)
        if int(wrong):
            value, vector = torch.linalg.eigh((core + core.mT) / 2)
            root = vector * value.clamp(min=float(shift)).sqrt()
            half = shifted @ torch.linalg.pinv(root).mT
        else:
            half = torch.linalg.solve_triangular(root, shifted.mT, upper=False).mT
        u, s, _ = torch.linalg.svd(half, full_matrices=False)
        energy = (s.square() - shift).clamp(min=0) / self.tokens
        keep = min(self.count, int((energy > _NOTHING).sum()))
        return Common(u[:, :keep].float(), energy[:keep].float())


def freed(factors: LoraFactors, common: Common) -> LoraFactors:
    """The factors of dW (I - Q Q^T): the same B, rank and dtype. Raises LoralloyError for directions of another width."""
    return without(factors, common.directions)


def freed_bank(bank: Bank, common: Mapping[str, Common], count: int, adapters: Iterable[str] | None = None) -> Bank:
    """The bank with adapters that answer to none of the `count` strongest common directions of any module.

    Args:
        bank: the adapters.
        common: by module, from :func:`.probed.probe`; a module that is not in it stays as it is.
        count: of directions, 0 for none.
        adapters: names of those that are freed; None for all.

    Raises LoralloyError for a name that the bank does not have and a count below 0.
    """
    if count < 0:
        raise LoralloyError(f"{count} common directions cannot be taken away; give a number of 0 or more")
    chosen = bank.names if adapters is None else list(adapters)
    for name in chosen:
        if name not in bank:
            raise LoralloyError(f"no adapter {name!r} to free; the bank has {', '.join(bank.names)}")
    directions = {module: found.leading(count).directions for module, found in common.items()}
    made = [freed_adapter(bank[name], directions) if name in chosen and count else bank[name] for name in bank.names]
    return Bank(made, bank.assume_same_base)


def taken(before: Bank, after: Bank) -> dict[str, float]:
    """The share of every adapter's ||dW||_F^2, over all its modules, that is gone."""
    from ..factors import norm

    shares = {}
    for name in before.names:
        was = sum(norm(before[name][m]) ** 2 for m in before[name])
        lost = sum(norm(_difference(before[name][m], after[name][m])) ** 2 for m in before[name])
        shares[name] = lost / was if was else 0.0
    return shares


def _difference(f: LoraFactors, g: LoraFactors) -> LoraFactors:
    wide = widest(f.A.device)
    return replace(f, A=f.A.to(wide) - g.A.to(wide), B=f.B.to(wide))
