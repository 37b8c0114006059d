"""fusion: the parameters of the three nearest adapters averaged (LoraRetriever's Fusion)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ...merging import Linear
from ..suite.merges import How
from ..suite.method import Method, Row

if TYPE_CHECKING:
    from ...tasks import Example
    from ..suite.run import Run


class Averaged(Method):
    """The parameters of some adapters averaged, A and B apart: PEFT's `linear` in factors space with weight 1/k^2 each.

    It puts the root of a weight on A and on B. Adapters of one rank and scaling only.
    """

    @property
    def space(self) -> str:
        return "factors"

    @property
    def rule(self) -> str:
        return "parameter average"

    @property
    def rank(self) -> str:
        return "max"

    @property
    def cost(self) -> float:
        return 6.0

    @cached_property
    def how(self) -> How:
        return How(Linear, "factors", None)

    def average(self, run: Run, examples: Sequence[Example], names: Sequence[Sequence[str]]) -> list[Row]:
        """Answers under the average of each example's adapters; the rows note 1/k, what each adapter counts."""
        rows = run.merged(examples, [dict.fromkeys(chosen, 1 / len(chosen) ** 2) for chosen in names], self.how)
        return [
            row._replace(weights=dict.fromkeys(chosen, 1 / len(chosen)))
            for row, chosen in zip(rows, names, strict=True)
        ]  # fmt: skip


class Fusion(Averaged):
    """A' = 1/k sum_p A_p, B' = 1/k sum_p B_p, y = W0 x + s B' A' x (Zhao et al., arXiv 2402.09997, section 3.3).

    B' A' has the cross terms B_p A_q, so it is not the mean of the adapters. Retrieved as in Selection.
    """

    kind = "fusion"
    source = "LoraRetriever (arXiv 2402.09997)"

    k: Annotated[int, Field(ge=1)] = 3

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        nearest = run.nearest_tasks(examples, self.k)
        return self.average(run, examples, nearest)
