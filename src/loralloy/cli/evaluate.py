"""`loralloy evaluate`: a suite of methods, or the small comparison on the demo's bank; held-out examples in both."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import LoralloyError
from .common import (
    BANK,
    INDEX,
    MODEL,
    BankOption,
    DtypeOption,
    IndexOption,
    Json,
    Kernel,
    ModelOption,
    OptionalPath,
    SameBase,
    load_bank,
    load_model,
)  # fmt: skip
from .route import KOption, POption, RouterOption, TemperatureOption

if TYPE_CHECKING:
    from ..answer import Answerer
    from ..bank import Bank
    from ..evaluation.compare import Comparison
    from ..tasks import Example, Task

TASKS = "examples/tasks"


SUITE_FLAGS = ("only", "rows", "shard", "jobs", "out")
COMPARISON_FLAGS = (
    "tasks", "bank", "index", "model", "examples", "router", "k", "p", "kernel", "temperature", "dtype", "write",
    "assume_same_base",
)  # fmt: skip


def evaluate(
    context: typer.Context,
    suite: Annotated[
        OptionalPath, typer.Argument(help="A suite file (YAML). Without one: the small comparison on the demo's bank.")
    ] = None,
    only: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--only", help="Suite: these methods alone; repeat it, or separate names with commas."),
    ] = None,
    rows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--rows", min=1, help="Suite: at most so many test rows a task, for a quick look (in a folder of its own)."
        ),
    ] = None,
    shard: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--shard", help="Suite: i/n, the i-th of n parts, for machines that share --out."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Suite: processes side by side.")] = 1,
    out: Annotated[
        OptionalPath, typer.Option("--out", "-o", help="Suite: folder of cells, instead of its own.")
    ] = None,
    tasks: Annotated[
        str, typer.Option("--tasks", help="Task files; those with an adapter in the bank are used.")
    ] = TASKS,
    bank: BankOption = BANK,
    index: IndexOption = INDEX,
    model: ModelOption = MODEL,
    examples: Annotated[int, typer.Option("--examples", "-n", min=1, help="Held-out examples in all.")] = 1000,
    router: RouterOption = "auto",
    k: KOption = None,
    p: POption = None,
    kernel: Kernel = "exp",
    temperature: TemperatureOption = None,
    dtype: DtypeOption = "auto",
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Examples a forward pass: 16, or the suite's."),
    ] = None,
    write: Annotated[OptionalPath, typer.Option(help="Also write report.md, report.json and report.png here.")] = None,
    assume_same_base: SameBase = False,
    json: Json = False,
) -> None:
    """Run a suite of methods by tasks, or compare base model, own adapter, routed and uniform composition.

    A suite's cells are kept: run it again after a stop and it goes on where it was.

    Example: loralloy evaluate examples/suite/demo-suite.yaml --jobs 2
    Example: loralloy evaluate --examples 1000 --write docs/results
    """
    wrong = COMPARISON_FLAGS if suite is not None else SUITE_FLAGS
    for name in wrong:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = "--" + name.replace("_", "-")
            if suite is None:
                raise LoralloyError(f"{flag} is for a suite; name its file: loralloy evaluate SUITE.yaml {flag} ...")
            raise LoralloyError(f"{flag} is for the comparison without a suite; set it in {suite}, or leave it out")
    if suite is not None:
        run(suite, only, rows, shard, jobs, out, batch_size, json)
        return
    compare(tasks, bank, index, model, examples, router, k, p, kernel, temperature, dtype, batch_size or 16, write,
            assume_same_base, json)  # fmt: skip


def run(
    path: Path, only: list[str] | None, rows: int | None, shard: str | None, jobs: int, out: Path | None,
    batch_size: int | None, json: bool,
) -> None:  # fmt: skip
    """Run a suite and show its averages."""
    from ..console import console
    from ..console import out as stdout
    from ..evaluation.suite import Results, Suite, overridden, parse_shard, run_suite, terminal_tables
    from ..evaluation.suite.cells import cells_of
    from ..evaluation.suite.schema import DEFAULT
    from ..tasks import load_tasks

    suite = Suite.load(path)
    cut = {name: min(n, rows) for name, n in ({DEFAULT: rows} | suite.fields.rows).items()} if rows else None
    place = str(out.absolute()) if out else f"{suite.out}-rows{rows}" if rows else None  # a quick look replaces no cell
    suite = overridden(suite, rows=cut, out=place, batch_size=batch_size)
    if only:
        suite = suite.only([name.strip() for entry in only for name in entry.split(",") if name.strip()])
    ran = run_suite(suite, shard=parse_shard(shard) if shard else None, jobs=jobs)
    console.print(
        f"{ran.made} cells made, {ran.kept} there already, in {ran.seconds:.0f} s: {ran.out / 'cells'}",
        style="dim", markup=False, soft_wrap=True,
    )  # fmt: skip
    if shard:
        return
    results = Results.load(ran.out, load_tasks(suite.fields.tasks), {cell.name for cell in cells_of(suite)})
    if json:
        stdout.print_json(data=results.to_dict())
        return
    fields = suite.fields
    for table in terminal_tables(results, [m.name for m in suite.methods], fields.queries, fields.scopes):
        stdout.print(table, "")


def compare(
    tasks: str, bank: str, index: str, model: str, examples: int, router: str, k: int | None, p: float | None,
    kernel: str, temperature: float | None, dtype: str, batch_size: int, write: Path | None, assume_same_base: bool,
    json: bool,
) -> None:  # fmt: skip
    """The comparison of the demo's bank."""
    from ..answer import Answerer
    from ..console import out as stdout
    from ..evaluation.compare import pick_examples
    from ..evaluation.compare_page import write as write_report
    from .ask import open_router

    if write is not None and importlib.util.find_spec("matplotlib") is None:  # before minutes of work
        raise LoralloyError("--write draws a picture, which needs matplotlib: pip install 'loralloy[plots]'")
    adapters = load_bank(bank, assume_same_base)
    given = with_adapter(tasks, adapters)
    rows = pick_examples(given, examples)
    opened = open_router(index, adapters, k, p, kernel, temperature, router)
    opened.index.check_template(given)
    loaded, tokenizer, base = load_model(model, dtype)
    comparison, summary = table(Answerer(loaded, tokenizer, adapters, opened, base), given, rows, batch_size)
    if json:
        stdout.print_json(data=summary)
    else:
        show(comparison, summary)
    if write:
        command = shlex.join(["loralloy", *sys.argv[1:]])
        notes = [f"Model loaded in {str(next(loaded.parameters()).dtype).removeprefix('torch.')}; {versions()}."]
        write_report(comparison, summary, write, "report", "Routed composition on held-out examples", command, notes)


