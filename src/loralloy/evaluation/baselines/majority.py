"""majority: the commonest answer of the task's training rows; no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ...stats import majority
from ..suite.method import Method, Row

if TYPE_CHECKING:
    from ...tasks import Example
    from ..suite.run import Run


class Majority(Method):
    """For tasks with labels; where each row has its own options (or none) the commonest answer that is among them, else the
    first option: a guess, stated as such.
    """

    kind = "majority"
    source = "a floor"
    depends = frozenset()
    uses: ClassVar[frozenset[str]] = frozenset()

    @property
    def cost(self) -> float:
        return 0.001

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        common = {task: majority([e.answer for e in run.tasks[task].examples("train")])[0] for task in run.tasks}
        rows = []
        for example in examples:
            answer = common[example.task]
            if example.options and answer not in example.options:
                answer = example.options[0]
            rows.append(Row(answer))
        if run.progress:
            run.progress(len(rows))
        return rows
