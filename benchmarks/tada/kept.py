"""What a cell's file is known by, and what a later cell reads from an earlier one's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from designs import COEFFICIENTS
from plan import Cell, Half, folder, split

from loralloy.errors import LoralloyError
from loralloy.weighting.balance import PASSES
from loralloy.weighting.levels import LEVELS


def key(half: Half, cell: Cell) -> str:
    """Of all that a cell's result depends on beside its name: the method's definition and the half's settings, with the
    pair's own task and domain alone of all that are named there."""
    task, domain = split(cell.pair)
    fields = {k: v for k, v in half.fields.items() if k not in ("final", "reserves", "development", "first")}
    fields |= {"tasks": half.fields["tasks"][task], "domains": half.fields["domains"][domain]}
    method = dataclasses.asdict(cell.method)
    if not cell.method.common:  # names and keys of what was made before adapters could be freed stay
        del method["common"], method["common_of"]
    told: list[Any] = [method, fields, half.calibration, half.few]
    tried: dict[str, Any] = {
        "best": COEFFICIENTS, "free": LEVELS, "even": COEFFICIENTS[0], "balanced": PASSES, "tuned": (COEFFICIENTS, PASSES),
    }  # fmt: skip
    told += [tried.get(cell.at)]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def path(out: Path, half: Half, cell: Cell) -> Path:
    """Of a cell of a final or a development pair."""
    part = "develop" if cell.pair in half.pairs("development") else "design"
    return out / "cells" / folder(half.name, part) / f"{cell.name}.json"


def tuned(out: Path, half: Half, cell: Cell) -> tuple[tuple[float, float], dict[str, Any]]:
    """Coefficients, and the density where there is one, that validation rows chose for the same merge: of its cell at "best".

    Raises LoralloyError where that cell is not there or is one of other settings.
    """
    best = dataclasses.replace(cell, at="best")
    file = path(out, half, best)
    if not file.is_file():
        raise LoralloyError(
            f"cell {cell.name} takes the coefficients of {file}, which is not there; make that cell first"
        )
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["cell"]["key"] != key(half, best):
        raise LoralloyError(f"cell {cell.name} takes the coefficients of {file}, which has other settings; remove it")
    task, domain = found["scale"]
    return (task, domain), {"density": found["density"]} if "density" in found else {}
