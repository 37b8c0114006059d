"""selection: the one adapter whose task is nearest to the query (LoraRetriever's Selection)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..suite.method import Method, Row

if TYPE_CHECKING:
    from ...tasks import Example
    from ..suite.run import Run


class Selection(Method):
    """Top-1 by cosine to the mean embedding of each task's index rows (Zhao et al., arXiv 2402.09997, section 3.2).

    As LoraRetriever retrieves, but with the index's embedder and rows (theirs: a fine-tuned INSTRUCTOR, 20 samples a task).
    """

    kind = "selection"
    source = "LoraRetriever (arXiv 2402.09997)"

    @property
    def rank(self) -> str:
        return "live"

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        return run.composed(examples, [{names[0]: 1.0} for names in run.nearest_tasks(examples, 1)])
