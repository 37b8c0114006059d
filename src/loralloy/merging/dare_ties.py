"""dare_ties: drop at random instead of trimming, then TIES."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from .dare_linear import SEED
from .entries import Entries, Majority, Normaliser, Vote
from .rule import Rule
from .ties import DENSITY, MAJORITY, NORMALISER, VOTE


def dare_ties(
    entries: Entries,
    *,
    density: Annotated[float, DENSITY] = 0.5,
    majority: Annotated[Majority, MAJORITY] = "total",
    normaliser: Annotated[Normaliser, NORMALISER] = "count",
    vote: Annotated[Vote, VOTE] = "unweighted",
    seed: Annotated[int, SEED] = 0,
) -> Tensor:
    """x_i = m_i * x_i / density at random (DARE), then the elected sign and the mean of what agrees (TIES, no trimming).

    Yu et al. 2024, section 3; PEFT 0.21.2's `dare_ties` in factors space given the same masks.
    """
    return entries.disjoint(entries.dropped(density, seed), majority, normaliser, vote, spare=density < 1)


RULE = Rule(
    "dare_ties",
    dare_ties,
    "drop entries at random and rescale, elect a sign for each, average those that agree",
    "as ties, where trimming by magnitude would silence a small adapter",
    "Yu et al. 2024 (arXiv 2311.03099); PEFT 0.21.2",
    spaces=("delta", "factors", "knots", "core"),
    fused=True,
)
