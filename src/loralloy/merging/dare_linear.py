"""dare_linear: drop entries at random, rescale the rest, add."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from .entries import Entries
from .rule import Param, Rule
from .ties import DENSITY

SEED = Param(
    "seed of the random masks; they depend on it, the adapter's content, the module and the entry alone", 0, 2**31
)


def dare_linear(
    entries: Entries,
    *,
    density: Annotated[float, DENSITY] = 0.5,
    seed: Annotated[int, SEED] = 0,
) -> Tensor:
    """out = sum_i w_i m_i * x_i / density, each m_i entry 1 with probability density.

    Yu et al., "Language Models are Super Mario" (DARE), ICML 2024, section 3.1 (p = 1 - density). In factors space it is
    PEFT 0.21.2's `dare_linear` given the same masks (PEFT draws them from the global generator). Density 0 gives 0.
    """
    return entries.summed(entries.dropped(density, seed))


RULE = Rule(
    "dare_linear",
    dare_linear,
    "drop entries at random, rescale the rest, add",
    "to make adapters interfere less at unchanged expectation; compare seeds before you trust one",
    "Yu et al. 2024 (arXiv 2311.03099); PEFT 0.21.2",
    spaces=("delta", "factors", "knots", "core"),
    fused=True,
)
