"""task_average: every query of a task under the mean of that task's routed weights (a control)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..suite.method import Row
from .routed import Routed

if TYPE_CHECKING:
    from ...tasks import Example
    from ..suite.run import Run


class TaskAverage(Routed):
    """Is anything gained by weights that differ from query to query of one task?

    The mean is over the test queries themselves (no answers), and it is told the task: a favour to the control.
    """

    kind = "task_average"
    source = "a control"

    def weights(self, run: Run, examples: Sequence[Example]) -> list[dict[str, float]]:
        found = super().weights(run, examples)
        means: dict[str, dict[str, float]] = {}
        for task in {e.task for e in examples}:
            rows = [w for w, e in zip(found, examples, strict=True) if e.task == task]
            names = sorted({name for row in rows for name in row})
            means[task] = {name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in names}
        return [means[e.task] for e in examples]

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        return self.compose(run, examples, self.weights(run, examples))
