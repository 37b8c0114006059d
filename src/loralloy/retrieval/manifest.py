"""The manifest: which tasks count in an index, and what they were made from. Written last, as one file, atomically."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import atomic_file
from ..errors import LoralloyError

if TYPE_CHECKING:
    from ..tasks.task import Task

VERSION = 1
NAME = "manifest.json"
TEMPLATES = ("both", "hinted", "raw")
STORES = ("chroma", "exact")


@dataclass(frozen=True)
class IndexedTask:
    """One committed task: where its rows come from, and its text template, so that a query can be put in its form.

    `rows` examples, of at most `limit` taken with `seed`, kept as `vectors` vectors (template "both": up to two a row);
    `content_hash` of the stored ids and texts; `template_hash` as the task file had it; then the task's own fields
    (`labels` is None when the options are in column `options`).
    """

    name: str
    rows: int
    limit: int
    seed: int
    template_hash: str
    content_hash: str
    family: str = ""
    hint: str = ""
    columns: tuple[tuple[str, str], ...] = ()  # (name, prefix)
    separator: str = "\n"
    cue: str = ""
    answer: str = ""
    labels: tuple[str, ...] | None = None
    options: str | tuple[str, ...] | None = None
    vectors: int = 0

    def __post_init__(self) -> None:
        if not self.vectors:  # a manifest from before "both"
            object.__setattr__(self, "vectors", self.rows)

    @staticmethod
    def of(task: Task, rows: int, limit: int, seed: int, content_hash: str, vectors: int = 0) -> IndexedTask:
        """The entry of a :class:`loralloy.tasks.Task`."""
        return IndexedTask(
            name=task.name,
            rows=rows,
            limit=limit,
            seed=seed,
            template_hash=task.template_hash(),
            content_hash=content_hash,
            family=task.family or "",
            hint=task.hint or "",
            columns=tuple((column.name, column.prefix or "") for column in task.columns),
            separator=task.separator,
            cue=task.cue or "",
            answer=task.answer,
            labels=tuple(task.labels) if task.labels else None,
            options=task.options or None,
            vectors=vectors,
        )

    def to_task(self) -> Task:
        """The task without its data: enough to render a row or to scaffold a text, as the task file itself would."""
        from ..tasks.task import Task

        fields: dict[str, Any] = {
            "version": 1,
            "name": self.name,
            "family": self.family,
            "hint": self.hint,
            "columns": [{"name": name, "prefix": prefix} for name, prefix in self.columns],
            "separator": self.separator,
            "cue": self.cue,
            "answer": self.answer,
            "source": {"path": "not in the index"},
        }
        if self.labels:
            fields["labels"] = list(self.labels)
        if self.options:
            fields["options"] = self.options
        return Task.from_dict(fields)

    def scaffold(self, text: str) -> str:
        """A user's text as a prompt of this task (``Task.scaffold``); LoralloyError when it has several columns."""
        return self.to_task().scaffold(text)


@dataclass
class Manifest:
    """What an index is: its store, its embedder (`identity`, compared; `name`, shown), its text template, its tasks."""

    store: str
    embedder: str
    dimension: int
    template: str
    tasks: dict[str, IndexedTask] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        data: dict[str, Any] = {
            "version": VERSION,
            "store": self.store,
            "embedder": {"identity": self.embedder, "dimension": self.dimension},
            "template": self.template,
            "tasks": {},
        }
        for name in sorted(self.tasks):
            entry = asdict(self.tasks[name])
            entry.pop("name")
            if entry["vectors"] == entry["rows"]:
                entry.pop("vectors")
            data["tasks"][name] = entry
        atomic_file(folder / NAME, json.dumps(data, indent=2, ensure_ascii=False) + "\n")

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Raises LoralloyError naming the file and the field when there is no index, or not one that can be read."""
        path = folder / NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise LoralloyError(f"{folder}: no index here; build one with `loralloy index TASKS -o {folder}`") from None
        except (OSError, ValueError) as error:
            raise LoralloyError(f"{path}: not readable ({error}); build the index again with --overwrite") from None
        found = data.get("version") if isinstance(data, dict) else type(data).__name__
        if found != VERSION:
            raise LoralloyError(
                f"{path}: expected `version: {VERSION}`, found {found!r}; build the index again with --overwrite"
            )
        try:
            tasks = {}
            for name, entry in data["tasks"].items():
                entry = dict(entry)
                entry["columns"] = tuple((column, prefix) for column, prefix in entry.get("columns", ()))
                entry["labels"] = tuple(entry["labels"]) if entry.get("labels") else None
                tasks[name] = IndexedTask(name=name, **entry)
            manifest = Manifest(
                data["store"], data["embedder"]["identity"], int(data["embedder"]["dimension"]), data["template"], tasks
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise LoralloyError(
                f"{path}: a field is missing or wrong ({reason}); build it again with --overwrite"
            ) from None
        check_choice("store", manifest.store, STORES, path)
        check_choice("template", manifest.template, TEMPLATES, path)
        return manifest


def check_choice(name: str, value: str, known: tuple[str, ...], where: object = "") -> None:
    if value not in known:
        raise LoralloyError(f"{where}{': ' if where else ''}{name} is {value!r}; known: {', '.join(known)}")
