"""Rows: sequences that are decoded, each under its own composition, and what they report."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ..weights import Weights
from .sampling import Choice, Sampling, TextBuffer

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Event:
    """What a row reports: text that can be shown now, the token behind it, and at the end why it ended.

    `error` ends it too: "timeout", or what went wrong.
    """

    text: str = ""
    choice: Choice | None = None
    finish: Reason | None = None
    error: str | None = None

    @property
    def last(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Row:
    """One sequence: its prompt's ids, its composition in the live bank, and where its events go (called while stepping)."""

    prompt: list[int]
    weights: Weights
    sampling: Sampling
    emit: Callable[[Event], None]
    deadline: float = float("inf")
    cancelled: bool = False
    written: int = 0
    last: int = -1
    done: bool = False
    text: TextBuffer | None = None
    source: random.Random = field(default_factory=random.Random)

    def tell(self, event: Event) -> None:
        """Report, unless the end has been reported."""
        if not self.done:
            self.done = event.last
            self.emit(event)

    @property
    def length(self) -> int:
        """The columns it may come to use."""
        return len(self.prompt) + self.sampling.max_tokens
