"""cat: the factors side by side; the weighted sum of dW, exactly, at rank sum_i r_i."""

from __future__ import annotations

from collections.abc import Sequence

from ..factors import LoraFactors, weighted_sum
from .rule import Rule, Space


def cat(factors: Sequence[LoraFactors], weights: Sequence[float], space: Space = "delta") -> LoraFactors:
    """A = [c_1 A_1; ...], B = [d_1 B_1, ...] with c_i d_i = w_i s_i, so B A = sum_i w_i s_i B_i A_i [peft 0.21.2, `cat`].

    The same dW in either space (PEFT puts w_i s_i on A alone; here its root goes to each side, which is safer in fp16).
    """
    return weighted_sum(factors, weights)


RULE = Rule(
    "cat",
    cat,
    ("delta", "factors"),
    "full",
    "the adapters' factors side by side: exact, rank grows to the sum of ranks",
    "an exact merge for PEFT's users; the same dW as linear in delta space",
    sums=("delta", "factors"),
)
