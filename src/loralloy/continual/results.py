"""What a stream's folder holds: the accuracy matrix, coefficients and costs of each run, and what they come to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LoralloyError
from .metrics import Metrics

# two-sided 95 % quantiles of Student's t, degrees of freedom 1 to 30
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Mean:
    """Mean, standard deviation (n - 1) and the half width of the 95 % t interval of the mean, over `n` seeds.

    Orders are averaged within a seed first: they share adapters, so they are no repetitions. nan where n is 1.
    """

    value: float
    deviation: float
    half: float
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> Mean:
        n = len(values)
        mean = sum(values) / n if n else math.nan
        if n < 2:
            return Mean(mean, math.nan, math.nan, n)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1))
        quantile = _T95[n - 2] if n - 2 < len(_T95) else 1.96 + 2.4 / (n - 1)
        return Mean(mean, deviation, quantile * deviation / math.sqrt(n), n)

    def to_dict(self) -> dict[str, float | int | None]:
        told = {"mean": self.value, "deviation": self.deviation, "half": self.half}
        return {k: None if math.isnan(v) else v for k, v in told.items()} | {"n": self.n}


@dataclass(frozen=True)
class RunResult:
    """One run. matrix[t][j]: the accuracy on the j-th domain of `order` after experience t; None where not evaluated.

    steps: by experience, what was written of it ({} where there is nothing, or several steps as in the oracle's).
    """

    seed: int
    order: tuple[str, ...]
    strategy: str
    merge: str
    kind: str
    settings: Mapping[str, Any]
    buffer: Mapping[str, Any] | None
    matrix: tuple[tuple[float | None, ...], ...]
    base: tuple[float | None, ...]
    steps: tuple[Mapping[str, Any], ...] = field(repr=False)
    uncut: float | None = None

    @property
    def metrics(self) -> Metrics:
        return Metrics.of(self.matrix, self.base)

    @property
    def weights(self) -> list[Mapping[str, float]]:
        """By experience, the coefficient of each adapter (the mean of a per-module one); {} where there are none."""
        return [step.get("weights", {}) for step in self.steps]

    def to_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed, "order": self.order, "strategy": self.strategy, "merge": self.merge,
            "settings": dict(self.settings), "buffer": self.buffer, "metrics": self.metrics.to_dict(),
            "matrix": self.matrix, "base": self.base, "uncut_final_accuracy": self.uncut, "weights": self.weights,
            "cut": [step.get("cut") for step in self.steps], "rank": [step.get("rank") for step in self.steps],
            "seconds": [step.get("seconds") for step in self.steps],
            "memory": [step.get("memory") for step in self.steps],
        }  # fmt: skip


@dataclass(frozen=True)
class Results:
    """The finished runs of a folder, and how many are not."""

    folder: Path
    plan: Mapping[str, Any]
    runs: tuple[RunResult, ...]
    missing: int

    @staticmethod
    def load(folder: str | Path) -> Results:
        """Read a folder of `loralloy continual run`. Raises LoralloyError for one that is none, or has a damaged file."""
        folder = Path(folder)
        plan = _read(folder / "plan.json", f"{folder} is no folder of `loralloy continual run`: it has no plan.json")
        if plan.get("version") != 1:
            raise LoralloyError(
                f"{folder / 'plan.json'}: version {plan.get('version')!r} is not known; upgrade loralloy"
            )
        known: dict[str, dict[str, Any] | None] = {}

        def step(key: str) -> dict[str, Any] | None:
            if key not in known:
                path = folder / "experiences" / key / "result.json"
                known[key] = _read(path, f"{path} cannot be read") if path.is_file() else None
            return known[key]

        runs, missing = [], 0
        for entry in plan["runs"]:
            rows = [[step(key) for key in keys] for keys in entry["steps"]]
            if any(found is None for row in rows for found in row):
                missing += 1
                continue
            runs.append(_run(entry, rows, step(entry["base"])))
        return Results(folder, plan, tuple(runs), missing)

    @property
    def merges(self) -> list[str]:
        """In the stream's order; "" stands for strategies that merge nothing."""
        return list(dict.fromkeys(run.merge for run in self.runs))

    @property
    def strategies(self) -> list[str]:
        return list(dict.fromkeys(run.strategy for run in self.runs))

    def of(self, merge: str, strategy: str) -> list[RunResult]:
        return [run for run in self.runs if run.merge == merge and run.strategy == strategy]

    def mean(self, merge: str, strategy: str, metric: str = "final_accuracy") -> Mean:
        """A metric over seeds, averaged over orders within each."""
        return Mean.of(list(self.by_seed(merge, strategy, metric).values()))

    def by_seed(self, merge: str, strategy: str, metric: str = "final_accuracy") -> dict[int, float]:
        found: dict[int, list[float]] = {}
        for run in self.of(merge, strategy):
            found.setdefault(run.seed, []).append(_value(run, metric))
        return {seed: sum(values) / len(values) for seed, values in sorted(found.items())}

    def difference(self, a: tuple[str, str], b: tuple[str, str], metric: str = "final_accuracy") -> Mean:
        """a - b of two (merge, strategy), paired by seed."""
        first, second = self.by_seed(*a, metric), self.by_seed(*b, metric)
        return Mean.of([first[seed] - second[seed] for seed in first if seed in second])

    def best_fixed(self, merge: str) -> str | None:
        """The fixed weight with the best mean final accuracy under a merge: chosen on the test rows, in hindsight."""
        fixed = [s for s in self.strategies if any(run.kind == "fixed" for run in self.of(merge, s))]
        return max(fixed, key=lambda s: self.mean(merge, s).value, default=None)

    def to_dict(self) -> dict[str, Any]:
        """All runs and the table of means, as plain JSON."""
        pairs = dict.fromkeys((run.merge, run.strategy) for run in self.runs)
        table = [
            {"merge": m, "strategy": s} | {name: self.mean(m, s, name).to_dict() for name in (*METRICS, "cut")}
            for m, s in pairs
        ]
        return {
            "version": 1, "title": self.plan["title"], "missing": self.missing, "means": table,
            "runs": [run.to_dict() for run in self.runs],
        }  # fmt: skip


LEARNING = ("learned", "entropy", "search", "regmean", "grouped")
"""Kinds of strategies that make coefficients from rows."""
METRICS = ("final_accuracy", "incremental_accuracy", "forgetting", "backward_transfer", "forward_transfer")


def _value(run: RunResult, metric: str) -> float:
    if metric == "cut":
        cut = run.steps[-1].get("cut") if run.steps else None
        return math.nan if cut is None else float(cut)
    if metric == "uncut":
        return math.nan if run.uncut is None else run.uncut
    return float(getattr(run.metrics, metric))


def _run(entry: Mapping[str, Any], rows: Sequence[Sequence[Any]], base: Mapping[str, Any] | None) -> RunResult:
    order = tuple(entry["order"])

    def accuracies(parts: Iterable[Mapping[str, Any]], field_: str = "domains") -> tuple[float | None, ...]:
        scores = {name: score["accuracy"] for part in parts for name, score in part.get(field_, {}).items()}
        return tuple(scores.get(name) for name in order)

    uncut = [x for x in accuracies(rows[-1], "uncut") if x is not None]
    return RunResult(
        entry["seed"], order, entry["strategy"], entry["merge"], entry["kind"], entry["settings"], entry["buffer"],
        tuple(accuracies(row) for row in rows), accuracies([base] if base else []),
        tuple(row[0] if len(row) == 1 else {} for row in rows), sum(uncut) / len(uncut) if uncut else None,
    )  # fmt: skip


def _read(path: Path, otherwise: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoralloyError(otherwise) from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoralloyError(f"{path}: not JSON ({error}); remove it, and run the stream again") from None
    if not isinstance(data, dict):
        raise LoralloyError(f"{path}: not a mapping; remove it, and run the stream again")
    return data
