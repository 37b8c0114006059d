"""cat: the factors side by side; the weighted sum of dW, exactly, at rank sum_i r_i."""

from __future__ import annotations

from .rule import Rule
from .stack import LowRank, Stack


def cat(stack: Stack) -> LowRank:
    """A = [c_1 A_1; ...], B = [d_1 B_1, ...] with c_i d_i = w_i s_i, so B A = sum_i w_i s_i B_i A_i [peft 0.21.2, `cat`].

    The same dW in either space (PEFT puts w_i s_i on A alone; here its root goes to each side, which is safer in fp16).
    """
    return stack.weighted_sum()


RULE = Rule(
    "cat",
    cat,
    "the adapters' factors side by side: exact, rank grows to the sum of ranks",
    "an exact merge for PEFT's users; the same dW as linear in delta space",
    "PEFT 0.21.2",
    acts_on="stack",
    spaces=("delta", "factors"),
    default_rank="full",
    sums=("delta", "factors"),
)
