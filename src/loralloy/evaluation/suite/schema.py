"""A suite file (YAML, ``version: 1``): which model, adapters, tasks and methods, under which protocol."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ...errors import LoralloyError
from ...hub import parse_ref
from ...recipe.document import At, Document
from ...recipe.schema import named, suggest
from ...recipe.validation import validated, versioned
from .method import QUERIES, SCOPES, Method, Query, Scope, Strict, find_kind

VERSION = 1
DEFAULT = "default"
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


class IndexEntry(Strict):
    """The vector index, made once for each seed.

    rows: training rows a task. template: of the indexed texts; "match" takes that of the query (a hinted query among hinted
    rows, a raw one among raw rows); "both" indexes each row in both forms. embedder: a folder or org/name@revision; None is
    all-MiniLM-L6-v2; "hash" is free of any model, for smoke runs, not for results. seeds: of the choice of rows.
    """

    rows: Count = 400
    template: Literal["match", "hinted", "raw", "both"] = "match"
    store: Literal["exact", "chroma"] = "exact"
    embedder: Text | None = None
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)


class Fields(Strict):
    """The fields of a suite file. Paths are relative to it."""

    version: Literal[1]
    title: str = ""
    model: Text
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Text = "auto"
    bank: Text
    multitask: Text | None = None
    tasks: Annotated[tuple[Text, ...], Field(min_length=1)]
    rows: dict[str, Count] = Field({DEFAULT: 100})
    validation_rows: Count = 50
    batch_size: Count = 64
    max_new_tokens: Count = 32
    index: IndexEntry = IndexEntry()
    queries: Annotated[tuple[Query, ...], Field(min_length=1)] = QUERIES
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)] = SCOPES
    methods: Annotated[tuple[Any, ...], Field(min_length=1)]
    out: Text


@dataclass(frozen=True)
class Suite:
    """A suite file, checked. `fields` has absolute paths; `methods` are in the order of the file."""

    fields: Fields
    methods: tuple[Method, ...]
    path: Path

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Suite:
        """Read a suite file.

        Raises LoralloyError with file, line and column for what is not YAML, an unknown field, a value that is not allowed,
        an unknown method or two of one name, and rows set for a method that is not there.
        """
        path = Path(path).absolute()
        document = versioned(path, "suite", "model", VERSION)
        fields = validated(Fields, document.data, document, inner={"index": IndexEntry})
        methods = tuple(_method(entry, ("methods", i), document) for i, entry in enumerate(document.data["methods"]))
        names = [method.name for method in methods]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise document.wrong(
                    ("methods", i), f"two methods are called {name!r}; give one another `name`, as in "
                    f"{{kind: {methods[i].kind}, name: {name}_2}}"
                )  # fmt: skip
        for name in fields.rows:
            if name != DEFAULT and name not in names:
                raise document.wrong(
                    ("rows", name), f"there is no method {name!r}{suggest(name, names)}; rows are set for {DEFAULT} "
                    f"and by method: {', '.join(names)}", key=True
                )  # fmt: skip
        for i, method in enumerate(methods):
            for field, own, all_ in (
                ("queries", method.queries, fields.queries), ("scopes", method.scopes, fields.scopes),
                ("seeds", method.seeds, fields.index.seeds),
            ):  # fmt: skip
                if extra := [x for x in own or () if x not in all_]:
                    raise document.wrong(
                        ("methods", i, field), f"{extra[0]!r} is not among the suite's {', '.join(map(str, all_))}"
                    )
        base = path.parent
        local = {
            "model": _place(fields.model, base), "bank": _place(fields.bank, base), "out": str(base / fields.out),
            "multitask": fields.multitask and _place(fields.multitask, base),
            "tasks": tuple(os.path.normpath(base / entry) for entry in fields.tasks),
        }  # fmt: skip
        if (embedder := fields.index.embedder) and embedder != "hash":
            local["index"] = fields.index.model_copy(update={"embedder": _place(embedder, base)})
        return Suite(fields.model_copy(update=local), methods, path)

    def rows_of(self, method: Method) -> int:
        """Test rows a task that `method` answers: always the first, so that methods share rows."""
        return self.fields.rows.get(method.name, self.fields.rows.get(DEFAULT, 100))

    @property
    def out(self) -> Path:
        return Path(os.path.normpath(self.fields.out))

    def only(self, names: list[str]) -> Suite:
        """The suite with these methods alone. Raises LoralloyError for one that it does not have."""
        has = [method.name for method in self.methods]
        for name in names:
            if name not in has:
                raise LoralloyError(
                    f"--only {name}: the suite has no method of this name{suggest(name, has)}; it has {', '.join(has)}"
                )
        return Suite(self.fields, tuple(m for m in self.methods if m.name in names), self.path)


def _place(text: str, base: Path) -> str:
    """A path beside the suite file; a pinned hub id as it is."""
    path = Path(text).expanduser()
    if parse_ref(text)[1] is not None and not (base / path).exists():
        return text
    return os.path.normpath(base / path)


def _method(entry: Any, at: At, document: Document) -> Method:
    """One of `methods`: a kind, or a mapping of a kind (default: its name), a name (default: its kind) and settings."""
    if isinstance(entry, str):
        entry = {"kind": entry}
    if not isinstance(entry, dict):
        raise document.wrong(at, f"{named(entry)} cannot stand here; give a method's kind, or a mapping with `kind`")
    entry = dict(entry)
    kind = entry.pop("kind", entry.get("name"))
    entry.setdefault("name", kind)
    if not isinstance(kind, str):
        raise document.wrong(at, "the field `kind` is missing; give a method's kind, such as routed")
    try:
        found = find_kind(kind)
    except LoralloyError as error:
        raise document.wrong(at, str(error)) from None
    return validated(found, entry, document, at, what=f" of a {found.kind} method")
