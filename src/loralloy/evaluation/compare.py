"""One table: the same held-out examples answered by base model, own adapter, routed and uniform composition."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import LoralloyError
from ..stats import accuracy, majority, paired_bootstrap
from ..weights import Weights

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..answer import Answerer
    from ..tasks import Example, Task

SYSTEMS: dict[str, str] = {
    "majority": "the commonest answer of the task's training rows",
    "base": "the base model, in the prompt format that did best on validation rows",
    "own": "the query's own adapter (an oracle: it is told the task)",
    "routed": "weights retrieved for the query with its task's hint, composed exactly",
    "routed_raw": "the same, routed by the text alone, without the hint",
    "uniform": "every adapter of the bank with weight 1/n",
}


@dataclass(frozen=True)
class Comparison:
    """Per system, whether each example was answered right; examples in one order for all."""

    tasks: tuple[str, ...]
    example_tasks: tuple[str, ...]
    correct: dict[str, list[bool]]
    routing: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def of(self, system: str, task: str | None = None) -> list[bool]:
        """The outcomes of one system, on one task's examples or on all."""
        rows = zip(self.correct[system], self.example_tasks, strict=True)
        return [c for c, t in rows if task is None or t == task]

    def floor(self) -> list[bool]:
        """By task, the better of base and majority: the mark that a composition must beat."""
        chosen = {
            t: max(("base", "majority"), key=lambda s: sum(self.of(s, t))) for t in self.tasks
        }  # fmt: skip
        return [self.correct[chosen[t]][i] for i, t in enumerate(self.example_tasks)]

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """Accuracies with 95 % Wilson intervals, and paired bootstrap differences, overall; plain data."""
        outcomes = dict(self.correct)
        floor = "better of base and majority (by task)"
        if {"base", "majority"} <= outcomes.keys():
            outcomes[floor] = self.floor()
        pairs = [("routed", floor), ("routed", "own"), ("routed", "uniform"), ("routed_raw", "own")]
        differences = {
            f"{a} - {b}": paired_bootstrap(outcomes[a], outcomes[b], seed=seed)
            for a, b in pairs
            if a in outcomes and b in outcomes
        }
        return {
            "n": len(self.example_tasks),
            "accuracy": {s: accuracy(c).__dict__ for s, c in self.correct.items()},
            "difference": {k: {"value": v.value, "low": v.low, "high": v.high} for k, v in differences.items()},
            "by_task": {t: {s: accuracy(self.of(s, t)).__dict__ for s in self.correct} for t in self.tasks},
            "routing": self.routing,
            "settings": self.settings,
        }


def pick_examples(tasks: Sequence[Task], n: int, skip: int = 0) -> list[Example]:
    """n test examples in all, as even over the tasks as they go, in hash order after the first `skip` of each task."""
    if not tasks or n < 1:
        raise LoralloyError(
            f"{n} examples of {len(tasks)} tasks: there is nothing to answer; give at least one of each"
        )
    each, rest = divmod(n, len(tasks))
    picked: list[Example] = []
    for i, task in enumerate(tasks):
        want = each + (i < rest)
        rows = task.examples("test")[skip : skip + want]
        if len(rows) < want:
            raise LoralloyError(
                f"task {task.name!r} has {len(rows)} test rows left, not {want}; ask for fewer examples"
            )
        picked += rows
    return picked


