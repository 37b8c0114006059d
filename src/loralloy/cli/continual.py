"""`loralloy continual`: domains arrive one by one; `run` a stream file, `show` what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import Json, OptionalPath

app = typer.Typer(
    help="Domains arrive one by one: an adapter each, merged anew by coefficients learned on a small memory buffer.",
    no_args_is_help=True,
)


@app.command()
def run(
    stream: Annotated[
        Path, typer.Argument(help="Stream file (YAML, version: 1).", metavar="STREAM", show_default=False)
    ],
    out: Annotated[
        OptionalPath, typer.Option("--out", "-o", help="Folder of results; `out` of the file by default.")
    ] = None,
    only: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer evaluates this at run time on Python 3.10
        typer.Option(help="Only these strategies and merges, by name, kind or rule; may be repeated."),
    ] = None,
    json: Json = False,
) -> None:
    """Run a stream file: train, remember, learn the coefficients, merge, evaluate; then write the report.

    What is there already is not computed again: after a kill, Ctrl-C or a change of the file, run the same command.

    Example: loralloy continual run examples/continual/demo.yaml
    """
    import dataclasses

    from ..continual.experience import DomainStream
    from ..continual.run import run as run_stream

    found = DomainStream.load(stream)
    if only:
        found = found.only(only)
    if out is not None:
        fields = found.fields.model_copy(update={"out": str(out.absolute())})
        found = dataclasses.replace(found, fields=fields)
    run_stream(found)
    _report(found.out, json)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="FOLDER", show_default=False)],
    json: Json = False,
) -> None:
    """Print the tables of a run, also of one that is not finished, and write its report and plots anew.

    Example: loralloy continual show .assets/continual/demo
    """
    _report(folder, json)


def _report(folder: Path, json: bool) -> None:
    from ..console import console, out
    from ..continual.report import print_tables, write_report
    from ..continual.results import Results

    results = Results.load(folder)
    written = write_report(results)
    if json:
        import json as json_

        out.print_json(json_.dumps(results.to_dict()))
    else:
        print_tables(results)
        console.print(f"report: {written}", markup=False, soft_wrap=True)
