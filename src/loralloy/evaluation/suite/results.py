"""The cells of a suite against the tasks' gold answers: scores by row, means by task, paired differences of methods."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import LoralloyError
from ...stats import Difference, holm, paired_bootstrap, paired_p, stratified_bootstrap
from ...tasks import Example, Task
from ..metrics import primary, score
from .cells import read_cells

Scores = dict[str, dict[str, float]]
"""task -> row id -> score, the mean over seeds."""


class Key(NamedTuple):
    """A method under one protocol; query and scope are None where it does not depend on them."""

    method: str
    query: str | None
    scope: str | None


@dataclass(frozen=True)
class TaskDifference:
    """One task's difference of two methods, its p, and p adjusted for the number of tasks (Holm)."""

    difference: Difference
    p: float
    p_holm: float


class Results:
    """Every cell of a suite's folder, scored.

    Args:
        cells: what `read_cells` yields; at least one.
        tasks: the suite's, for gold answers and options.

    Raises LoralloyError when there are no cells, or one answers a row that the tasks do not have.
    """

    def __init__(self, cells: Iterable[Mapping[str, Any]], tasks: Iterable[Task]) -> None:
        self.cells = sorted(cells, key=lambda c: (c["method"], str(c["query"]), str(c["scope"]), str(c["seed"])))
        if not self.cells:
            raise LoralloyError("there are no cells to score; run the suite first")
        self.tasks = {task.name: task for task in tasks}
        self._scores: dict[tuple[Key, str], Scores] = {}

    @staticmethod
    def load(out: Path, tasks: Iterable[Task], only: Collection[str] | None = None) -> Results:
        """The results in a suite's output folder.

        only: names of cells (`Cell.name`); others, of methods or settings that the suite no longer has, are left out.
        Raises LoralloyError where there are none.
        """
        if not (out / "cells").is_dir():
            raise LoralloyError(f"{out}: no cells there; run `loralloy evaluate SUITE` first")
        return Results(read_cells(out, only), tasks)

    @cached_property
    def examples(self) -> dict[str, Example]:
        """Test rows by id."""
        return {e.id: e for task in self.tasks.values() for e in task.examples("test")}

    @property
    def keys(self) -> list[Key]:
        return list(dict.fromkeys(Key(c["method"], c["query"], c["scope"]) for c in self.cells))

    @cached_property
    def headings(self) -> dict[str, str]:
        return {c["method"]: c["heading"] for c in self.cells}

    def find(self, method: str, query: str | None, scope: str | None) -> Key | None:
        """The key of a method under a protocol: a method that does not depend on query or scope answers for any."""
        for key in self.keys:
            if key.method == method and key.query in (query, None) and key.scope in (scope, None):
                return key
        return None

    def of(self, key: Key) -> list[Mapping[str, Any]]:
        """The cells of a key, one a seed."""
        return [c for c in self.cells if Key(c["method"], c["query"], c["scope"]) == key]

    def scores(self, key: Key, metric: str | None = None) -> Scores:
        """task -> row id -> score by `metric` (None: each row's primary one), the mean over seeds.

        Rows to which the metric does not apply are left out.
        """
        if (key, metric or "") not in self._scores:
            cells = self.of(key)
            if not cells:
                raise LoralloyError(f"there is no cell of {key}; run the suite again")
            sums: dict[str, list[float]] = {}
            for cell in cells:
                for row in cell["rows"]:
                    example = self.examples.get(row["id"])
                    if example is None:
                        raise LoralloyError(
                            f"cell {cell['method']!r} answers {row['id']!r}, which the tasks do not have; they are of other "
                            "data than the cells: run the suite again"
                        )
                    found = score(example, row["answer"], row["scores"], heavy=metric in ("rouge_l", "bleu"))
                    wanted = metric or primary(example)
                    if wanted in found:
                        sums.setdefault(row["id"], []).append(found[wanted])
            made: Scores = {}
            for row_id, values in sums.items():
                made.setdefault(self.examples[row_id].task, {})[row_id] = sum(values) / len(values)
            self._scores[key, metric or ""] = made
        return self._scores[key, metric or ""]

    def by_task(self, key: Key, metric: str | None = None) -> dict[str, float]:
        """task -> mean score."""
        return {task: sum(rows.values()) / len(rows) for task, rows in self.scores(key, metric).items()}

    def average(self, key: Key, metric: str | None = None) -> float:
        """The mean over tasks of the mean score."""
        means = self.by_task(key, metric)
        return sum(means.values()) / len(means)

    def paired(self, a: Key, b: Key, metric: str | None = None) -> dict[str, tuple[list[float], list[float]]]:
        """task -> (scores of a, scores of b) over the rows that both answered. Raises LoralloyError when there are none."""
        one, two = self.scores(a, metric), self.scores(b, metric)
        result = {}
        for task in one:
            common = [row for row in one[task] if row in two.get(task, {})]
            if common:
                result[task] = [one[task][row] for row in common], [two[task][row] for row in common]
        if not result:
            raise LoralloyError(f"{a.method} and {b.method} have answered no row in common, so they cannot be compared")
        return result

    def difference(self, a: Key, b: Key, metric: str | None = None, seed: int = 0) -> Difference:
        """a - b, mean over tasks, with its paired 95 % interval (bootstrap over rows within tasks)."""
        return stratified_bootstrap(self.paired(a, b, metric), seed)

    def by_task_difference(self, a: Key, b: Key, metric: str | None = None, seed: int = 0) -> dict[str, TaskDifference]:
        """a - b by task; p by a paired permutation test, adjusted for the number of tasks."""
        pairs = self.paired(a, b, metric)
        p = {task: paired_p(*pair, seed=seed) for task, pair in pairs.items()}
        adjusted = holm(p)
        return {
            task: TaskDifference(paired_bootstrap(*pair, seed=seed), p[task], adjusted[task])
            for task, pair in pairs.items()
        }

    def routing(self, key: Key) -> dict[str, float] | None:
        """Own task is top-1, mean weight on it, adapters used, entropy (nats) of the weights; None without weights."""
        import math

        top = own = used = entropy = 0.0
        n = 0
        for cell in self.of(key):
            for row in cell["rows"]:
                weights = row["weights"]
                if weights is None:
                    continue
                n += 1
                if not weights:  # left to the base: no weight on its own task
                    continue
                top += max(weights, key=lambda name: weights[name]) == row["task"]
                own += weights.get(row["task"], 0.0)
                used += len(weights)
                entropy -= sum(w * math.log(w) for w in weights.values() if w > 0)
        if not n:
            return None
        return {"top1": top / n, "own": own / n, "used": used / n, "entropy": entropy / n}

    def costs(self, key: Key) -> dict[str, float | None]:
        """Over its cells: seconds a row by phase (rows that were not answered before), share of merges from the cache, bytes
        of a merged adapter, peak memory.
        """
        cells = self.of(key)
        rows = sum(len(c["rows"]) for c in cells)
        hits, misses = (sum(c["cache"][name] for c in cells) for name in ("hits", "misses"))
        sizes = [c["adapter_bytes"]["mean"] for c in cells if c["adapter_bytes"]]
        peaks = [c["peak_bytes"] for c in cells if c["peak_bytes"] is not None]
        fresh = rows - sum(c["cache"]["answers"] for c in cells)
        seconds: dict[str, float | None] = {
            # of a few rows left over from other methods no time can be told
            phase: sum(c["seconds"][phase] for c in cells) / n if n and 2 * n >= rows else None
            for phase, n in (("weigh", rows), ("compose", fresh), ("answer", fresh))
        }
        return seconds | {
            "merge": sum(c["seconds"]["compose"] for c in cells) / misses if misses else None,
            "hit_rate": hits / (hits + misses) if hits + misses else None,
            "adapter_bytes": sum(sizes) / len(sizes) if sizes else None,
            "peak_bytes": float(max(peaks)) if peaks else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data: averages, by task, routing and costs of every key."""
        return {
            "version": 1,
            "results": [
                {
                    **key._asdict(), "heading": self.headings[key.method], "average": self.average(key),
                    "by_task": self.by_task(key), "routing": self.routing(key), "costs": self.costs(key),
                    "rows": sum(map(len, self.scores(key).values())), "seeds": [c["seed"] for c in self.of(key)],
                }
                for key in self.keys
            ],
        }  # fmt: skip


def terminal_tables(
    results: Results, methods: Sequence[str], queries: Sequence[str], scopes: Sequence[str]
) -> list[Any]:
    """One rich table a scope: a row a method, its average under each query and the distance to the first in the table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    tables = []
    for scope in scopes:
        table = Table(title=scope.replace("_", " "), title_justify="left", box=SIMPLE_HEAD, show_edge=False)
        for name, justify in (("method", "left"), ("space", "left"), ("rows", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for query in queries:
            for name in (query, "top-1", "on own"):
                table.add_column(name, justify="right")
        for method in methods:
            keys = [results.find(method, query, scope) for query in queries]
            if not any(keys):
                continue
            first = next(key for key in keys if key)
            cells: list[str] = []
            for key in keys:
                routing = results.routing(key) if key and key.query and scope == "in_domain" else None
                cells.append(f"{results.average(key):.3f}" if key else "")
                cells += [f"{routing[name]:.2f}" if routing else "" for name in ("top1", "own")]
            rows = sum(map(len, results.scores(first).values()))
            table.add_row(results.headings[method], str(results.of(first)[0]["space"]), str(rows), *cells)
        tables.append(table)
    return tables
