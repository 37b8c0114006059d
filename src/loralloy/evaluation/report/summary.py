"""All numbers of a report as plain data: what its JSON holds, and all that its pages and pictures are made from.

No text, answer or id of a row is in it, so it can be published where a task's rows cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...tasks import Task
from .case import read_case, stale_parts
from .costs import costs
from .evidence import Evidence
from .mistakes import analyse
from .questions import answers
from .routes import quality
from .table import against_own, controls, metrics, protocols, table

VERSION = 1


def summarise(
    evidence: Evidence, folder: Path, tags: Path | None = None, step: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Every number of the report. `step` is told what comes next."""
    tell = step or (lambda _: None)
    suite = evidence.suite
    fields = suite.fields
    made: dict[str, Any] = {
        "version": VERSION,
        "title": fields.title or suite.path.stem,
        "suite": {
            "file": suite.path.name, "model": Path(fields.model).name, "bank": Path(fields.bank).name,
            "index": fields.index.model_dump(mode="json") | {"embedder": _last(fields.index.embedder)},
            "queries": list(fields.queries), "scopes": list(fields.scopes),
        },
        "tasks": {name: _task(task) for name, task in evidence.tasks.items()},
        "families": evidence.families,
        "cells": {"planned": len(evidence.planned), "missing": evidence.missing},
        "remarks": evidence.remarks, "samples": evidence.samples, "seed": evidence.seed,
    }  # fmt: skip
    made["protocols"] = []
    for query, scope in protocols(evidence):
        tell(f"{query}, {scope.replace('_', ' ')}")
        made["protocols"].append(table(evidence, query, scope))
    tell("tasks")
    found = [against_own(evidence, m, q) for q in fields.queries for m in evidence.linear()]
    made["against_own"] = [row for row in found if row]
    made["controls"] = controls(evidence)
    tell("routes")
    made["routing"] = quality(evidence)
    tell("other metrics")
    made["metrics"] = metrics(evidence)
    tell("errors")
    made["mistakes"] = analyse(evidence, tags)
    made["costs"] = costs(evidence)
    made["case"] = case = read_case(folder)
    if case and (stale := stale_parts(case, suite, evidence.results.cells)):
        made["remarks"] = [*made["remarks"], _stale_case(stale)]
    made["questions"] = [answer._asdict() for answer in answers(made)]
    return rounded(made)  # type: ignore[no-any-return]


def _stale_case(parts: list[str]) -> str:
    if parts == ["unknown"]:
        return "The case study does not say what it was made of; make it again with --case."
    return f"The case study was made with other {', '.join(parts)} than the suite has; make it again with --case."


def _last(path: str | None) -> str | None:
    return Path(path).name if path else None


def _task(task: Task) -> dict[str, Any]:
    kind = "labels" if task.labels else "options" if task.options is not None else "free text"
    return {"family": task.family, "kind": kind, "licence": task.licence, "data": task.data_source}


def rounded(value: Any, digits: int = 5) -> Any:
    """Floats rounded, through lists and mappings."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {name: rounded(inner, digits) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner, digits) for inner in value]
    return value
