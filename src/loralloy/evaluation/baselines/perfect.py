"""perfect: the task's own adapter, as if the router were told the task (Perfect selection of LoraRetriever)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..suite.method import Method, Row

if TYPE_CHECKING:
    from ...tasks import Example
    from ..suite.run import Run


class Perfect(Method):
    """Perfect selection (Zhao et al., LoraRetriever, arXiv 2402.09997): an oracle for routing, not a bound on quality."""

    kind = "perfect"
    source = "LoraRetriever (arXiv 2402.09997)"
    depends = frozenset()
    only_scopes = ("in_domain",)
    uses = frozenset({"model", "bank"})

    @property
    def rank(self) -> str:
        return "live"

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        return run.composed(examples, [{e.task: 1.0} for e in examples])
