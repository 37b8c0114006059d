"""What every router is: texts or vectors in, one Weights a query out; tasks can be left out, for all or by query."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import LoralloyError
from ..weights import Weights

if TYPE_CHECKING:
    from ..retrieval.index import Index


class Weigher(Protocol):
    """Weighs the tasks of an index (and so the adapters of their names) for a query; see :func:`open_weigher`.

    Leaving tasks out, with `exclude`, `exclude_each` or the weigher's own `only`, is as if the index did not hold them:
    neither their rows nor their classes take part, in searching or in fitting.
    """

    @property
    def index(self) -> Index: ...

    @property
    def settings(self) -> dict[str, Any]:
        """What it was made with or has chosen, as plain data for a report."""
        ...

    def prepare(self) -> None:
        """Fit what is to be fitted now, so that no query waits for it."""
        ...

    def weigh(self, text: str, exclude: Collection[str] = ()) -> Weights:
        """The weights for one query; `exclude` leaves tasks out (its own, to measure out-of-domain use)."""
        ...

    def weigh_batch(
        self, texts: Sequence[str], exclude: Collection[str] = (), *, exclude_each: Sequence[str | None] | None = None
    ) -> list[Weights]:
        """One Weights a text, in order. `exclude` holds for all; `exclude_each` adds one task (or None) a text."""
        ...

    def weigh_vectors(
        self,
        vectors: np.ndarray,
        exclude: Collection[str] = (),
        *,
        exclude_each: Sequence[str | None] | None = None,
    ) -> list[Weights]:
        """As :meth:`weigh_batch`, for queries embedded already: unit vectors ``[m, d]`` from ``index.embed``."""
        ...


class Weighing:
    """The part that all weighers share; a subclass answers :meth:`_weigh` for queries that leave out the same tasks."""

    if TYPE_CHECKING:
        index: Index

    def _weigh(self, vectors: np.ndarray, dropped: list[str]) -> list[Weights]:
        raise NotImplementedError

    def prepare(self) -> None:
        """Fit what is to be fitted now, so that no query waits for it (nothing, for a kernel with fixed options)."""

    def weigh(self, text: str, exclude: Collection[str] = ()) -> Weights:
        """The weights for one query; `exclude` leaves tasks out (its own, to measure out-of-domain use)."""
        return self.weigh_batch([text], exclude)[0]

    def weigh_batch(
        self, texts: Sequence[str], exclude: Collection[str] = (), *, exclude_each: Sequence[str | None] | None = None
    ) -> list[Weights]:
        """One Weights a text, in order. `exclude` holds for all; `exclude_each` adds one task (or None) a text."""
        return self.weigh_vectors(self.index.embed(texts), exclude, exclude_each=exclude_each)

    def weigh_vectors(
        self,
        vectors: np.ndarray,
        exclude: Collection[str] = (),
        *,
        exclude_each: Sequence[str | None] | None = None,
    ) -> list[Weights]:
        """As :meth:`weigh_batch`, for queries embedded already: unit vectors ``[m, d]`` from ``index.embed``."""
        if isinstance(exclude, str):
            exclude = (exclude,)
        own = list(exclude_each) if exclude_each is not None else [None] * len(vectors)
        if len(own) != len(vectors):
            raise LoralloyError(f"exclude_each has {len(own)} entries for {len(vectors)} queries")
        result: list[Weights | None] = [None] * len(vectors)
        for left_out in sorted(set(own), key=lambda name: (name is not None, name or "")):
            rows = [row for row, name in enumerate(own) if name == left_out]
            dropped = sorted({*exclude, *([left_out] if left_out else [])})
            for row, weights in zip(rows, self._weigh(np.asarray(vectors)[rows], dropped), strict=True):
                result[row] = weights
        return [weights for weights in result if weights is not None]


def neighbours(
    index: Index, ids: Sequence[list[str]], distances: np.ndarray, tasks: Sequence[list[str]], show: int
) -> list[list[dict[str, Any]]]:
    """By query, its nearest `show` rows: ``{"id", "task", "distance", "text"}``; texts are read in few calls."""
    flat = list(dict.fromkeys(i for row in ids for i in row[:show]))
    texts: dict[str, str] = {}
    for start in range(0, len(flat), 1000):
        texts |= zip(flat[start : start + 1000], index.texts(flat[start : start + 1000]), strict=True)
    return [
        [
            {"id": i, "task": task, "distance": float(d), "text": texts[i]}
            for i, d, task in zip(row_ids[:show], row_distances, row_tasks, strict=False)
        ]
        for row_ids, row_distances, row_tasks in zip(ids, distances, tasks, strict=True)
    ]