def with_adapter(tasks: str, bank: Bank) -> list[Task]:
    """The tasks of these files that have an adapter in the bank. Raises LoralloyError when none has."""
    from ..tasks import load_tasks

    loaded = load_tasks(tasks)
    if given := [task for task in loaded if task.name in bank]:
        return given
    raise LoralloyError(
        f"--tasks {tasks} holds {', '.join(task.name for task in loaded)} and --bank {', '.join(bank.names)}: no name in "
        "common. Adapters are found by the name of their task; rename the folders, or give the right tasks"
    )


def table(
    answerer: Answerer, tasks: list[Task], rows: list[Example], batch_size: int = 16
) -> tuple[Comparison, dict[str, Any]]:
    """Run the comparison under one progress bar for all systems."""
    from ..console import progress
    from ..evaluation.compare import SYSTEMS, compare
    from ..evaluation.compare_page import HEADINGS

    with progress() as bar:
        line = bar.add_task("", total=len(SYSTEMS) * len(rows))

        def advance(system: str, n: int) -> None:
            bar.update(line, advance=n, description=HEADINGS[system])

        comparison = compare(answerer, tasks, rows, batch_size=batch_size, progress=advance)
    return comparison, comparison.summary()


def show(comparison: Comparison, summary: dict[str, Any]) -> None:
    from ..console import out as stdout
    from ..evaluation.compare_page import difference_lines, terminal_table

    stdout.print(terminal_table(comparison, summary), "")
    for line in difference_lines(summary):
        stdout.print(line)
    routing = summary["routing"]
    stdout.print("; ".join(f"{name} {value:.2f}" for name, value in routing.items()), style="dim")


def versions() -> str:
    """The versions that a number depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("torch", "transformers", "peft", "chromadb", "sentence-transformers"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
