"""Experiences (one domain each), and the stream that they arrive in, read from a stream file (YAML, ``version: 1``)."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ..errors import LoralloyError
from ..hub import parse_ref
from ..recipe.document import At, Document
from ..recipe.schema import named, or_list, suggest
from ..recipe.validation import validated, versioned
from .fields import VERSION, BufferEntry, EvaluateEntry, ExperienceEntry, Fields, ImagesEntry
from .strategies import KINDS, Merge, MergeEntry, Strategy, accepts_list, expand, merge_of, title, twice

if TYPE_CHECKING:
    from ..tasks.task import Task

_INNER: dict[str, type[BaseModel]] = {
    "images": ImagesEntry, "buffer": BufferEntry, "evaluate": EvaluateEntry, "experiences": ExperienceEntry,
}  # fmt: skip
_BRANCHES = ("constrained-", "literal[", "tuple[", "float")  # of the unions of a stream's fields


@dataclass(frozen=True)
class Experience:
    """One domain of a stream.

    task: of a text stream. domain: of a stream of images, the domain's name in the image data, which the workshop reads.
    """

    name: str
    task: Task | None = field(default=None, repr=False)
    domain: str = ""


@dataclass(frozen=True)
class DomainStream:
    """A stream file, checked.

    fields: as in the file, with absolute paths. experiences: in the file's order. orders: tuples of their names.
    merges, strategies: expanded, one a combination.
    """

    fields: Fields
    experiences: tuple[Experience, ...]
    orders: tuple[tuple[str, ...], ...]
    merges: tuple[Merge, ...]
    strategies: tuple[Strategy, ...]
    path: Path | None = None

    @property
    def names(self) -> list[str]:
        return [experience.name for experience in self.experiences]

    @property
    def out(self) -> Path:
        return Path(self.fields.out)

    def __getitem__(self, name: str) -> Experience:
        return next(experience for experience in self.experiences if experience.name == name)

    def only(self, names: Sequence[str]) -> DomainStream:
        """The strategies and merges that are named (by name, kind or rule): all of the kind that none is named of.

        Raises LoralloyError for a name of neither.
        """
        strategies = [s for s in self.strategies if {s.name, s.kind} & set(names)]
        merges = [m for m in self.merges if {m.name, m.rule.name, m.space} & set(names)]
        known = {x for s in strategies for x in (s.name, s.kind)} | {
            x for m in merges for x in (m.name, m.rule.name, m.space)
        }
        for name in names:
            if name not in known:
                every = [s.name for s in self.strategies] + [m.name for m in self.merges]
                raise LoralloyError(
                    f"--only {name}: the stream has no strategy or merge of this name{suggest(name, every)}; it has "
                    f"{', '.join(every)}"
                )
        return dataclasses.replace(
            self, strategies=tuple(strategies) or self.strategies, merges=tuple(merges) or self.merges
        )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> DomainStream:
        """Read a stream file.

        Raises LoralloyError with file, line and column for what is not YAML, an unknown field, kind, rule or parameter, a
        value that is not allowed, two experiences or strategies of one name, and an order that is not of all experiences.
        """
        path = Path(path).absolute()
        document = versioned(path, "stream", "model", VERSION)
        fields: Fields = validated(Fields, document.data, document, inner=_INNER, branches=_BRANCHES)
        base = path.parent
        experiences = tuple(
            _experience(e, ("experiences", n), base, document) for n, e in enumerate(fields.experiences)
        )
        if name := twice([e.name for e in experiences]):
            raise document.wrong(("experiences",), f"two experiences are called {name!r}; give one another `name`")
        merges = [
            merge
            for n, entry in enumerate(fields.merges)
            for merge in _merges(entry, ("merges", n), fields.rank, document)
        ]
        if name := twice([merge.name for merge in merges]):
            raise document.wrong(("merges",), f"two merges are called {name!r}; give one a `name` of its own")
        strategies = [
            strategy
            for n, entry in enumerate(fields.strategies)
            for strategy in _strategies(entry, ("strategies", n), merges, document)
        ]
        if name := twice([strategy.name for strategy in strategies]):
            raise document.wrong(("strategies",), f"two strategies are called {name!r}; give one a `name` of its own")
        orders = _orders(fields.orders, [e.name for e in experiences], document)
        local: dict[str, Any] = {"model": _place(fields.model, base), "out": os.path.normpath(base / fields.out)}
        if fields.images is not None:
            where = os.path.normpath(base / Path(fields.images.path).expanduser())
            local["images"] = fields.images.model_copy(update={"path": where})
        return DomainStream(
            fields.model_copy(update=local), experiences, orders, tuple(merges), tuple(strategies), path
        )


def _place(text: str, base: Path) -> str:
    """A path beside the stream file; a pinned hub id as it is."""
    path = Path(text).expanduser()
    if parse_ref(text)[1] is not None and not (base / path).exists():
        return text
    return os.path.normpath(base / path)


def _experience(entry: ExperienceEntry, at: At, base: Path, document: Document) -> Experience:
    if entry.task is None:
        name = entry.name or entry.domain or ""
        return Experience(name, domain=entry.domain or name)
    from ..tasks.task import Task

    try:
        task = Task.load(os.path.normpath(base / entry.task))
    except LoralloyError as error:
        raise document.wrong((*at, "task"), str(error)) from None
    return Experience(entry.name or task.name, task)


def _merges(entry: Any, at: At, rank: int | str | None, document: Document) -> list[Merge]:
    checked = validated(
        MergeEntry, {"rule": entry} if isinstance(entry, str) else entry, document, at, branches=_BRANCHES
    )
    try:
        return merge_of(checked, rank)
    except LoralloyError as error:
        raise document.wrong(at, str(error)) from None


def _strategies(entry: Any, at: At, merges: Sequence[Merge], document: Document) -> list[Strategy]:
    """One of `strategies`: a kind, or a mapping of a kind and settings, of which lists make a grid."""
    if isinstance(entry, str):
        entry = {"kind": entry}
    if not isinstance(entry, dict):
        raise document.wrong(at, f"{named(entry)} cannot stand here; give a kind, or a mapping with `kind`")
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        said = (
            f"{kind!r} is not known{suggest(str(kind), list(KINDS))}"
            if "kind" in entry
            else "the field `kind` is missing"
        )
        raise document.wrong((*at, "kind"), f"{said}; give {or_list(list(KINDS))}")
    found = []
    model = KINDS[kind]
    grid = {k: (tuple(v) if isinstance(v, list) and accepts_list(model, k) else v) for k, v in entry.items()}
    several = [k for k, v in grid.items() if isinstance(v, list)]
    for one in expand(grid):
        data = {k: v for k, v in one.items() if k != "kind"}
        if "name" not in data:
            data["name"] = title(kind, data)
        elif several:
            data["name"] = " ".join([str(data["name"]), title("", {k: one[k] for k in several})])
        found.append(validated(model, data, document, at, branches=_BRANCHES))
    known = {name for merge in merges for name in (merge.name, merge.rule.name, merge.space)}
    for name in found[0].only or () if found else ():
        if name not in known:
            raise document.wrong((*at, "only"), f"there is no merge {name!r}; there are {', '.join(sorted(known))}")
    if not found:
        raise document.wrong(at, "a list of settings is empty; give at least one value")
    return found


def _orders(given: Any, names: list[str], document: Document) -> tuple[tuple[str, ...], ...]:
    if isinstance(given, int):
        try:
            return drawn_orders(names, given)
        except LoralloyError as error:
            raise document.wrong(("orders",), str(error)) from None
    for n, order in enumerate(given):
        if sorted(order) != sorted(names):
            raise document.wrong(("orders", n), f"an order names each experience once: {', '.join(names)}")
    if name := twice([str(order) for order in given]):
        raise document.wrong(("orders",), f"the order {name} is given twice; keep one")
    return tuple(tuple(order) for order in given)


def drawn_orders(names: Sequence[str], count: int) -> tuple[tuple[str, ...], ...]:
    """The order given, then random ones that differ from each other, the same at every call.

    Raises LoralloyError when there are not so many orders.
    """
    import math

    if count > math.factorial(len(names)):
        raise LoralloyError(
            f"{count} orders asked for, but {len(names)} experiences have only {math.factorial(len(names))}"
        )
    generator, found = random.Random(0), [tuple(names)]
    while len(found) < count:
        order = list(names)
        generator.shuffle(order)
        if tuple(order) not in found:
            found.append(tuple(order))
    return tuple(found)
