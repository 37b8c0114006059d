"""Learned: what a run gives, whatever the strategy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...weights import Weights


@dataclass(frozen=True)
class Learned:
    """What a run gives.

    Attributes:
        weights: the coefficients, source "learned"; `explain` holds the settings.
        history: one entry a step, the start first: step, loss (nats, on the buffer, under the label noise), held_out (the same;
            None without), alpha (mean of each adapter over the modules that it has).
        settings: everything that decides the result.
        seconds: wall time, with that of making the terms.
        start_scale: the uniform scale that it started from.
        searched: the line search: (scale, loss) of each that was tried.
        best_step: the entry of the history that the weights are of.
    """

    weights: Weights
    history: list[dict[str, Any]]
    settings: dict[str, Any]
    seconds: float
    start_scale: float
    searched: list[tuple[float, float]] = field(default_factory=list)
    best_step: int = 0
