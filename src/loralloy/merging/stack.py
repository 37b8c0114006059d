"""Stacks: same-shaped modules of several adapters as batched tensors, and the low-rank results that rules give back.

Modules of one shape are merged together, [L, ...] at a time, so that a GPU gets a few large launches and a CPU few calls.
A convolution or an embedding enters as its matrices; a stack does not know kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..factors import compute_dtype, widest


@dataclass(frozen=True)
class LowRank:
    """L results dW = B @ A: A [L, k, in], B [L, out, k]."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    def dense(self) -> Tensor:
        """[L, out, in]."""
        return self.B @ self.A


@dataclass(frozen=True)
class Stack:
    """T adapters' factors of L modules of one shape; dW_i = scaling_i * B_i @ A_i.

    Attributes:
        A: T tensors [L, r_i, in], as stored or in float32; ranks may differ between adapters.
        B: T tensors [L, out, r_i].
        scaling: [T, L], alpha / r (alpha / sqrt(r) for rsLoRA).
        weights: [T, L], the coefficients.
        keys: [T, L] int64, one of each adapter and module: what random masks are seeded with.
    """

    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    scaling: Tensor
    weights: Tensor
    keys: Tensor

    @property
    def adapters(self) -> int:
        return len(self.A)

    @property
    def modules(self) -> int:
        return self.A[0].shape[0]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(a.shape[1] for a in self.A)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of dW."""
        return self.B[0].shape[1], self.A[0].shape[2]

    @property
    def device(self) -> torch.device:
        return self.A[0].device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float32, or float64 where an adapter is float64."""
        return compute_dtype(*self.A, *self.B)

    def with_factors(self, A: Sequence[Tensor], B: Sequence[Tensor], scaling: Tensor | None = None) -> Stack:
        """The same modules with other factors; `scaling` ones if they hold it already."""
        return replace(self, A=tuple(A), B=tuple(B), scaling=self.scaling if scaling is None else scaling)

    def only(self, modules: slice | Tensor) -> Stack:
        """Some of the modules."""
        return Stack(
            tuple(a[modules] for a in self.A),
            tuple(b[modules] for b in self.B),
            self.scaling[:, modules],
            self.weights[:, modules],
            self.keys[:, modules],
        )

    def absorbed(self) -> list[LowRank]:
        """T results dW_i with the scaling in their factors, its root on each side (the sign on A); weights left out."""
        return [_scaled(a, b, s, self.dtype) for a, b, s in zip(self.A, self.B, self.scaling, strict=True)]

    def weighted_sum(self, dtype: torch.dtype | None = None) -> LowRank:
        """sum_i w_i s_i B_i A_i, exactly, at rank sum_i r_i: the factors side by side; computed in `self.dtype`, rounded to
        `dtype` as it is written."""
        out, inside = self.shape
        a = self.A[0].new_empty((self.modules, sum(self.ranks), inside), dtype=dtype or self.dtype)
        b = self.B[0].new_empty((self.modules, out, sum(self.ranks)), dtype=dtype or self.dtype)
        start = 0
        for mine, c, rank in zip(
            zip(self.A, self.B, strict=True), self.weights * self.scaling, self.ranks, strict=True
        ):
            root, signed = _roots(c, self.dtype)
            torch.mul(mine[0], signed, out=a[:, start : start + rank])
            torch.mul(mine[1], root, out=b[:, :, start : start + rank])
            start += rank
        return LowRank(a, b)


def _roots(c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """sqrt(|c|) and sign(c) sqrt(|c|), [L, 1, 1]: the first goes to B and the second to A, so that neither side over- or
    underflows in 16 bits."""
    root = c.abs().sqrt().to(dtype)[:, None, None]
    return root, root.copysign(c.to(dtype)[:, None, None])


def _scaled(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> LowRank:
    """c * b @ a."""
    root, signed = _roots(c, dtype)
    return LowRank(a * signed, b * root)


def side_by_side(parts: Sequence[LowRank]) -> LowRank:
    """sum_i B_i A_i as one product."""
    if len(parts) == 1:
        return parts[0]
    return LowRank(torch.cat([p.A for p in parts], 1), torch.cat([p.B for p in parts], 2))


def gram(x: Tensor) -> Tensor:
    """x^T x of x [L, n, R], [L, R, R]; float64 where the device has it, so that squaring the condition number is harmless
    at float32's accuracy."""
    wide = x.to(widest(x.device))
    return wide.mT @ wide
