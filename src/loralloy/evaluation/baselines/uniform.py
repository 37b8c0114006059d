"""uniform: every adapter that may be used, with one weight; exact, on dW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..suite.method import Method, Row

if TYPE_CHECKING:
    from ...tasks import Example
    from ..suite.run import Run


class Uniform(Method):
    """The average of all adapters, sum_i dW_i / n: what composing without routing gives."""

    kind = "uniform"
    source = "a control"
    depends = frozenset({"scope"})
    uses = frozenset({"model", "bank"})

    @property
    def space(self) -> str:
        return "delta"

    @property
    def rule(self) -> str:
        return "linear"

    @property
    def rank(self) -> str:
        return "live"

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        allowed = [run.allowed(e) for e in examples]
        return run.composed(examples, [dict.fromkeys(names, 1 / len(names)) for names in allowed])
