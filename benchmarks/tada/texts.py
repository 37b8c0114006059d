"""A domain's text for language modelling: the inputs of its training rows, and nothing else of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loralloy.atomic import atomic_file
from loralloy.tasks.task import Task


def inputs(task: Task, limit: int | None = None) -> list[str]:
    """The texts of training rows: columns alone, without hint, prefix, cue, options or answer; white space made even."""
    found = (" ".join(example.raw.split()) for example in task.examples("train", limit))
    return list(dict.fromkeys(text for text in found if len(text.split()) > 1))


def as_task(name: str, texts: list[str], file: Path) -> Task:
    """A task whose prompt is a text without its last word, which is the answer: under loss `full_text` every token but the first
    is learned, and what is tokenized is the text (a word begins with the space before it)."""
    rows = [dict(zip(("text", "last"), text.rsplit(" ", 1), strict=True)) for text in texts]
    atomic_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    fields: dict[str, Any] = {
        "version": 1, "name": name, "columns": [{"name": "text"}], "cue": "", "answer": "last",
        "source": {"path": file.name, "repeats": "drop"}, "splits": {"test": 0, "validation": 0, "train": None, "seed": 0},
    }  # fmt: skip
    return Task.from_dict(fields, file.with_suffix(".yaml"))
