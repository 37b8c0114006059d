"""Several tasks' rows as one training set: the single multi-task adapter that a bank is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoralloyError
from .config import TrainConfig
from .data import Encoded, encode_examples, fingerprint

if TYPE_CHECKING:
    from ..tasks.task import Task

SCORES = ("adapter", "base", "base_best_format")


@dataclass(frozen=True)
class Mixture:
    """The union of the training rows of `tasks`; one task is a mixture of one, named as the task.

    Raises LoralloyError when there is no task, two have one name, or several have no common name.
    """

    tasks: tuple[Task, ...]
    name: str

    @staticmethod
    def of(tasks: Task | str | Path | Iterable[Task | str | Path], name: str | None = None) -> Mixture:
        """From a task, files, or folders of files. `name` is what several are called together."""
        from ..tasks.task import Task, load_tasks

        entries = [tasks] if isinstance(tasks, Task | str | Path) else list(tasks)
        found: list[Task] = []
        for entry in entries:
            found += [entry] if isinstance(entry, Task) else load_tasks(entry)
        if not found:
            raise LoralloyError("no task is given; name task files (YAML), or folders that hold them")
        names = [task.name for task in found]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise LoralloyError(f"the task {twice[0]!r} is given twice; name each once")
        if name is None and len(found) > 1:
            raise LoralloyError(
                f"{len(found)} tasks are given; pass --bank to train an adapter for each, or --name to train one on all"
            )
        if name is not None and len(found) > 1 and name in names:
            raise LoralloyError(f"--name {name!r} is the name of one of the tasks; choose another")
        return Mixture(tuple(found), name or found[0].name)

    @property
    def single(self) -> bool:
        """Whether it is just one task, and written as such."""
        return len(self.tasks) == 1 and self.name == self.tasks[0].name

    def encode(self, tokenizer: Any, config: TrainConfig) -> tuple[list[Encoded], dict[str, dict[str, Any]]]:
        """``(rows, {task: {"rows", "truncated", "data", "template", "source", "licence"}})``.

        At most `config.limit` rows of each task, task after task: the loop shuffles them, by the seed alone. "data" is
        the sha256 of the task's token ids. Raises LoralloyError as :func:`encode_examples` does.
        """
        rows: list[Encoded] = []
        told: dict[str, dict[str, Any]] = {}
        for task in self.tasks:
            try:
                encoded, cuts = encode_examples(
                    tokenizer, task.examples("train", config.limit), task.hint, config.max_length
                )
            except LoralloyError as error:
                if self.single:
                    raise
                raise error.within(f"task {task.name!r}") from error
            rows += encoded
            told[task.name] = {
                "rows": len(encoded),
                "truncated": cuts,
                "data": fingerprint(encoded),
                "template": task.template_hash(),
                "source": task.data_source,
                "licence": task.licence,
            }
        return rows, told

    def joined(self, by_task: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The metrics of several tasks: ``{"tasks": {name: ...}, "mean": {split: {"adapter", ..., "tasks"}}}``.

        A mean is over tasks, each of one weight, and over those alone that have rows in the split.
        """
        mean: dict[str, Any] = {}
        for split in ("validation", "test"):
            entries = [metrics[split] for metrics in by_task.values() if split in metrics]
            if entries:
                mean[split] = {k: sum(e[k]["accuracy"] for e in entries) / len(entries) for k in SCORES}
                mean[split]["tasks"] = len(entries)
        return {"tasks": by_task, "mean": mean}
