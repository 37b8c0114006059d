"""`loralloy demo`: the main job on the shipped bank: real questions routed, composed and answered, then the table."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from .common import BANK, INDEX, MODEL, BankOption, DtypeOption, IndexOption, ModelOption, load_bank, load_model
from .evaluate import TASKS, show, table, with_adapter


def demo(
    tasks: Annotated[str, typer.Option("--tasks", help="Task files.")] = TASKS,
    bank: BankOption = BANK,
    index: IndexOption = INDEX,
    model: ModelOption = MODEL,
    rows: Annotated[int, typer.Option(help="Training rows a task to index, if the index is not there yet.")] = 300,
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions to show.")] = 12,
    examples: Annotated[int, typer.Option("--examples", "-n", min=1, help="Held-out examples in the table.")] = 200,
    dtype: DtypeOption = "auto",
) -> None:
    """Index the tasks, ask held-out questions of different tasks, and compare four ways to answer. `make demo` runs it.

    Example: loralloy demo --questions 20
    """
    from rich.text import Text

    from ..answer import Answerer
    from ..console import out as stdout
    from ..evaluation.compare import pick_examples
    from ..retrieval import Index
    from .ask import open_router
    from .ask import show as show_answer

    start = time.perf_counter()
    adapters = load_bank(bank)
    given = with_adapter(tasks, adapters)
    stdout.rule(f"1. index: {len(given)} tasks, {rows} training rows each, never an answer")
    if not {task.name for task in given} <= indexed(index):  # one that is there may hold more rows: keep it
        Index.build(index, given, rows=rows, progress=True).close()
    router = open_router(index, adapters)
    router.index.check_template(given)
    stdout.print(f"{len(router.index)} examples of {len(router.index.names)} tasks in {index}", markup=False)

    loaded, tokenizer, base = load_model(model, dtype)
    answerer = Answerer(loaded, tokenizer, adapters, router, base)
    shown = pick_examples(given, questions)
    stdout.rule(f"2. {len(shown)} held-out questions: route, compose, answer")
    for example in shown:
        answer = answerer.ask(example.query, example.options)
        show_answer(answer)
        right = answer.text == example.answer
        mark = ("right", "green") if right else Text.assemble(("wrong", "red"), f", it is {example.answer}")
        took = f"{answer.seconds['route'] * 1000:.0f} ms to route, {answer.seconds['answer'] * 1000:.0f} to answer"
        stdout.print(Text.assemble(mark, f"  ({took})\n"))

    skip = -(-questions // len(given))  # the table's examples are not the ones just shown
    held_out = pick_examples(given, examples, skip)
    stdout.rule(f"3. the same {len(held_out)} held-out examples, answered six ways")
    comparison, summary = table(answerer, given, held_out)
    show(comparison, summary)
    stdout.print(f"took {time.perf_counter() - start:.0f} s", style="dim")


def indexed(folder: str) -> set[str]:
    """The tasks of an index, none if there is no index yet."""
    from pathlib import Path

    from ..retrieval.manifest import NAME, Manifest

    return set(Manifest.load(Path(folder)).tasks) if (Path(folder) / NAME).is_file() else set()
