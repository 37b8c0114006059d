"""Cells as files: small JSON, one line each, and what a report keeps of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loralloy.atomic import atomic_file

Row = dict[str, Any]


def write(path: Path, result: Row) -> None:
    atomic_file(path, json.dumps(result, separators=(",", ":")) + "\n")


def read(folder: Path) -> list[Row]:
    """Those of a folder, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def rounded(value: Any) -> Any:
    """To the five digits that a report keeps, at any depth."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value
