"""multitask: one LoRA trained on the rows of all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import LoralloyError
from ..suite.method import Method, Row

if TYPE_CHECKING:
    from ...tasks import Example
    from ..suite.run import Run


class Multitask(Method):
    """The single multi-task LoRA of the suite's `multitask` folder. It has seen every task, so in_domain only."""

    kind = "multitask"
    source = "joint training"
    depends = frozenset()
    only_scopes = ("in_domain",)
    uses = frozenset({"model", "multitask"})

    @property
    def rank(self) -> str:
        return "live"

    def check(self, run: Run) -> None:
        if run.multitask is None:
            raise LoralloyError(
                f"{run.bench.suite.path}: method {self.name!r} needs the field `multitask`, the folder of a LoRA trained on all "
                "tasks"
            )

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        from ...bank import Bank
        from ...live import LiveModel
        from ...weights import Weights

        assert run.multitask is not None
        live = LiveModel(run.model, Bank([run.multitask]), run.bench.base)
        try:
            with run.bench.live.compose(None), live.compose(Weights({run.multitask.name: 1.0})):
                return run.predict([e.prompt for e in examples], [e.options for e in examples])
        finally:
            live.remove()
