"""`loralloy balance`: an adapter whose answers all lean to one side, evened out over unlabelled texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import LoralloyError
from .common import DtypeOption, Json, OptionalPath, SameBase, load_model


def balance(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder or org/name@revision.")],
    model: Annotated[
        str, typer.Option("--model", "-m", envvar="LORALLOY_MODEL", help="Base model: folder or org/name@revision.")
    ],
    task: Annotated[Path, typer.Option(help="Task file with labels: its prompts are asked, its labels answer.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    calibration: Annotated[
        OptionalPath,
        typer.Option(
            "--calibration",
            "-c",
            help="Texts (.jsonl, .csv, .tsv, .parquet); no labels are read. Without it: the task's training rows.",
        ),
    ] = None,
    inputs: Annotated[int, typer.Option(min=2, help="How many texts are drawn.")] = 32,
    column: Annotated[str, typer.Option(help="The column of --calibration that holds the text.")] = "text",
    seed: Annotated[int, typer.Option(help="Of the texts drawn.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts of one forward.")] = 8,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a text of --calibration that are read.")] = 512,
    module: Annotated[str, typer.Option(help="Where; by default the last module that can take it.")] = "",
    model_dtype: DtypeOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")] = False,
    assume_same_base: SameBase = False,
    json: Json = False,
) -> None:
    """Even out an adapter's answers without labels: a merged adapter often knows the classes and calls most texts the same.

    The mean shift of the answers' log-probabilities over the texts is folded into one module of the adapter, at the same rank.
    It takes the classes to be about equally frequent in the texts. Causal language models; others in Python.

    Example: loralloy balance merged -m MODEL --task examples/tasks/sentiment_tweets.yaml -o balanced
    """
    from ..bank import Bank
    from ..console import out as stdout
    from ..console import progress
    from ..live.fit import check_base
    from ..recipe.job import check_out
    from ..weighting.balance import PASSES, marked, shift, text_directions
    from ..weighting.balance import balance as even_out
    from ..weighting.levels import text_answers

    check_out(out.absolute(), overwrite)
    bank = Bank.load([adapter], assume_same_base)
    found = bank[bank.names[0]]
    labels, prompts = _asked(task, calibration, column, inputs, seed)
    loaded, tokenizer, base = load_model(model, model_dtype)
    if not assume_same_base:
        check_base(bank, base, loaded)
    if calibration is not None:
        prompts = _shortened(task, tokenizer, prompts, max_length)
    run = text_answers(loaded, tokenizer, prompts, [labels] * len(prompts), batch_size)
    # of every pass: the largest shift, and how often each answer is the likeliest
    seen: list[tuple[float, list[float]]] = []

    def answers() -> Any:
        logp = run()
        counts = logp.argmax(1).bincount(minlength=len(labels))
        seen.append((float(shift(logp).abs().max()), (counts / len(logp)).tolist()))
        return logp

    directions = text_directions(loaded, tokenizer, labels)
    with progress() as bar:
        job = bar.add_task("balance", total=PASSES)
        done = even_out(loaded, found, answers, directions, module=module or None, on_pass=lambda: bar.advance(job))
    marked(done, out.name, inputs=len(prompts)).save(out, overwrite=overwrite)
    first, last = seen[0][1], min(seen)[1]
    data = {
        "adapter": adapter, "inputs": len(prompts), "module": done.module, "passes": done.passes,
        "shift": {"before": done.before, "after": done.after},
        "answers": {label: {"before": a, "after": b} for label, a, b in zip(labels, first, last, strict=True)},
        "rank": done.adapter.max_rank, "written": str(out),
    }  # fmt: skip
    if json:
        stdout.print_json(data=data)
        return
    _show(data, stdout)


def _asked(
    path: Path, calibration: Path | None, column: str, inputs: int, seed: int
) -> tuple[tuple[str, ...], list[str]]:
    """The task's labels, and the texts: prompts of its training rows, or the texts of a file as they are."""
    import random

    from ..tasks.task import Task
    from .tada import draw_texts

    task = Task.load(path)
    if len(task.labels or ()) < 2:
        raise LoralloyError(f"--task {path}: the task has no labels, so there are no answers to even out")
    labels = tuple(task.labels or ())
    if calibration is not None:
        texts = draw_texts(calibration, column, inputs, seed)
        where = str(calibration)
    else:
        rows = [e.prompt for e in task.examples("train")]
        texts = rows if len(rows) <= inputs else random.Random(seed).sample(rows, inputs)
        where = f"--task {path}"
    if len(texts) < 2:
        raise LoralloyError(f"a balance compares the answers to at least two texts; {where} gave {len(texts)}")
    return labels, texts


def _shortened(path: Path, tokenizer: Any, texts: list[str], most: int) -> list[str]:
    """Texts as the task asks them, each cut to so many tokens."""
    from ..tasks.task import Task
    from .tada import shortened

    task = Task.load(path)
    try:
        return [task.scaffold(shortened(tokenizer, text, most)) for text in texts]
    except LoralloyError as error:
        raise error.within("--calibration") from None


def _show(data: dict[str, Any], stdout: Any) -> None:
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    for title in ("answer", "before", "after"):
        made.add_column(title, justify="left" if title == "answer" else "right")
    for label, found in data["answers"].items():
        made.add_row(label, f"{found['before']:.0%}", f"{found['after']:.0%}")
    stdout.print(f"likeliest answers to {data['inputs']} texts:", markup=False)
    stdout.print(made)
    shift = data["shift"]
    if shift["before"] == shift["after"]:
        said = f"the largest shift is {shift['before']:.3f} nats: nothing to even out; the adapter is written as it is"
    else:
        said = f"largest shift {shift['before']:.2f} nats, now {shift['after']:.3f}; at {data['module']}, {data['passes']} passes"
    stdout.print(said, markup=False, soft_wrap=True)
    stdout.print(f"wrote {data['written']}", markup=False, soft_wrap=True)