def compare(
    answerer: Answerer,
    tasks: Sequence[Task],
    examples: Sequence[Example],
    systems: Sequence[str] = tuple(SYSTEMS),
    batch_size: int = 16,
    progress: Callable[[str, int], None] | None = None,
) -> Comparison:
    """Answer every example with every system. All score the same options by log-likelihood, greedily, with no randomness.

    Args:
        answerer: model, bank and router; every task must have its adapter in the bank.
        tasks: the tasks of the examples.
        examples: held-out rows.
        systems: a choice of SYSTEMS.
        progress: called with a system and how many examples it has just done.

    Raises LoralloyError for an unknown system or a task without an adapter.
    """
    from ..live.base_format import BaseFormat
    from ..live.scoring import correct, predict

    for system in systems:
        if system not in SYSTEMS:
            raise LoralloyError(f"system {system!r} is not known; choose from {', '.join(SYSTEMS)}")
    bank, tokenizer = answerer.bank, answerer.tokenizer
    for task in tasks:
        if task.name not in bank:
            raise LoralloyError(f"task {task.name!r} has no adapter in the bank ({', '.join(bank.names)})")
    assert answerer.router is not None
    gold = [e.answer for e in examples]
    options = [e.options for e in examples]
    outcome: dict[str, list[bool]] = {}
    routing: dict[str, float] = {}
    by_name = {task.name: task for task in tasks}
    formats = {task.name: base_format(bank[task.name]) for task in tasks}

    def run(system: str, prompts: list[str], weights: list[Weights] | None) -> None:
        def rows(indices: list[int]):  # type: ignore[no-untyped-def]
            return answerer.live.compose([weights[i] for i in indices] if weights else None)

        answers = predict(
            answerer.model, tokenizer, prompts, options, batch_size=batch_size, rows_hook=rows,
            progress=(lambda n: progress(system, n)) if progress else None,
        )  # fmt: skip
        outcome[system] = correct(answers, gold)

    for system in systems:
        prompts = [e.prompt for e in examples]
        if system == "majority":
            common = {t.name: majority([e.answer for e in t.examples("train")])[0] for t in tasks}
            outcome[system] = [e.answer == common[e.task] for e in examples]
            if progress:
                progress(system, len(examples))
        elif system == "base":
            run(system, [BaseFormat(formats[e.task]).render(by_name[e.task], e, tokenizer) for e in examples], None)
        elif system == "own":
            run(system, prompts, [Weights({e.task: 1.0}) for e in examples])
        elif system == "uniform":
            run(system, prompts, [Weights.uniform(bank.names)] * len(examples))
        else:
            texts = [e.query if system == "routed" else e.raw for e in examples]
            weights = answerer.router.weigh_batch(texts)
            routing |= _routing(system, weights, examples)
            run(system, prompts, weights)
    router = answerer.router
    settings = {
        **router.settings,
        "index_rows": len(router.index), "template": router.index.manifest.template, "base_formats": formats,
        "adapters": {name: bank[name].content_hash for name in bank.names},
    }  # fmt: skip
    asked = {e.task for e in examples}
    return Comparison(
        tuple(t.name for t in tasks if t.name in asked), tuple(e.task for e in examples), outcome, routing, settings
    )


def base_format(adapter: Adapter) -> str:
    """The base's best prompt format, as recorded (see :func:`recorded_base_format`), else the adapters' own."""
    return recorded_base_format(adapter) or "as_trained"


def recorded_base_format(adapter: Adapter) -> str | None:
    """The base's best prompt format, chosen on validation rows when the adapter was trained (metrics.json), or None."""
    path = adapter.path / "metrics.json" if adapter.path else None
    if path is None or not path.is_file():
        return None
    name = json.loads(path.read_text(encoding="utf-8")).get("base_format", {}).get("name")
    return None if name is None else str(name)


def _routing(system: str, weights: Sequence[Weights], examples: Sequence[Example]) -> dict[str, float]:
    """How often the own task has the largest weight, its mean weight, and the mean size of the nucleus."""
    n = len(examples)
    top = sum(max(w.names, key=lambda a: w.of(a)) == e.task for w, e in zip(weights, examples, strict=True))
    return {
        f"{system} top-1": top / n,
        f"{system} weight on own": sum(w.of(e.task) for w, e in zip(weights, examples, strict=True)) / n,
        f"{system} adapters used": sum(len(w.names) for w in weights) / n,
    }
