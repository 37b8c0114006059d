"""Fits of one index by the tasks that take part, made when asked for; a withheld task costs one more fit, once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from . import fitted
from .leave_one_out import Rows

if TYPE_CHECKING:
    from ..retrieval.index import Index

Fit = TypeVar("Fit")


@dataclass
class Subsets(Generic[Fit]):
    """Remembers ``make(names, rows)`` by the rows it stands on; the index's vectors are read once, when first needed."""

    index: Index
    only: Collection[str] | None
    make: Callable[[tuple[str, ...], Callable[[], Rows]], Fit]
    _fits: dict[str, tuple[tuple[str, ...], Fit]] = field(default_factory=dict)
    _rows: tuple[str, Rows] | None = None

    def without(self, dropped: Collection[str] = ()) -> tuple[tuple[str, ...], Fit]:
        """The tasks that are left, by name, and their fit. Raises LoralloyError when none is left."""
        names = tuple(sorted(self.index.tasks_left(dropped, self.only)))
        key = fitted.key_of(self.index, names)
        if key not in self._fits:
            self._fits[key] = names, self.make(names, lambda: self._read().subset(names))
        return self._fits[key]

    def _read(self) -> Rows:
        now = fitted.key_of(self.index)  # the index may have changed since
        if self._rows is None or self._rows[0] != now:
            self._rows = now, Rows.of(self.index, self.only)
        return self._rows[1]
