"""`loralloy evaluate`: the table of base, own adapter, routed and uniform composition on held-out examples."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

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
    K,
    Kernel,
    ModelOption,
    OptionalPath,
    P,
    SameBase,
    Temperature,
    load_bank,
    load_model,
)  # fmt: skip

if TYPE_CHECKING:
    from ..answer import Answerer
    from ..bank import Bank
    from ..evaluation.compare import Comparison
    from ..tasks import Example, Task

TASKS = "examples/tasks"


def evaluate(
    tasks: Annotated[
        str, typer.Option("--tasks", help="Task files; those with an adapter in the bank are used.")
    ] = TASKS,
    bank: BankOption = BANK,
    index: IndexOption = INDEX,
    model: ModelOption = MODEL,
    examples: Annotated[int, typer.Option("--examples", "-n", min=1, help="Held-out examples in all.")] = 1000,
    k: K = 100,
    p: P = 0.9,
    kernel: Kernel = "exp",
    temperature: Temperature = 1.0,
    dtype: DtypeOption = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a forward pass.")] = 16,
    write: Annotated[OptionalPath, typer.Option(help="Also write report.md, report.json and report.png here.")] = None,
    assume_same_base: SameBase = False,
    json: Json = False,
) -> None:
    """Compare base model, own adapter, routed and uniform composition on held-out examples, with 95 % intervals.

    Example: loralloy evaluate --examples 1000 --write docs/results
    """
    from ..answer import Answerer
    from ..console import out as stdout
    from ..evaluation.compare import pick_examples
    from ..evaluation.report import write as write_report
    from .ask import open_router

    if write is not None and importlib.util.find_spec("matplotlib") is None:  # before minutes of work
        raise LoralloyError("--write draws a picture, which needs matplotlib: pip install 'loralloy[plots]'")
    adapters = load_bank(bank, assume_same_base)
    given = with_adapter(tasks, adapters)
    rows = pick_examples(given, examples)
    router = open_router(index, adapters, k, p, kernel, temperature)
    router.index.check_template(given)
    loaded, tokenizer, base = load_model(model, dtype)
    comparison, summary = table(Answerer(loaded, tokenizer, adapters, router, base), given, rows, batch_size)
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
    from ..evaluation.report import HEADINGS

    with progress() as bar:
        line = bar.add_task("", total=len(SYSTEMS) * len(rows))

        def advance(system: str, n: int) -> None:
            bar.update(line, advance=n, description=HEADINGS[system])

        comparison = compare(answerer, tasks, rows, batch_size=batch_size, progress=advance)
    return comparison, comparison.summary()


def show(comparison: Comparison, summary: dict[str, Any]) -> None:
    from ..console import out as stdout
    from ..evaluation.report import difference_lines, terminal_table

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
