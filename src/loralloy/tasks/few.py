"""A few examples to learn weights from: a file of them, or a balanced draw from task files' training rows."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from pathlib import Path

from ..errors import LoralloyError
from .cells import cell, row_options
from .sources import read_rows
from .task import Example, load_tasks

COLUMNS = ("prompt", "answer", "options", "domain")


def read_few(path: str | os.PathLike[str], labelled: bool = True) -> list[Example]:
    """The examples of a ``.jsonl`` file (or ``.csv``, ``.tsv``, ``.parquet``), one a row, in order.

    ``prompt`` is sent as it is; ``answer`` is the right one; ``options`` (a list) are what may be answered, where the set is
    closed; ``domain`` says which kind of example it is, such as the name of the adapter that was trained for it. With
    `labelled` false the answer may be left out.

    Raises LoralloyError, naming file and line, for no rows, an unknown column, an empty prompt or answer, options that are
    not distinct texts, an answer outside them, and a domain that some rows have and others have not.
    """
    path = Path(path)
    if not path.is_file():
        raise LoralloyError(f"{path}: no such file of examples")
    examples: list[Example] = []
    for line, row in read_rows(path):
        where = f"{path}, line {line}"
        if unknown := [name for name in row if name not in COLUMNS]:
            raise LoralloyError(f"{where}: unknown column {unknown[0]!r}; its columns are {', '.join(COLUMNS)}")
        prompt = cell(row, "prompt", where).rstrip()
        if not prompt.strip():
            raise LoralloyError(f"{where}: the prompt is empty; fill it or remove the row")
        given = row.get("options")
        options = row_options(row, "options", where) if given not in (None, "", []) else ()
        answer = cell(row, "answer", where).strip() if labelled or row.get("answer") is not None else ""
        if labelled and not answer:
            raise LoralloyError(f"{where}: the answer is empty; fill it or remove the row")
        if answer and options and answer not in options:
            raise LoralloyError(f"{where}: the answer {answer!r} is not among the options ({', '.join(options)})")
        domain = cell(row, "domain", where).strip() if "domain" in row else ""
        if examples and bool(domain) != bool(examples[0].task):
            raise LoralloyError(f"{where}: some rows have a domain and others have none; give one to each, or to none")
        examples.append(Example(f"{path.name}/{line}", domain, prompt, prompt, prompt, answer, options))
    if not examples:
        raise LoralloyError(f"{path} holds no examples; give at least one row with prompt and answer")
    return examples


def draw_few(
    tasks: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], per_class: int = 1, seed: int = 0
) -> list[Example]:
    """`per_class` training rows of each label of each task; of a task without a closed set of labels so many rows in all.

    The draw is a function of the seed and the task's own rows: another task beside it does not change it.

    Raises LoralloyError for fewer rows of a label than are asked for, and what :func:`load_tasks` raises.
    """
    if per_class < 1:
        raise LoralloyError(f"per_class is {per_class}; give at least 1 row a class")
    drawn = []
    for task in load_tasks(tasks):
        by_class: dict[str, list[Example]] = {label: [] for label in task.labels} or {"": []}
        for example in task.examples("train"):
            by_class[example.answer if task.labels else ""].append(example)
        for label, rows in by_class.items():
            if len(rows) < per_class:
                of = f" of class {label!r}" if label else ""
                raise LoralloyError(
                    f"task {task.name!r} has {len(rows)} training rows{of}, fewer than {per_class}; ask for fewer a class"
                )
            drawn += random.Random(f"{seed}/{task.name}/{label}").sample(rows, per_class)
    return drawn
