"""Writes a report's files: NAME.md with its pictures, NAME.html (one file), NAME.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...atomic import atomic_file, check_free
from ...errors import LoralloyError
from ..suite.schema import Suite
from .blocks import markdown
from .evidence import SAMPLES, load
from .html import page
from .pages import blocks
from .plots import PICTURES, pictures
from .summary import summarise

Step = Callable[[str], None]


def report(
    suite: Suite,
    folder: Path,
    name: str = "retrieval",
    *,
    cells: Path | None = None,
    tags: Path | None = None,
    command: str = "",
    samples: int = SAMPLES,
    overwrite: bool = False,
    step: Step | None = None,
) -> tuple[list[Path], dict[str, Any]]:
    """Read a suite's cells and write its report; returns the files written, and the summary.

    Args:
        suite: what was run.
        folder, name: where NAME.md, NAME.html, NAME.json and NAME-*.png go.
        cells: the suite's output folder (or its folder `cells`), where it is another than the suite says.
        tags: a CSV that overrides the rules of the error analysis.
        command: what the page says it was made by.
        samples: of every bootstrap.

    Raises LoralloyError for a name that is no file name, files that are there without `overwrite`, and whatever `load` and the
    tags raise.
    """
    if not name or Path(name).name != name:
        raise LoralloyError(f"--name {name!r} is no file name; give one without a folder, such as retrieval")
    if samples < 100:
        raise LoralloyError(f"--samples {samples}: an interval needs at least 100 samples")
    for file in (f"{name}.md", f"{name}.html", f"{name}.json", *(f"{name}-{part}.png" for part in PICTURES)):
        check_free(folder / file, overwrite)
    evidence = load(suite, cells, samples)
    where = cells or suite.out
    summary = summarise(evidence, where.parent if where.name == "cells" else where, tags, step)
    return write(summary, folder, name, command, step), summary


def write(
    summary: Mapping[str, Any], folder: Path, name: str, command: str = "", step: Step | None = None
) -> list[Path]:
    """Write the files of a summary; each is replaced whole or not at all."""
    if step:
        step("plots")
    drawn = {f"{name}-{part}.png": data for part, data in pictures(summary).items()}
    made = blocks(summary, name, set(drawn), command)
    files: dict[str, str | bytes] = {
        **drawn,
        f"{name}.md": markdown(made),
        f"{name}.html": page(str(summary["title"]), made, drawn),
        f"{name}.json": json.dumps(summary, indent=None, ensure_ascii=False, separators=(",", ":")) + "\n",
    }
    for part in PICTURES:  # a picture of an earlier report that this one does not have
        if f"{name}-{part}.png" not in drawn:
            (folder / f"{name}-{part}.png").unlink(missing_ok=True)
    for file, content in files.items():
        atomic_file(folder / file, content)
    return [folder / file for file in files]
