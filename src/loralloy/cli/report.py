"""`loralloy report`: a suite's cells as tables, plots and one page."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from .common import Json, OptionalPath


def report(
    suite: Annotated[Path, typer.Argument(help="The suite file (YAML) that `loralloy evaluate` ran.")],
    cells: Annotated[
        OptionalPath, typer.Option(help="The folder its cells are in, where it is not the suite's own.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")] = Path("docs/results"),
    name: Annotated[str, typer.Option(help="NAME.md, NAME.html, NAME.json and NAME-*.png are written.")] = "retrieval",
    tags: Annotated[
        OptionalPath, typer.Option(metavar="CSV", help="Error types by row (id,tag), in place of what the rules say.")
    ] = None,
    samples: Annotated[int, typer.Option(min=100, help="Of every bootstrap.")] = 10_000,
    case: Annotated[
        bool, typer.Option("--case", help="Ask the case study's question first; needs model, bank and index.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report.")] = False,
    json: Json = False,
) -> None:
    """Make a report of a suite's cells: methods by tasks, routing, controls, errors, costs.

    Example: loralloy report examples/suite/suite.yaml -o docs/results --overwrite
    """
    from ..console import console
    from ..console import out as stdout
    from ..evaluation.report import case_study
    from ..evaluation.report import report as make
    from ..evaluation.suite import Suite

    loaded = Suite.load(suite)
    folder = cells.absolute() if cells else loaded.out
    with _status() as step:
        if case:
            case_study(loaded, folder.parent if folder.name == "cells" else folder, step)
        files, summary = make(
            loaded, output, name, cells=cells and folder, tags=tags, command=shlex.join(["loralloy", *sys.argv[1:]]),
            samples=samples, overwrite=overwrite, step=step,
        )  # fmt: skip
    if json:
        stdout.print_json(data=summary)
        return
    stdout.print(_table(summary["questions"]))
    missing = summary["cells"]["missing"]
    if missing:
        console.print(
            f"{len(missing)} cells are missing; their places are marked '-': {', '.join(missing[:4])} ...", markup=False
        )
    for path in files:
        console.print(str(path), style="dim", markup=False, soft_wrap=True)


def _table(questions: list[dict[str, str]]) -> object:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for column in ("question", "asked", "reached", "measured"):
        table.add_column(column)
    for row in questions:
        table.add_row(*(Text(row[column]) for column in ("question", "asked", "reached", "measured")))
    return table


@contextlib.contextmanager
def _status() -> Iterator[Callable[[str], None] | None]:
    """What is being made now, where there is a terminal."""
    from ..console import console

    if not console.is_terminal:
        yield None
        return
    with console.status("reading cells") as status:
        yield lambda words: status.update(words)
