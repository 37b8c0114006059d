"""svd: the weighted sum of dW, cut to a chosen rank by the optimal truncation."""

from __future__ import annotations

from .rule import Rule
from .stack import LowRank, Stack


def svd(stack: Stack) -> LowRank:
    """The exact sum; `merge` then cuts it to the output rank (Eckart-Young) in r-space (see :mod:`.cut`).

    PEFT's `svd` computes the same dW from a dense SVD of each module [peft 0.21.2; up to 0.20.0 it was scaled twice].
    """
    return stack.weighted_sum()


RULE = Rule(
    "svd",
    svd,
    "the weighted sum of dW, cut optimally to a rank (default: the largest parent rank)",
    "one small adapter of a fixed rank, with the error of the cut reported",
    "PEFT 0.21.2; Eckart and Young 1936",
    acts_on="stack",
    spaces=("delta",),
    sums=("delta",),
)
