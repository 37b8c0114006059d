"""uniform: every adapter that may be used, with one weight; exact, on dW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..suite.method import LiveMethod, Row

if TYPE_CHECKING:
    from ...tasks import Example
    from ..suite.run import Run


class Uniform(LiveMethod):
    """The average of all adapters, sum_i dW_i / n: what composing without routing gives."""

    kind = "uniform"
    source = "a control"
    depends = frozenset({"scope"})
    uses = frozenset({"model", "bank"})

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        allowed = [run.allowed(e) for e in examples]
        return run.composed(examples, [dict.fromkeys(names, 1 / len(names)) for names in allowed])
