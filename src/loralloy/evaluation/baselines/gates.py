"""What the methods that run a gate inside the model share: masks by example, and a router that is trained once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ..suite.locks import lock
from ..suite.method import LiveMethod, Row

if TYPE_CHECKING:
    from torch import Tensor

    from ...live import Gate
    from ...live.gates import LinearRouter
    from ...tasks import Example
    from ..suite.run import Run


def allowed_table(run: Run, examples: Sequence[Example]) -> Tensor:
    """[examples, n] bool: the adapters that each example may use, in the order of the bank."""
    import torch

    allowed = [set(run.allowed(example)) for example in examples]
    return torch.tensor([[name in some for name in run.live.names] for some in allowed])


def answer_under(run: Run, examples: Sequence[Example], gate: Gate) -> list[Row]:
    """Every example's prompt under a gate; what an example may not use is masked, the rest normalised again."""
    from ...live import Gated

    gated = Gated(run.live, gate, allowed_table(run, examples))
    return run.predict([e.prompt for e in examples], [e.options for e in examples], gated.rows)


class TrainedRouter(LiveMethod):
    """A linear router a layer, trained on training rows of all tasks with base and adapters frozen (training/gate.py).

    It reads the prompt, which holds the task's hint whatever the suite's query is, so it depends on no query. It is trained
    once a seed (the order of rows, and which rows). In scope leave_own_out the own adapter is masked and the rest normalised
    again, but the same router is used: it has seen the own task's rows in training, an advantage over routing by retrieval,
    which has not.

    Fields: rows and validation_rows a task; the rest as in :class:`loralloy.training.gate.RouterConfig`.
    """

    depends = frozenset({"scope", "seed"})
    uses = frozenset({"model", "bank"})
    router: ClassVar[str] = "token"

    rows: Annotated[int, Field(ge=1)] = 400
    validation_rows: Annotated[int, Field(ge=1)] = 10
    steps: Annotated[int, Field(ge=1)] = 300
    train_batch: Annotated[int, Field(ge=1)] = 32
    lr: Annotated[float, Field(gt=0)] = 3e-3
    max_length: Annotated[int, Field(ge=8)] = 512

    @property
    def cost(self) -> float:
        return 20.0  # trained first

    @property
    def experts(self) -> int | None:
        """Experts that are kept; None for all."""
        return None

    def trained(self, run: Run) -> LinearRouter:
        """The router of this run's seed, from the suite's cache or trained now."""
        from ...live.gates import LinearRouter
        from ...training.gate import RouterConfig, train_router

        assert run.seed is not None
        config = RouterConfig(
            self.router, self.experts, self.steps, self.train_batch, self.lr, max_length=self.max_length, seed=run.seed
        )
        bench = run.bench
        identity: list[Any] = [
            vars(config), self.rows, self.validation_rows, bench.base.fingerprint, str(bench.model.dtype),
            {name: adapter.content_hash for name, adapter in run.bank.items()},
            {name: bench.data_hash(name) for name in run.tasks},
        ]  # fmt: skip
        path, guard = run.once_path(f"router-{self.router}", identity)
        if not path.is_file():
            with lock(guard):
                if not path.is_file():
                    train = [e for own in run.train_examples(self.rows, run.seed).values() for e in own]
                    checks = [e for t in run.tasks.values() for e in t.examples("validation", self.validation_rows)]
                    hints = {name: task.hint for name, task in run.tasks.items()}
                    made = train_router(
                        run.live, run.tokenizer, train, checks, hints, config, title=f"router of {self.name}"
                    )
                    made.save(path, made.config, overwrite=True)
        return LinearRouter.load(path).to(run.live.device)

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        return answer_under(run, examples, self.trained(run))
