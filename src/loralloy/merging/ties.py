"""ties: trim, elect a sign, average what agrees."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from .entries import Entries, Majority, Normaliser, Trim, Vote
from .rule import Param, Rule

DENSITY = Param("fraction of entries that are kept", 0, 1)
MAJORITY = Param("elect the sign of the sum (total) or the sign that more adapters have (frequency)")
NORMALISER = Param(
    "divide by the number of adapters that agree (count, PEFT's: shrinks dW when weights sum to 1) or by the sum of their weights"
)
VOTE = Param("let entries vote as they are (unweighted, PEFT's) or times their adapter's weight (weighted, mergekit's)")
TRIM = Param(
    "trim each tensor to the density (tensor, PEFT's) or all modules of an adapter together (all, the TIES paper's)"
)


def ties(
    entries: Entries,
    *,
    density: Annotated[float, DENSITY] = 0.2,
    majority: Annotated[Majority, MAJORITY] = "total",
    normaliser: Annotated[Normaliser, NORMALISER] = "count",
    vote: Annotated[Vote, VOTE] = "unweighted",
    trim: Annotated[Trim, TRIM] = "tensor",
) -> Tensor:
    """x_i trimmed to its largest magnitudes; sign = sgn(sum_i x_i); out = sum_{i agrees} w_i x_i / #{i agrees}.

    Yadav et al., "TIES-Merging", NeurIPS 2023, section 4 (there w_i = lambda for all, and trimming over all modules). In
    factors space, with the other defaults, it is PEFT 0.21.2's `ties`: on A with weights sgn(w s) sqrt(|w s|) and on B with
    sqrt(|w s|), an adapter of weight 0 still voting. The paper's and PEFT's density is 0.2 and a free choice.
    """
    return entries.disjoint(entries.trimmed(), majority, normaliser, vote, spare=True)


RULE = Rule(
    "ties",
    ties,
    "keep each adapter's largest entries, elect a sign for each, average those that agree",
    "adapters disagree in sign, and one merge must serve all of their tasks; try it in delta and knots space",
    "Yadav et al. 2023 (arXiv 2306.01708); PEFT 0.21.2",
    spaces=("delta", "factors", "knots", "core"),
    fused=True,
)
