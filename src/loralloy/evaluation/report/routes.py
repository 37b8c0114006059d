"""Retrieval quality: how often, and with how much weight, a query's own task is found; where the rest of the weight goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from ..suite.method import Method, Query
from .evidence import Evidence

METRICS = {
    "top1": "own task has the largest weight",
    "own": "mean weight on the own task",
    "entropy": "entropy of the weights, nats",
    "used": "adapters with a weight (nucleus)",
    "base": "queries left to the base model",
}


def weighers(evidence: Evidence) -> list[Method]:
    """One method a weigher: those whose cells have its weights unrounded.

    Routed Linear (with or without a fall-back), top-1 selection by mean task embeddings, and LoGo, which needs no index.
    """
    found: dict[str, Method] = {}
    for method in evidence.methods:
        if method.kind == "routed" and getattr(method, "live", False):
            name = str([method.settings.get("weigher"), method.settings.get("unlike")])
        elif method.kind in ("selection", "logo"):
            name = method.name
        else:
            continue
        found.setdefault(name, method)
    return list(found.values())


def said(method: Method) -> str:
    """A weigher's name in tables."""
    weigher = getattr(method, "weigher", None)
    if weigher is None:
        return {"selection": "nearest mean task embedding"}.get(method.kind, method.title())
    unlike = getattr(method, "unlike", None)
    words = {"paper": "the paper's kernel", "kernel": "tuned kernel", "probe": "probe"}.get(weigher.kind, weigher.kind)
    given = {k: v for k, v in weigher.model_dump(exclude_none=True).items() if k != "kind"}
    words += "".join(f", {k} {v}" for k, v in given.items())
    return words + (f", base if unlike > {unlike:g}" if unlike is not None else "")


def quality(evidence: Evidence) -> list[dict[str, Any]]:
    """A row a weigher and query kind, in-domain: each metric over all tasks (mean of task means) and by task.

    Means and standard deviations are over the seeds of the index; `confusion` is the mean weight by own task and adapter.
    """
    rows, seen = [], set()
    for query in evidence.suite.fields.queries:
        for method in weighers(evidence):
            key = evidence.results.find(method.name, query, "in_domain")
            if key in seen:  # its answers depend on no query
                continue
            seen.add(key)
            if (found := _of(evidence, method, query)) is not None:
                rows.append(found)
    return rows


def _of(evidence: Evidence, method: Method, query: Query) -> dict[str, Any] | None:
    key = evidence.results.find(method.name, query, "in_domain")
    if key is None:
        return None
    cells = [c for c in evidence.results.of(key) if any(row["weights"] is not None for row in c["rows"])]
    if not cells:
        return None
    by_seed = [_by_task(cell["rows"]) for cell in cells]
    tasks = [t for t in evidence.tasks if all(t in seed for seed in by_seed)]
    if not tasks:
        return None
    overall = {m: _over([fmean(seed[t][m] for t in tasks) for seed in by_seed]) for m in METRICS}
    by_task = {t: {m: _over([seed[t][m] for seed in by_seed]) for m in METRICS} for t in tasks}
    names = list(evidence.tasks)
    mass = [_mass(cell["rows"], names) for cell in cells]
    confusion = [[fmean(m.get((own, other), 0.0) for m in mass) for other in names] for own in names]
    first = cells[0].get("routing") or {}
    weigher = getattr(method, "weigher", None)
    return {
        "method": method.name, "kind": method.kind, "router": weigher.kind if weigher else None,
        "falls_back": getattr(method, "unlike", None) is not None, "weigher": said(method),
        "query": key.query or "prompt", "seeds": [c["seed"] for c in cells],
        "index_rows": first.get("index_rows"), "settings": first.get("settings"), "all": overall, "by_task": by_task,
        "confusion": confusion, "overlaps": _overlaps(evidence, names, confusion, tasks),
        "missing": [t for t in names if t not in tasks],
    }  # fmt: skip


def row_metrics(weights: Mapping[str, float], own: str) -> dict[str, float]:
    """One query's weights against its own task. No weights at all: the base model answers, nothing is on the own task."""
    kept = {name: w for name, w in weights.items() if w > 0}
    total = sum(kept.values())
    shares = [w / total for w in kept.values()] if kept else []
    return {
        "top1": float(bool(kept) and max(kept, key=lambda name: kept[name]) == own),
        "own": kept.get(own, 0.0),
        "entropy": -sum(p * math.log(p) for p in shares) + 0.0,
        "used": float(len(kept)),
        "base": float(not kept),
    }


def _by_task(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    found: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        if row["weights"] is not None:
            found.setdefault(row["task"], []).append(row_metrics(row["weights"], row["task"]))
    return {task: {m: fmean(r[m] for r in given) for m in METRICS} for task, given in found.items()}


def _over(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else None}


def _mass(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[tuple[str, str], float]:
    """(own task, adapter) -> mean weight."""
    sums: dict[tuple[str, str], float] = {}
    count: dict[str, int] = {}
    for row in rows:
        count[row["task"]] = count.get(row["task"], 0) + 1
        for name, w in (row["weights"] or {}).items():
            sums[row["task"], name] = sums.get((row["task"], name), 0.0) + w
    return {(own, other): value / count[own] for (own, other), value in sums.items()}


def _overlaps(
    evidence: Evidence, names: list[str], confusion: list[list[float]], tasks: list[str], top: int = 10
) -> dict[str, Any]:
    """The largest weights on another task, and the share of all such weight that stays in the query's family."""
    pairs: list[dict[str, Any]] = [
        {"task": own, "other": other, "mass": confusion[i][j]}
        for i, own in enumerate(names)
        for j, other in enumerate(names)
        if i != j and own in tasks and confusion[i][j] > 0
    ]
    family = {name: task.family for name, task in evidence.tasks.items()}
    lost = sum(p["mass"] for p in pairs)
    inside = sum(p["mass"] for p in pairs if family[p["task"]] == family[p["other"]] != "")
    pairs.sort(key=lambda p: (-p["mass"], p["task"], p["other"]))
    return {"pairs": pairs[:top], "in_family": inside / lost if lost > 0 else None}
