"""logo: training-free weights from how strongly each adapter answers the prompt in one probing pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..suite.method import LiveMethod, Row
from .gates import allowed_table

if TYPE_CHECKING:
    from ...tasks import Example
    from ..suite.run import Run


class LogoRouting(LiveMethod):
    """LoGo (arXiv 2511.07129), see :class:`loralloy.live.gates.Logo`; defaults are its released code's.

    It reads the prompt, which holds the task's hint whatever the suite's query is, so it depends on no query and no seed. A
    withheld adapter is not attached while probing either.
    """

    kind = "logo"
    source = "LoGo (arXiv 2511.07129)"
    depends = frozenset({"scope"})
    uses = frozenset({"model", "bank"})

    top_k: Annotated[int, Field(ge=1)] = 20
    signal: Literal["norm", "entropy"] = "norm"
    attached: Literal["sum", "mean", "none"] = "sum"
    input: Literal["residual", "projection"] = "residual"

    @property
    def cost(self) -> float:
        return 2.0

    def title(self) -> str:
        return self.heading or f"LoGo {self.signal}, top {self.top_k}"

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        from ...live.gates import Logo

        start = time.perf_counter()
        logo = Logo(run.live, self.top_k, self.signal, attached=self.attached, input=self.input)
        found = logo.weigh(
            run.tokenizer, [e.prompt for e in examples], allowed_table(run, examples), batch_size=run.batch_size
        )
        run.seconds["weigh"] += time.perf_counter() - start
        return run.composed(examples, [dict(w.items()) for w in found])
