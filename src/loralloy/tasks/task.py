"""A task: a data file, a text template and splits, described by one YAML file (``version: 1``).

Retrieval, training and evaluation all read tasks through :meth:`Task.examples`, so they agree on every prompt. The
template is the scaffolding of the retrieval paper: a hint, the columns joined by a separator, and a response cue.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from ..console import console
from ..errors import LoralloyError
from .cells import check_options, kind
from .rows import load, texts_of
from .schema import Column, Source, Splits, Strict, explain
from .splits import SPLITS, Row

VERSION = 1
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Example:
    """One row of a task, rendered."""

    id: str
    """``<task>/<split>/<n>``, stable as long as the data and the splits are."""
    task: str
    prompt: str
    """Hint, columns and cue: all before the answer, no white space at its end; the answer follows as " " + answer."""
    query: str
    """What retrieval embeds (template "hinted"): hint and columns; no cue, never the answer."""
    raw: str
    """The columns' texts alone: what a user types (template "raw")."""
    answer: str
    """The gold answer's text."""
    options: tuple[str, ...]
    """The task's labels, or this row's own options; empty for free text."""
    references: tuple[str, ...] = ()
    """All right answers where the row has several, the gold one first; else empty."""


class Rendered(NamedTuple):
    prompt: str
    query: str
    raw: str


