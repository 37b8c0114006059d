"""Cells: (method, query, scope, seed), each one JSON file, written whole when it is done."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...atomic import atomic_file
from ...errors import LoralloyError
from ...weighting.choose import FITS
from .method import Method, Query, Scope
from .schema import Suite
from .workbench import ENGINE, Workbench, short_hash

if TYPE_CHECKING:
    from ...tasks import Example
    from .method import Row
    from .run import Run

VERSION = 1


@dataclass(frozen=True)
class Cell:
    """One piece of the suite's work; query, scope and seed are None where the method does not depend on them."""

    method: Method
    query: Query | None
    scope: Scope | None
    seed: int | None

    @property
    def name(self) -> str:
        parts = [self.method.name, self.query or "any", self.scope or "any", "any" if self.seed is None else self.seed]
        return "__".join(map(str, parts))

    def path(self, out: Path) -> Path:
        return out / "cells" / f"{self.name}.json"


def cells_of(suite: Suite) -> list[Cell]:
    """Every cell of a suite, method by method.

    Raises LoralloyError when a method is left with no cell (perfect selection in a suite of leave_own_out alone).
    """
    cells: list[Cell] = []
    for method in suite.methods:
        fields, depends = suite.fields, method.depends
        asked = method.scopes or fields.scopes
        scopes = [scope for scope in asked if scope in method.only_scopes]
        if not scopes:
            raise LoralloyError(
                f"{suite.path}: method {method.name!r} makes sense in {', '.join(method.only_scopes)} only, the suite asks "
                f"for {', '.join(asked)}; take it out of `methods`, or add the scope"
            )
        queries: Sequence[Any] = (method.queries or fields.queries) if "query" in depends else [None]
        seeds: Sequence[Any] = (method.seeds or fields.index.seeds) if "seed" in depends else [None]
        if "scope" not in depends:
            # the same answers whatever is withheld; in_domain alone where leaving the own task out makes no sense
            chosen: Sequence[Any] = [None] if len(method.only_scopes) > 1 else scopes
        else:
            chosen = scopes
        cells += [Cell(method, q, scope, seed) for q in queries for scope in chosen for seed in seeds]
    return cells


def fingerprint(cell: Cell, bench: Workbench) -> str:
    """Of everything that a cell's answers depend on: equal fingerprints, equal answers."""
    fields, uses = bench.suite.fields, cell.method.uses
    parts: dict[str, Any] = {
        "engine": ENGINE, "loralloy": __version__, "settings": cell.method.settings, "query": cell.query,
        "scope": cell.scope, "seed": cell.seed, "rows": bench.suite.rows_of(cell.method),
        "data": {name: bench.data_hash(name) for name in bench.tasks},
    }  # fmt: skip
    if "model" in uses:
        parts["base"] = bench.base.fingerprint
        parts["dtype"], parts["device"] = str(bench.model.dtype), bench.device.type
        parts["max_new_tokens"] = fields.max_new_tokens
        parts["versions"] = _versions("torch", "transformers")
    if "bank" in uses:
        parts["bank"] = {name: adapter.content_hash for name, adapter in bench.bank.items()}
    if "multitask" in uses and bench.multitask is not None:
        parts["multitask"] = bench.multitask.content_hash
    if "index" in uses:
        parts["index"] = [fields.index.rows, fields.index.template, fields.index.store, bench.embedder.identity]
    weigher = getattr(cell.method, "weigher", None)
    if weigher is not None and FITS[weigher.kind] > 1:
        parts["fits"] = FITS[weigher.kind]
    if "formats" in uses:
        parts["formats"] = {name: bench.base_format(name) for name in bench.tasks}
    return "sha256:" + short_hash(parts)


def made_of(cell: Cell, bench: Workbench) -> dict[str, Any]:
    """What a report can compare without loading a model; None where the cell does not depend on it."""
    uses, index = cell.method.uses, bench.suite.fields.index
    return {
        "engine": ENGINE,
        "base": bench.base.fingerprint if "model" in uses else None,
        "bank": short_hash({n: a.content_hash for n, a in bench.bank.items()}) if "bank" in uses else None,
        "data": short_hash({name: bench.data_hash(name) for name in bench.tasks}),
        "index": [index.rows, index.template, index.store] if "index" in uses else None,
    }


def _versions(*names: str) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name).split("+")[0] for name in names}


def write_cell(
    cell: Cell,
    run: Run,
    examples: Sequence[Example],
    rows: Sequence[Row],
    mark: str,
    wall: float,
    peak: int | None = None,
    held: int | None = None,
) -> Path:
    """Write a finished cell, whole or not at all.

    wall: seconds in all. peak, held: bytes on the GPU at the most, and before the cell (model, adapters, cached merges).
    """
    bench = run.bench
    sizes = list(run.bytes.values())
    data = {
        "version": VERSION,
        "method": cell.method.name,
        "kind": cell.method.kind,
        "heading": cell.method.title(),
        "source": cell.method.source,
        "space": cell.method.space,
        "rule": cell.method.rule,
        "rank": cell.method.rank,
        "query": cell.query,
        "scope": cell.scope,
        "seed": cell.seed,
        "fingerprint": mark,
        "made_of": made_of(cell, bench),
        "settings": cell.method.settings,
        "routing": run.routing,
        "rows_a_task": bench.suite.rows_of(cell.method),
        "batch_size": run.batch_size,
        "device": bench.device.type if "model" in cell.method.uses else None,
        "seconds": {name: round(value, 4) for name, value in run.seconds.items()} | {"wall": round(wall, 4)},
        "peak_bytes": peak,
        "held_bytes": held,
        "cache": {"hits": run.hits, "misses": run.misses, "answers": run.reused},
        "adapter_bytes": {"mean": sum(sizes) / len(sizes), "max": max(sizes), "n": len(sizes)} if sizes else None,
        "rows": [
            {
                "id": example.id,
                "task": example.task,
                "answer": row.answer,
                "weights": _short(row.weights),
                "scores": None if row.scores is None else [round(score, 4) for score in row.scores],
            }
            for example, row in zip(examples, rows, strict=True)
        ],
    }
    path = cell.path(bench.suite.out)
    atomic_file(path, json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n")
    return path


def _short(weights: dict[str, float] | None) -> dict[str, float] | None:
    return None if weights is None else {name: round(w, 5) for name, w in weights.items()}


def read_cell(path: Path) -> dict[str, Any]:
    """A cell file. Raises LoralloyError when it is not one of this version."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoralloyError(f"{path}: not a readable cell ({error}); delete it and run the suite again") from None
    if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("rows"), list):
        raise LoralloyError(f"{path}: not a cell of version {VERSION}; delete it and run the suite again")
    return data


def done(cell: Cell, out: Path, mark: str) -> bool:
    """Whether a cell's file is there and of this fingerprint."""
    path = cell.path(out)
    if not path.is_file():
        return False
    try:
        return bool(read_cell(path)["fingerprint"] == mark)
    except (LoralloyError, KeyError):
        return False


def read_cells(out: Path, only: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """The cells in a folder, by file name: all, or those of these names."""
    for path in sorted((out / "cells").glob("*.json")):
        if only is None or path.stem in only:
            yield read_cell(path)
