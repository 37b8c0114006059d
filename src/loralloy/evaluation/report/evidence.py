"""What a report stands on: a suite's plan, the cells that are there, and the comparisons between them, each made once."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ...errors import LoralloyError
from ...stats import Difference, stratified_bootstrap
from ...tasks import Task, load_tasks
from ..metrics import primary, score
from ..suite.cells import Cell, cells_of, read_cell
from ..suite.method import Method, Query, Scope
from ..suite.results import Key, Results, TaskDifference
from ..suite.schema import Suite
from ..suite.workbench import ENGINE

SAMPLES = 10_000
CONTROLS = ("task_average", "shuffled")
TOLD = ("perfect", *CONTROLS)
"""Kinds that are told the task, or are broken on purpose: never called the best."""

T = TypeVar("T")


@dataclass
class Evidence:
    """Cells against the plan of their suite. Cells that the suite does not plan, or plans otherwise, are left out by name.

    Attributes:
        missing: names of cells that the suite plans and that are not there.
        remarks: one sentence a thing that a reader must know (left-out cells, cells with fewer rows).
    """

    suite: Suite
    results: Results
    planned: list[Cell]
    missing: list[str]
    remarks: list[str]
    samples: int = SAMPLES
    seed: int = 0
    _kept: dict[Any, Any] = field(default_factory=dict)

    # -- who is who ----------------------------------------------------------------------------------------------------

    @property
    def methods(self) -> tuple[Method, ...]:
        return self.suite.methods

    @property
    def tasks(self) -> dict[str, Task]:
        return self.results.tasks

    @property
    def families(self) -> dict[str, list[str]]:
        """family -> its tasks; the largest first."""
        found: dict[str, list[str]] = {}
        for task in self.tasks.values():
            found.setdefault(task.family or "other", []).append(task.name)
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))

    def of_kind(self, *kinds: str) -> list[Method]:
        return [method for method in self.methods if method.kind in kinds]

    def first(self, kind: str) -> Method | None:
        """The suite's first method of a kind."""
        return next(iter(self.of_kind(kind)), None)

    def linear(self) -> list[Method]:
        """Routed Linear by router: the exact weighted sum of dW, without a fall-back; the paper's router first."""
        found = [m for m in self.of_kind("routed") if is_linear(m)]
        return sorted(found, key=lambda m: m.weigher.kind != "paper")  # type: ignore[attr-defined]

    # -- what is there -------------------------------------------------------------------------------------------------

    def plans(self, method: Method, query: Query, scope: Scope) -> list[Cell]:
        """The cells that stand for a method under a protocol."""
        return [
            c for c in self.planned
            if c.method.name == method.name and c.query in (query, None) and c.scope in (scope, None)
        ]  # fmt: skip

    def key(self, method: Method | None, query: Query, scope: Scope) -> Key | None:
        """The method's cells under a protocol; None where there are none, or they lack a task."""
        key = self.results.find(method.name, query, scope) if method else None
        return key if key is not None and not self.lacking(key) else None

    def lacking(self, key: Key) -> list[str]:
        """Tasks of the suite that the key's cells have no row of."""
        has = self.results.scores(key)
        return [name for name in self.tasks if name not in has]

    # -- comparisons ---------------------------------------------------------------------------------------------------

    def average(self, key: Key) -> Difference:
        """The mean over tasks with its 95 % interval; rows are drawn within tasks, each row its mean over seeds."""
        return self._once(("average", key), lambda: stratified_bootstrap(self._alone(key), self.seed, self.samples))

    def difference(self, a: Key | None, b: Key | None) -> Difference | None:
        """a - b over the rows that both answered, mean over tasks; None where one is missing."""
        if a is None or b is None or a == b:
            return None
        pairs = lambda: self.results.paired(a, b)  # noqa: E731
        return self._once(("paired", a, b), lambda: stratified_bootstrap(pairs(), self.seed, self.samples))

    def by_task(self, a: Key, b: Key) -> dict[str, TaskDifference]:
        """a - b by task, p adjusted for the number of tasks."""
        return self._once(("tasks", a, b), lambda: self.results.by_task_difference(a, b, seed=self.seed))

    def seed_deviation(self, key: Key) -> float | None:
        """Standard deviation of the average between the seeds of the index; None for fewer than two."""
        values = [self._mean(cell["rows"]) for cell in self.results.of(key)]
        return statistics.stdev(values) if len(values) > 1 else None

    def _mean(self, rows: Iterable[Mapping[str, Any]]) -> float:
        by_task: dict[str, list[float]] = {}
        for row in rows:
            example = self.results.examples[row["id"]]
            value = score(example, row["answer"], heavy=False)[primary(example)]
            by_task.setdefault(example.task, []).append(value)
        return statistics.fmean(statistics.fmean(values) for values in by_task.values())

    def _alone(self, key: Key) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
        return {t: (list(r.values()), [0.0] * len(r)) for t, r in self.results.scores(key).items()}

    def _once(self, name: Any, make: Callable[[], T]) -> T:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]  # type: ignore[no-any-return]


