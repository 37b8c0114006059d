"""svd: the weighted sum of dW, cut to a chosen rank by the optimal truncation."""

from __future__ import annotations

from collections.abc import Sequence

from ..factors import LoraFactors, weighted_sum
from .rule import Rule, Space


def svd(factors: Sequence[LoraFactors], weights: Sequence[float], space: Space = "delta") -> LoraFactors:
    """The exact sum; `merge` then cuts it to the output rank (Eckart-Young) from QRs of the stacked factors.

    PEFT's `svd` computes the same dW from a dense SVD of each module [peft 0.21.2; up to 0.20.0 it was scaled twice].
    """
    return weighted_sum(factors, weights)


RULE = Rule(
    "svd",
    svd,
    ("delta",),
    "max",
    "the weighted sum of dW, cut optimally to a rank (default: the largest parent rank)",
    "one small adapter of a fixed rank, with the error of the cut reported",
    sums=("delta",),
)
