"""How far a merge is from the exact weighted sum, by module: exactly from Gram matrices, or estimated from probes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..factors import LoraFactors, difference, norm, widest
from .stack import LowRank, Stack, gram

Measure: TypeAlias = Literal["exact", "estimate", "none"]
MEASURES: dict[Measure, str] = {
    "exact": "exactly",
    "estimate": "estimated from 16 random probes, to about 10 % of its value; much faster at high ranks",
    "none": "not measured",
}
PROBES = 16
_CANCELS = 1e-5  # of the parts: below it Gram matrices lose digits, and QR takes over
_NOTHING, _ROUNDING = 1e-12, 1e-6  # of the parts: what float64 leaves of zero, and what float32 does


@dataclass(frozen=True)
class ModuleError:
    """Frobenius norms of one module.

    Attributes:
        exact: of the exact weighted sum.
        before_cast, stored: of the result's distance from it, in the dtype of the computation and as stored.
        full: of the rule's own result before the cut to the rank.
        cut: of what that cut lost.
    """

    exact: float
    before_cast: float
    stored: float
    full: float = math.nan
    cut: float = math.nan


@dataclass(frozen=True)
class MergeReport:
    """What a merge did and what it cost.

    `error` and `error_before_cast` are ||dW_merged - dW_exact||_F / ||dW_exact||_F, with dW_exact the weighted sum; `cut` is
    what the cut to the rank lost of the rule's own result, ||dW_cut - dW_rule||_F / ||dW_rule||_F. nan where not measured.
    """

    rule: str
    space: str
    rank: str
    dtype: str
    modules: Mapping[str, ModuleError]
    notes: tuple[str, ...] = ()
    measured: Measure = "exact"

    def _total(self, part: str, of: str = "exact") -> float:
        exact = math.sqrt(sum(getattr(m, of) ** 2 for m in self.modules.values()))
        lost = math.sqrt(sum(getattr(m, part) ** 2 for m in self.modules.values()))
        return lost / exact if exact else (0.0 if lost == 0 else math.inf)

    @property
    def error(self) -> float:
        """Relative error over all modules, as stored."""
        return self._total("stored")

    @property
    def error_before_cast(self) -> float:
        """Relative error over all modules, in the dtype of the computation."""
        return self._total("before_cast")

    @property
    def cut(self) -> float:
        """Relative loss of the cut to the rank, over all modules, against the rule's own result."""
        return self._total("cut", "full")

    def worst(self, n: int = 5) -> list[tuple[str, float]]:
        """The modules with the largest relative error as stored."""
        relative = {name: m.stored / m.exact if m.exact else m.stored for name, m in self.modules.items()}
        return sorted(relative.items(), key=lambda item: -item[1])[:n]


def measure(stack: Stack, result: LowRank, stored: LowRank, how: Measure) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norms of the exact sum, of result - exact, of stored - exact and of the result; float64 on the CPU, [L] each."""
    modules = stack.modules
    if how == "none":
        nan = torch.full((modules,), torch.nan, dtype=torch.float64)
        return nan, nan, nan, nan
    if how == "estimate":
        return _probed(stack, result, stored)
    same = stored.A.dtype == result.A.dtype
    parts = [result] if same else [result, stored]
    c = (stack.weights * stack.scaling).to(widest(stack.device))
    wide = widest(stack.device)
    g = gram(torch.cat([x.to(wide) for x in (*[p.B for p in parts], *stack.B)], 2))
    g *= gram(
        torch.cat([x.to(wide) for x in (*[p.A for p in parts], *stack.A)], 1).mT
    )  # <B_i^T B_j, A_i A_j^T> by columns
    ones, nought = torch.ones_like(c[0]), torch.zeros_like(c[0])
    widths = [p.rank for p in parts] + list(stack.ranks)
    exact_sign = [*[nought] * len(parts), *c]

    def size(signs: list[Tensor]) -> Tensor:
        v = torch.cat([s[:, None].expand(-1, n) for s, n in zip(signs, widths, strict=True)], 1)
        return ((g @ v[:, :, None])[..., 0] * v).sum(1).clamp(min=0).sqrt()

    exact = size(exact_sign)
    before = size([-ones, *exact_sign[1:]])
    after = before if same else size([nought, -ones, *exact_sign[2:]])
    diagonal = g.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    start = sum(p.rank for p in parts)
    v = torch.cat([s[:, None].expand(-1, n) for s, n in zip(c, stack.ranks, strict=True)], 1)
    bound = (diagonal[:, start:].sqrt() * v.abs()).sum(1)  # the parts, before they cancel
    exact, before, after, bound = exact.cpu(), before.cpu(), after.cpu(), bound.cpu()
    for module in ((exact <= _CANCELS * bound) & (bound > 0)).nonzero().flatten().tolist():
        exact[module], before[module], after[module] = _careful(stack, result, stored, module, float(bound[module]))
    return exact, before, after, size([ones] + [nought] * (len(widths) - 1)).cpu()


def _careful(stack: Stack, result: LowRank, stored: LowRank, module: int, bound: float) -> tuple[float, float, float]:
    """One module by QRs in float64: where the adapters cancel, Gram matrices have no digits left."""
    one = stack.only(slice(module, module + 1))
    wide = one.with_factors([a.double() for a in one.A], [b.double() for b in one.B]).weighted_sum()
    exact = LoraFactors(wide.A[0], wide.B[0])
    total = norm(exact)
    before = difference(LoraFactors(result.A[module], result.B[module]), exact)
    after = difference(LoraFactors(stored.A[module], stored.B[module]), exact)
    if total <= _NOTHING * bound:  # a ratio of two roundings would say nothing
        total = 0.0
        before, after = (0.0 if lost <= _ROUNDING * bound else lost for lost in (before, after))
    return total, before, after


def _probed(stack: Stack, result: LowRank, stored: LowRank) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Root mean squares of E z over Gaussian z, whose expectation of ||E z||^2 is ||E||_F^2."""
    inside = stack.shape[1]
    z = torch.randn(inside, PROBES, generator=torch.Generator().manual_seed(0)).to(stack.device, stack.dtype)
    c = (stack.weights * stack.scaling).to(stack.dtype)
    exact = None
    for a, b, s in zip(stack.A, stack.B, c, strict=True):
        part = b.to(stack.dtype) @ (s[:, None, None] * (a.to(stack.dtype) @ z))
        exact = part if exact is None else exact + part
    assert exact is not None

    def rms(x: Tensor) -> Tensor:
        return (x.to(widest(x.device)).square().sum((1, 2)) / PROBES).sqrt().cpu().double()

    own, kept = (p.B.to(stack.dtype) @ (p.A.to(stack.dtype) @ z) for p in (result, stored))
    return rms(exact), rms(own - exact), rms(kept - exact), rms(own)
