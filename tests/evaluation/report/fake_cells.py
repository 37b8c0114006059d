"""Cells as a suite's run writes them, without a model: plausible answers, weights and times, drawn by a seed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

from loralloy.evaluation.suite.cells import Cell, cells_of
from loralloy.evaluation.suite.schema import Suite
from loralloy.tasks import Task, load_tasks

# how often each kind of method is right, beyond chance
SKILL = {
    "majority": 0.15, "base": 0.2, "perfect": 0.6, "routed": 0.57, "selection": 0.52, "fusion": 0.4, "mixture": 0.48,
    "adapter_soup": 0.4, "uniform": 0.3, "moe": 0.5, "smear": 0.45, "arrow": 0.42, "logo": 0.44, "multitask": 0.55,
    "task_average": 0.56, "shuffled": 0.25,
}  # fmt: skip
ROUTES = {("hinted", "paper"): 0.96, ("raw", "paper"): 0.55, ("raw", "kernel"): 0.75, ("raw", "probe"): 0.88}


def _random(*parts: Any) -> random.Random:
    return random.Random(hashlib.sha256("|".join(map(str, parts)).encode()).digest())


def _weights(cell: Cell, task: str, names: list[str], draw: random.Random) -> dict[str, float] | None:
    kind, settings = cell.method.kind, cell.method.settings
    if kind in ("majority", "base", "moe", "smear", "arrow", "multitask"):
        return None
    own_out = cell.scope == "leave_own_out"
    others = [name for name in names if name != task]
    if kind == "perfect":
        return {task: 1.0}
    if kind in ("selection", "fusion", "mixture", "adapter_soup", "logo"):
        k = 1 if kind == "selection" else min(3, len(others))
        first = [] if own_out or draw.random() > 0.8 else [task]
        chosen = (first + draw.sample(others, k))[:k]
        return dict.fromkeys(chosen, 1 / k)
    if kind == "uniform":
        allowed = others if own_out else names
        return {name: round(1 / len(allowed), 5) for name in allowed}
    weigher = (settings.get("weigher") or {}).get("kind", "paper")
    if settings.get("unlike") and draw.random() < 0.05:
        return {}
    own = 0.0 if own_out else min(1.0, max(0.0, draw.gauss(ROUTES.get((cell.query, weigher), 0.97), 0.15)))
    picked = draw.sample(others, min(len(others), 1 + (own < 0.9) + (own < 0.5)))
    made = {task: own} if own > 0 else {}
    return made | {name: (1 - own) / len(picked) for name in picked if own < 1}


def make_cell(cell: Cell, suite: Suite, tasks: list[Task], skill: float | None = None) -> dict[str, Any]:
    """One cell's data."""
    method = cell.method
    names = [task.name for task in tasks]
    base = SKILL[method.kind] if skill is None else skill
    if cell.scope == "leave_own_out" and method.kind == "routed":
        base = 0.3
    if cell.query == "raw" and method.kind == "routed":
        base -= 0.05
    rows = []
    for task in tasks:
        for e in task.examples("test", suite.rows_of(method)):
            # rows are hard or easy for all methods alike, so that paired differences are smaller than apart
            hard = _random("row", e.id).random()
            draw = _random(method.name, cell.query, cell.scope, cell.seed, e.id)
            right = 0.7 * hard + 0.3 * draw.random() < base + 0.15 * _random("task", task.name).random()
            if e.options:
                scores = [-2.0 - 3 * draw.random() for _ in e.options]
                wanted = e.options.index(e.answer)
                if not right and len(e.options) > 1:
                    wanted = draw.choice([i for i in range(len(e.options)) if i != wanted])
                scores[wanted] = -1.0
                answer = e.options[wanted]
            else:
                scores, answer = None, e.answer if right else "something else entirely"
            rows.append(
                {
                    "id": e.id,
                    "task": task.name,
                    "answer": answer,
                    "weights": _weights(cell, task.name, names, draw),
                    "scores": scores,
                }
            )
    merged = method.rank not in ("-", "live")
    return {
        "version": 1, "method": method.name, "kind": method.kind, "heading": method.title(), "source": method.source,
        "space": method.space, "rule": method.rule, "rank": method.rank, "query": cell.query, "scope": cell.scope,
        "seed": cell.seed, "fingerprint": "sha256:0", "settings": method.settings,
        "routing": {"settings": {"router": "kernel"}, "index_rows": 100} if method.kind == "routed" else None,
        "rows_a_task": suite.rows_of(method), "batch_size": 8, "device": "cpu" if "model" in method.uses else None,
        "seconds": {
            "weigh": 0.001 * len(rows) if method.kind == "routed" else 0.0, "compose": 0.02 * len(rows) if merged else 0.0,
            "answer": 0.0 if method.kind == "majority" else 0.01 * method.cost * len(rows), "wall": 0.05 * len(rows),
        },
        "peak_bytes": None if method.kind == "majority" else 700_000_000 + 1_000_000 * len(method.name),
        "held_bytes": None if method.kind == "majority" else 600_000_000,
        "cache": {"hits": len(rows) // 2 * merged, "misses": (len(rows) - len(rows) // 2) * merged, "answers": len(rows) // 4},
        "adapter_bytes": {"mean": 2.5e6, "max": 4_000_000, "n": 7} if merged else None,
        "rows": rows,
    }  # fmt: skip


def write_cells(suite: Suite, out: Path | None = None, skip: Collection[str] = ()) -> Path:
    """Every cell of the suite but those named in `skip`; returns the output folder."""
    out = out or suite.out
    tasks = load_tasks(suite.fields.tasks)
    (out / "cells").mkdir(parents=True, exist_ok=True)
    for cell in cells_of(suite):
        if cell.name not in skip:
            cell.path(out).write_text(json.dumps(make_cell(cell, suite, tasks)))
    return out
