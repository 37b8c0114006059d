"""iso_c: the weighted sum with all its singular values made equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import torch

from .rule import Param, Rule
from .stack import LowRank, Stack
from .subspace import lifted, summed, triplets

Mean: TypeAlias = Literal["rank", "width"]
MEAN = Param(
    "take the mean singular value over the directions that there are (rank) or over min(out, in), zeros included (width, as "
    "in the paper's code, which was made for full fine-tuning: it shrinks LoRA)"
)
DIRECTIONS = Param("how many directions the result has, the strongest first; 0: all, the sum of the adapters' ranks", 0)


def width(ranks: Sequence[int], shape: tuple[int, int], *, directions: int = 0, **_: object) -> int:
    """The rank of the result of Iso-C and Iso-CTS."""
    most = min(sum(ranks), *shape)
    return min(directions or most, most)


def iso_c(
    stack: Stack,
    *,
    directions: Annotated[int, DIRECTIONS] = 0,
    mean: Annotated[Mean, MEAN] = "rank",
) -> LowRank:
    """dW = m U V^T, with U diag(s) V^T the SVD of sum_i w_i dW_i and m the mean of s.

    Marczak et al., "No Task Left Behind", ICML 2025 (arXiv 2502.04959), section 4.1 (Iso-C); the paper sums with weights 1.

    Unlike the paper's code, which takes the mean over min(out, in) and raises null vectors too (for LoRA nearly all of them,
    and arbitrary: they are not a function of dW, and dW would get full rank), only directions that the sum has are raised,
    and `mean="rank"` is over those, so that the sum of the singular values stays; so in the code of Core Space, whose cores
    have about as many. `mean="width"` divides by min(out, in): the paper's m, on the directions that exist. A function of
    singular subspaces: in the lossless core it is the same dW, so "core" and "delta" agree.

    The result's singular values are all equal, so which of them a later cut to a smaller rank keeps is arbitrary: for rank k
    set `directions=k`, which takes the sum's strongest.
    """
    t = triplets(stack)
    total = summed(stack, t)
    n = width(stack.ranks, stack.shape, directions=directions)
    live = total.live[:, :n]
    kept = torch.where(live, total.s[:, :n], 0.0)
    over = live.sum(1).clamp(min=1) if mean == "rank" else torch.full_like(kept[:, 0], min(stack.shape))
    level = torch.where(live, (kept.sum(1) / over)[:, None], 0.0)
    return lifted(t, total.u[:, :, :n], level, total.v[:, :, :n], stack.dtype)


RULE = Rule(
    "iso_c",
    iso_c,
    "the weighted sum with all its singular values made equal to their mean",
    "many adapters where a few strong directions of the sum drown the others; rank is the sum of ranks unless you set it",
    "Marczak et al. 2025 (arXiv 2502.04959)",
    acts_on="stack",
    spaces=("delta", "core"),
    default_rank="full",
    width=width,
)
