"""Efficiency: what a method's cells took, by method."""

from __future__ import annotations

from typing import Any

from .evidence import Evidence
from .table import parameters


def costs(evidence: Evidence) -> list[dict[str, Any]]:
    """A row a method, over all of its cells (every query, scope and seed).

    Milliseconds a row by phase, seconds a merge (only merges that were made), share of rows whose merge was in the cache, bytes
    of a merged adapter as stored in the bank's dtype, largest peak of GPU memory (and what of it the cell added), answers a
    second over all phases. `reused`: rows that the process had answered before under the same composition; they are taken
    over, and do not count as composed or answered here.
    """
    rows = []
    for method in evidence.methods:
        cells = [c for c in evidence.results.cells if c["method"] == method.name]
        n = sum(len(c["rows"]) for c in cells)
        if not n:
            continue
        reused = sum(c["cache"].get("answers", 0) for c in cells)
        seconds = {p: sum(c["seconds"][p] for c in cells) for p in ("weigh", "compose", "answer")}
        hits, misses = (sum(c["cache"][name] for c in cells) for name in ("hits", "misses"))
        sizes = [(c["adapter_bytes"]["mean"], c["adapter_bytes"]["n"]) for c in cells if c.get("adapter_bytes")]
        peaks = [(c["peak_bytes"], c.get("held_bytes")) for c in cells if c.get("peak_bytes") is not None]
        fresh = n - reused if 2 * reused <= n else 0  # of a few rows left over from other methods no time can be told
        ms = {
            "weigh": 1000 * seconds["weigh"] / n,
            "compose": 1000 * seconds["compose"] / fresh if fresh else None,
            "answer": 1000 * seconds["answer"] / fresh if fresh else None,
        }
        total = sum(value for value in ms.values() if value is not None) if fresh else 0.0
        rows.append(
            {
                "method": method.name,
                "heading": method.title(),
                "space": method.space,
                "rule": method.rule,
                "parameters": parameters(method),
                "rank": method.rank,
                "cells": len(cells),
                "rows": n,
                "devices": sorted({c["device"] for c in cells if c.get("device")}),
                "ms": ms,
                "total_ms": total or None,
                "reused": reused / n,
                "merge_ms": 1000 * seconds["compose"] / misses if misses else None,
                "merges": misses,
                "hit_rate": hits / (hits + misses) if hits + misses else None,
                "adapter_bytes": sum(b * k for b, k in sizes) / sum(k for _, k in sizes) if sizes else None,
                "peak_bytes": max((peak for peak, _ in peaks), default=None),
                "added_bytes": max((peak - held for peak, held in peaks if held is not None), default=None),
                "answers_a_second": 1000 / total if total > 0 else None,
            }
        )
    return rows
