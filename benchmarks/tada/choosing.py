"""Which coefficients and which density a merge is made with: given, chosen without labels, or chosen by validation rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from designs import COEFFICIENTS
from kept import tuned
from plan import Cell

from loralloy.weighting.levels import LEVELS, information

if TYPE_CHECKING:
    from work import Site

Scale = tuple[float, float]  # of the task and the domain adapter


def chosen(site: Site, cell: Cell, domain: str) -> tuple[Scale, dict[str, Any], list[dict[str, Any]]]:
    """As `plan.Cell.at` says: (scale, other values, what was tried)."""
    method = cell.method
    values: dict[str, Any] = {"density": method.densities[0]} if method.densities else {}
    if cell.at == "even":
        return COEFFICIENTS[0], values, []
    if cell.at == "free":
        return _by_information(site, cell, domain, values)
    if cell.at == "best":
        return _by_validation(site, cell, domain, values)
    if cell.at == "tuned":
        return *tuned(site.out, site.half, cell), []
    return (1.0, 1.0), values, []


def _by_information(
    site: Site, cell: Cell, domain: str, values: Mapping[str, Any]
) -> tuple[Scale, dict[str, Any], list[dict[str, Any]]]:
    """The level of 1/1 at which the answers to unlabelled inputs tell the most; of equals the smallest."""
    method = cell.method
    answers = site.inner.unlabelled_answers(domain, method.inputs or site.half.calibration, cell.seed)
    tried: list[dict[str, Any]] = []
    for level in LEVELS:
        with site.set(method, (level, level), values):
            tried.append({"scale": [level, level], "information": information(answers())})
    known = [t for t in tried if math.isfinite(t["information"])]
    best = max(known, key=lambda t: t["information"])["scale"]
    return (best[0], best[1]), dict(values), tried


def _by_validation(
    site: Site, cell: Cell, domain: str, values: Mapping[str, Any]
) -> tuple[Scale, dict[str, Any], list[dict[str, Any]]]:
    """The density at weights of 1, then the weights at that density; the first of equals."""
    method, scale = cell.method, (1.0, 1.0)
    tried: list[dict[str, Any]] = []

    def look(values: Mapping[str, Any], scale: Scale) -> float:
        with site.set(method, scale, values):
            seen = site.score(domain, ("validation",))["validation"]
        tried.append({"scale": list(scale), **values, "validation": seen})
        return float(seen)

    if method.densities:
        known = {d: look({"density": d}, scale) for d in method.densities}
        values = {"density": max(method.densities, key=lambda d: known[d])}
    seen = {tuple(t["scale"]): t["validation"] for t in tried if t.get("density") == values.get("density")}
    for one in COEFFICIENTS:
        if one not in seen:
            seen[one] = look(values, one)
    return max(COEFFICIENTS, key=lambda c: seen[c]), dict(values), tried