class Task(Strict):
    """A task file. It has `labels` (a closed set), `options` (each row's own), or neither (free text).

    `values` are the data's own names of the labels (``{"0": "negative"}``); `labels` given as a mapping fills both.
    `answer_as` says whether the answer column holds the text, or an index (from 0), number (from 1) or letter (from A)
    of the labels or options. Column names may be paths (``choices.text``, ``endings.0``).
    """

    version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=80)]
    family: str = ""
    hint: str = ""
    columns: Annotated[tuple[Column, ...], Field(min_length=1)]
    separator: str = "\n"
    cue: str = "Answer:"
    answer: Annotated[str, Field(min_length=1)]
    labels: tuple[str, ...] = ()
    values: Mapping[str, str] = Field(default_factory=dict)
    options: str | tuple[str, ...] | None = None
    answer_as: Literal["text", "index", "number", "letter"] = "text"
    source: Source
    splits: Splits = Splits()
    licence: str = ""
    data_source: Annotated[str, Field(alias="data")] = ""

    _path: Path | None = PrivateAttr(default=None)
    _rows: dict[str, list[Row]] | None = PrivateAttr(default=None)
    _remarks: tuple[str, ...] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        names = [column.name for column in self.columns]
        if len(set(names)) < len(names):
            raise ValueError("`columns` names a column twice")
        if self.answer in names:
            raise ValueError(
                f"the answer column {self.answer!r} is also in `columns`: prompts would hold it; remove it there"
            )
        if self.labels and self.options is not None:
            raise ValueError(
                "`labels` and `options` are both given; keep one (a closed set, or a column of each row's own)"
            )
        if isinstance(self.options, str) and self.options in [*names, self.answer]:
            raise ValueError(f"the options column {self.options!r} is also used as a text or answer column")
        if isinstance(self.options, tuple):
            check_options(self.options, "`options` (a list of columns)")
        if self.answer_as != "text" and (self.values or not (self.labels or self.options)):
            raise ValueError(f"`answer_as: {self.answer_as}` needs `labels` as a list, or `options`")
        if set(self.values.values()) - set(self.labels):
            raise ValueError("`values` maps to a name that is not in `labels`")
        if self.source.own is None and None in (self.splits.test, self.splits.validation):
            raise ValueError(
                "`splits.test` and `splits.validation` are numbers, unless the source has splits of its own"
            )
        if self.labels:
            check_options(self.labels, "`labels`")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Task:
        """Read a task file; its data is read on the first call of :meth:`examples`.

        Raises LoralloyError, naming the file and every field that is wrong, when it is not a task file of version 1.
        """
        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise LoralloyError(f"{path}: no such task file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise LoralloyError(f"{path}: cannot be read ({error})") from error
        except yaml.YAMLError as error:
            raise LoralloyError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
        return cls.from_dict(data, path)

    @classmethod
    def from_dict(cls, data: Any, path: str | os.PathLike[str] | None = None) -> Task:
        """A task from what a task file holds; `path` is what errors name and what `source.path` is relative to."""
        where = str(path) if path is not None else "task"
        if not isinstance(data, dict):
            raise LoralloyError(f"{where}: a task file is a mapping (`name: ...`), not {kind(data)}")
        version = data.get("version")
        if version is None:
            raise LoralloyError(f"{where}: no `version`; add `version: {VERSION}` as its first line")
        if type(version) is not int or version != VERSION:
            raise LoralloyError(
                f"{where}: version {version!r} is not known to this loralloy (it reads version {VERSION}); "
                "upgrade loralloy, or rewrite the file as docs/tasks.md describes"
            )
        if isinstance(data.get("labels"), dict):
            names = list(data["labels"].values())
            unique = [name for n, name in enumerate(names) if name not in names[:n]]
            data = {**data, "labels": unique, "values": data["labels"]}
        try:
            task = cls.model_validate_json(json.dumps(data, default=str))
        except ValidationError as error:
            raise LoralloyError(f"{where}: " + "; ".join(explain(cls, item) for item in error.errors())) from None
        task._path = Path(path) if path is not None else None
        return task

    @property
    def path(self) -> Path | None:
        """The task file, or None for a task that was built in code."""
        return self._path

    @property
    def data_path(self) -> Path:
        """The one data file, with `source.path` taken relative to the task file. Raises LoralloyError if it has none."""
        if self.source.path is None:
            raise LoralloyError(f"task {self.name!r} has no `source.path`")
        return self.file(self.source.path)

    def file(self, path: str) -> Path:
        """A path of `source`, taken relative to the task file."""
        base = self._path.parent if self._path is not None else Path()
        return Path(os.path.normpath(base / path))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What `source.repeats: drop` left out, with numbers; known once rows have been read."""
        return self._remarks

    def to_dict(self) -> dict[str, Any]:
        """What the YAML file holds, defaults filled in; ``Task.from_dict`` reads it back."""
        return self.model_dump(mode="json", by_alias=True)

    def template_hash(self) -> str:
        """sha256 (hex) of hint, columns, separator and cue. An index built with another template is refused by it."""
        template = [self.hint, [[column.name, column.prefix] for column in self.columns], self.separator, self.cue]
        return hashlib.sha256(json.dumps(template, ensure_ascii=True).encode()).hexdigest()

    def examples(self, split: Split, limit: int | None = None) -> list[Example]:
        """The rendered rows of one split, in hash order; `limit` takes the first so many.

        Raises LoralloyError for an unknown split and for everything :meth:`rows` does.
        """
        if split not in SPLITS:
            raise LoralloyError(f"task {self.name!r}: no split {split!r}; there are {', '.join(SPLITS)}")
        if limit is not None and limit < 0:
            raise LoralloyError(f"task {self.name!r}: limit is {limit}; it counts rows, from 0 on")
        names = [column.name for column in self.columns]
        out = []
        for n, row in enumerate(self.rows()[split][:limit]):
            prompt, query, raw = self.render(dict(zip(names, row.texts, strict=True)))
            options = self.labels or row.options
            name = f"{self.name}/{split}/{n}"
            out.append(Example(name, self.name, prompt, query, raw, row.answer, options, row.references))
        return out

    def rows(self) -> dict[str, list[Row]]:
        """The checked rows of all splits; the data is read once. What is left out on demand is said on stderr.

        Raises LoralloyError for missing data, an unknown column, an empty text, an answer outside the labels or options,
        one text with two answers or in two of the source's own splits, and too few rows.
        """
        if self._rows is None:
            try:
                self._rows, remarks = load(self)
            except LoralloyError as error:
                raise error.within(f"task {self.name!r}") from error
            self._remarks = tuple(remarks)
            for remark in remarks:
                console.print(f"task {self.name}: {remark}", markup=False)
        return self._rows

    def render(self, row: Mapping[str, Any]) -> Rendered:
        """(prompt, query, raw) of one row; only the text columns are looked at, so no answer can slip in.

        Raises LoralloyError when a column is missing, not text, or empty.
        """
        texts = texts_of(self, row, f"task {self.name!r}")
        shown = [column.prefix + text for column, text in zip(self.columns, texts, strict=True)]
        query = self.separator.join([*([self.hint] if self.hint else []), *shown])
        prompt = (self.separator.join([query, self.cue]) if self.cue else query).rstrip()
        return Rendered(prompt, query, self.separator.join(texts))

    def scaffold(self, text: str) -> str:
        """A user's free text as a prompt of this task; a hint, prefix or cue that the text already has is not repeated.

        Raises LoralloyError when the text is empty or the task has several columns.
        """
        if len(self.columns) != 1:
            names = ", ".join(repr(column.name) for column in self.columns)
            raise LoralloyError(
                f"task {self.name!r} has {len(self.columns)} columns ({names}); use Task.render with each by name"
            )
        column = self.columns[0]
        text = text.strip()
        for part in (self.hint.strip(), column.prefix.strip()):
            if part and text.casefold().startswith(part.casefold()):
                text = text[len(part) :].strip()
        if self.cue.strip() and text.casefold().endswith(self.cue.strip().casefold()):
            text = text[: -len(self.cue.strip())].strip()
        if not text:
            raise LoralloyError(f"task {self.name!r}: the text is empty; give the {column.name} to answer about")
        return self.render({column.name: text}).prompt


def load_tasks(folder_or_files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Task]:
    """Tasks from a folder's ``*.yaml`` and ``*.yml`` files (by file name), from one file, or from several of either.

    Raises LoralloyError when a folder holds no task file and when two tasks have one name.
    """
    if isinstance(folder_or_files, (str, os.PathLike)):
        folder_or_files = [folder_or_files]
    files: list[Path] = []
    for entry in map(Path, folder_or_files):
        if entry.is_dir():
            found = sorted(p for p in entry.iterdir() if p.suffix in (".yaml", ".yml") and not p.name.startswith("."))
            if not found:
                raise LoralloyError(f"{entry}: no task files (*.yaml) in this folder")
            files += found
        else:
            files.append(entry)
    if not files:
        raise LoralloyError("no task files given; name YAML files or a folder that holds them")
    tasks = [Task.load(file) for file in files]
    seen: dict[str, Path] = {}
    for task, file in zip(tasks, files, strict=True):
        if task.name in seen:
            raise LoralloyError(f"{file}: the task name {task.name!r} is taken by {seen[task.name]}; rename one")
        seen[task.name] = file
    return tasks
