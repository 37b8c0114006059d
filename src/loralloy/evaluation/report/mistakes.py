"""Error analysis: the error rate of rows with a type against rows without it, by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .evidence import Evidence
from .tags import RULES, read_overrides, tags_of

LEAST = 5
"""Rows with a type, and rows without it, that a task needs to take part in the comparison within tasks."""


def analyse(evidence: Evidence, overrides: Path | None = None) -> dict[str, Any]:
    """Counts by type, and each method's error rates with it and without it, in-domain.

    `pooled` rates are over all rows, so they mix what a type does with how hard its tasks are; `within` compares rows of one
    task with each other, over tasks that have at least `LEAST` of both, weighted by their tagged rows.
    """
    given = read_overrides(overrides, evidence.results.examples) if overrides else {}
    shown = _methods(evidence)
    if not shown:
        return {}
    answered = {row for _, key in shown for rows in evidence.results.scores(key).values() for row in rows}
    tags = tags_of((evidence.results.examples[row] for row in sorted(answered)), evidence.tasks, given)
    types = [
        {
            "name": rule.name, "heading": rule.heading, "rule": rule.words,
            "rows": sum(rule.name in names for names in tags.values()),
            "tasks": len({evidence.results.examples[i].task for i, names in tags.items() if rule.name in names}),
        }
        for rule in RULES
    ]  # fmt: skip
    methods = []
    for label, key in shown:
        errors = {t: {i: 1.0 - s for i, s in rows.items()} for t, rows in evidence.results.scores(key).items()}
        methods.append(
            {
                "method": key.method,
                "heading": label,
                "query": key.query,
                "types": {r.name: rates(errors, tags, r.name, evidence.seed, evidence.samples) for r in RULES},
            }
        )
    return {
        "types": types, "rows": len(tags), "untagged": sum(not names for names in tags.values()),
        "overridden": sum(i in given for i in tags), "methods": methods,
    }  # fmt: skip


def _methods(evidence: Evidence) -> list[tuple[str, Any]]:
    """Base, own adapter, and routed composition by every rule, over the rows that all methods of full length answer."""
    chosen = [m for m in (evidence.first("base"), evidence.first("perfect")) if m]
    chosen += evidence.linear()
    chosen += [m for m in evidence.of_kind("routed") if m not in chosen and not getattr(m, "live", False)]
    found: list[tuple[str, Any]] = []
    for query in evidence.suite.fields.queries:
        for method in chosen:
            key = evidence.key(method, query, "in_domain")
            if key is not None and all(key != other for _, other in found):
                words = f", {key.query}" if key.query else ""
                found.append((method.title() + words, key))
    return found


def rates(
    errors: Mapping[str, Mapping[str, float]], tags: Mapping[str, frozenset[str]], name: str, seed: int, samples: int
) -> dict[str, Any]:
    """One type's error rates. errors: task -> row id -> 1 - score."""
    groups = {
        task: (
            [e for i, e in rows.items() if name in tags.get(i, ())],
            [e for i, e in rows.items() if name not in tags.get(i, ())],
        )
        for task, rows in errors.items()
    }
    tagged = [e for a, _ in groups.values() for e in a]
    others = [e for _, b in groups.values() for e in b]
    usable = {t: g for t, g in groups.items() if min(map(len, g)) >= LEAST}
    return {
        "n": len(tagged), "with": fmean(tagged) if tagged else None, "without": fmean(others) if others else None,
        "within": within(list(usable.values()), seed, samples) if usable else None, "tasks": len(usable),
    }  # fmt: skip


def within(groups: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int, samples: int) -> dict[str, float]:
    """mean(with) - mean(without) in each task, weighted by rows with; percentile interval, both groups drawn anew.

    An unpaired bootstrap (Efron & Tibshirani 1993, ch. 8): the rows with a type and those without are different rows.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    total = sum(len(a) for a, _ in groups)
    value, drawn = 0.0, np.zeros(samples)
    for a, b in groups:
        weight = len(a) / total
        value += weight * (fmean(a) - fmean(b))
        for sign, given in ((1, a), (-1, b)):
            values = np.asarray(given, dtype=np.float64)
            for start in range(0, samples, 1000):
                size = min(1000, samples - start)
                picked = generator.integers(0, len(values), (size, len(values)))
                drawn[start : start + size] += sign * weight * values[picked].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}
