"""linear: the weighted sum. Exact in delta space; PEFT's rough approximation in factors space."""

from __future__ import annotations

from torch import Tensor

from .entries import Entries
from .rule import Rule


def linear(entries: Entries) -> Tensor:
    """delta: dW = sum_i w_i s_i B_i A_i, exact, any ranks (task arithmetic; Ilharco et al. 2023, section 2).

    factors: PEFT's `linear`, A = sum_i sign(w_i s_i) sqrt(|w_i s_i|) A_i and B = sum_i sqrt(|w_i s_i|) B_i [peft 0.21.2,
    tuners/lora/model.py], whose product has cross terms B_i A_j and so is not the weighted sum. Equal ranks only.
    """
    return entries.summed()


RULE = Rule(
    "linear",
    linear,
    "the weighted sum of dW (delta), or of A and of B apart (factors, PEFT's)",
    "the default: exact in delta space. factors space only to reproduce PEFT",
    "Ilharco et al. 2023 (arXiv 2212.04089); PEFT 0.21.2",
    spaces=("delta", "factors"),
    default_rank="full",
    sums=("delta",),
    fused=True,
)
