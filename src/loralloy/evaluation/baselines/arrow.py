"""arrow: training-free routing by token, to the adapters whose strongest input direction fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..suite.method import LiveMethod, Row
from .gates import answer_under

if TYPE_CHECKING:
    from ...tasks import Example
    from ..suite.run import Run


class ArrowRouting(LiveMethod):
    """Arrow (Ostapenko et al. 2024), see :class:`loralloy.live.gates.Arrow`; defaults are PEFT's.

    It reads the prompt, which holds the task's hint whatever the suite's query is, so it depends on no query and no seed.
    """

    kind = "arrow"
    source = "Arrow (arXiv 2405.11157)"
    depends = frozenset({"scope"})
    uses = frozenset({"model", "bank"})

    top_k: Annotated[int, Field(ge=1)] = 3
    temperature: Annotated[float, Field(gt=0)] = 1.0

    @property
    def rule(self) -> str:
        return "gate by token"

    @property
    def cost(self) -> float:
        return 4.0

    def title(self) -> str:
        return self.heading or f"Arrow top {self.top_k}"

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        from ...live.gates import Arrow

        return answer_under(run, examples, Arrow(run.live, self.top_k, self.temperature))
