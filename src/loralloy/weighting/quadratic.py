"""Quadratic: how far a weighted sum of adapters is from what each domain's own adapter does, as a function of the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quadratic:
    """sum_i E||(sum_j alpha_j dW_j - dW_i) x||^2 = alpha^T H alpha - 2 alpha^T c + constant. H [n, n], c [n]; modules add."""

    H: Tensor
    c: Tensor
    constant: float

    def __add__(self, other: Quadratic) -> Quadratic:
        return Quadratic(self.H + other.H, self.c + other.c, self.constant + other.constant)

    def error(self, alpha: Tensor) -> float:
        """The relative error: the root of the quadratic at alpha over its value at 0; 0 where no adapter changes anything."""
        lost = float(alpha @ self.H @ alpha - 2 * alpha @ self.c) + self.constant
        return math.sqrt(max(0.0, lost) / self.constant) if self.constant > 0 else 0.0

    def solve(self, ridge: float = 0.0) -> Tensor:
        """The minimiser [n] of the error + ridge * sum_j H_jj (alpha_j - 1)^2.

        The ridge pulls towards 1, each adapter as it was trained, so an adapter that no other disturbs stays at 1 whatever
        the ridge; it is relative to H_jj, so a rescaled adapter does not change what it does. Directions that nothing
        determines (equal adapters, a dW that no input meets) take the solution nearest to 1.
        """
        size = self.H.diagonal().clamp(min=0).sqrt()
        scale = torch.where(size > 0, 1 / size, torch.zeros_like(size))
        system = self.H * scale[:, None] * scale + ridge * torch.eye(len(size), dtype=self.H.dtype)
        away = scale * (self.c - self.H.sum(1))  # the gradient at alpha = 1
        step = torch.linalg.lstsq(system, away[:, None], driver="gelsd").solution[:, 0]
        return 1 + scale * step