def is_linear(method: Method) -> bool:
    """Whether a routed method is the exact weighted sum of dW for every query."""
    return method.kind == "routed" and getattr(method, "live", False) and getattr(method, "unlike", None) is None


def load(suite: Suite, folder: Path | None = None, samples: int = SAMPLES) -> Evidence:
    """The evidence in a suite's output folder, or in another one (or its `cells` folder).

    Raises LoralloyError where there are no cells, none of them is the suite's, or one is of other data.
    """
    out = folder or suite.out
    if not (out / "cells").is_dir():
        if out.name != "cells" or not out.is_dir():
            raise LoralloyError(
                f"{out}: no cells there; run `loralloy evaluate {suite.path.name}`, or give their folder"
            )
        out = out.parent
    tasks = load_tasks(suite.fields.tasks)
    planned = cells_of(suite)
    by_name = {cell.name: cell for cell in planned}
    found: list[dict[str, Any]] = []
    remarks: list[str] = []
    unplanned, other = [], []
    paths = sorted((out / "cells").glob("*.json"))
    for path in paths:
        cell = by_name.get(path.stem)
        if cell is None:
            unplanned.append(path.stem)
            continue
        data = read_cell(path)
        if data.get("settings") != cell.method.settings or _stale(data, suite, cell):
            other.append(path.stem)
            continue
        found.append(data | {"heading": cell.method.title()})
    if not found:
        there = f"{len(paths)} cells, none of which is the suite's" if paths else "no cells"
        raise LoralloyError(f"{out / 'cells'}: {there} ({suite.path}); run `loralloy evaluate {suite.path.name}` first")
    if unplanned:
        remarks.append(f"Left out, since the suite has no such cell: {_names(unplanned)}.")
    if other:
        remarks.append(
            f"Left out, since they were made with other settings, rows, index or code than the suite now has: {_names(other)}."
        )
    for part in ("base", "bank", "data"):
        made = {data["made_of"][part] for data in found if data.get("made_of") and data["made_of"][part]}
        if len(made) > 1:
            remarks.append(f"The cells were made with {len(made)} different kinds of {part}: run the suite again.")
    have = {Path(p).stem for p in paths} - set(unplanned) - set(other)
    missing = [name for name in by_name if name not in have]
    evidence = Evidence(suite, Results(found, tasks), planned, missing, remarks, samples)
    for key in evidence.results.keys:
        if lacking := evidence.lacking(key):
            remarks.append(f"{key.method} ({_protocol(key)}) has no row of {_names(lacking)}, so it has no average.")
        if len(sizes := {len(c["rows"]) for c in evidence.results.of(key)}) > 1:
            remarks.append(
                f"{key.method} ({_protocol(key)}): its seeds have {' and '.join(map(str, sorted(sizes)))} rows."
            )
    return evidence


def _stale(data: Mapping[str, Any], suite: Suite, cell: Cell) -> bool:
    """Whether a cell is of other rows, another index or other code than the suite's now."""
    made, index = data.get("made_of") or {}, suite.fields.index
    return (
        data["rows_a_task"] != suite.rows_of(cell.method)
        or made.get("engine", ENGINE) != ENGINE
        or (made.get("index") or [index.rows, index.template, index.store]) != [index.rows, index.template, index.store]
    )


def _protocol(key: Key) -> str:
    return ", ".join(str(part).replace("_", " ") for part in key[1:] if part) or "any protocol"


def _names(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
