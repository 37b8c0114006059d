"""base: the plain base model, in the prompt format that does best on each task's validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..suite.method import Method, Row

if TYPE_CHECKING:
    from ...tasks import Example
    from ..suite.run import Run


class Base(Method):
    """An adapter has seen its prompt format in training, the base has not: so it may choose one (`live.base_format`).

    With `own_format: false` it is asked as the adapters are.
    """

    kind = "base"
    source = "a floor"
    depends = frozenset()
    uses = frozenset({"model", "formats", "bank"})

    own_format: bool = True

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        from ...live.base_format import BaseFormat

        prompts = [e.prompt for e in examples]
        if self.own_format:
            formats = {name: BaseFormat(run.base_format(name)) for name in {e.task for e in examples}}
            prompts = [formats[e.task].render(run.tasks[e.task], e, run.tokenizer) for e in examples]
        with run.live.compose(None):
            return run.predict(prompts, [e.options for e in examples])
