"""The index's own rows as queries, each left out of its neighbours: what is tuned and calibrated without new labels."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..retrieval.rows import RAW

if TYPE_CHECKING:
    from ..retrieval.index import Index

QUERIES = 6000  # rows that are left out in turn, over all tasks: against 88,000 vectors of 384, 400 GFLOP
KEEP = 200  # neighbours kept of each


@dataclass(frozen=True)
class Rows:
    """An index's vectors with what fitting needs to know of each.

    `vectors` [n, d] float32; `labels` [n], positions in `tasks`; `kinds` [n], "hinted" or "raw"; `groups` [n], one number
    an example (the two vectors of one example share it); `order` [n], a hash of the example's id in [0, 1).
    """

    tasks: tuple[str, ...]
    vectors: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray
    groups: np.ndarray
    order: np.ndarray

    @staticmethod
    def of(index: Index, only: Collection[str] | None = None) -> Rows:
        """The committed rows of the index (of the tasks `only`)."""
        ids, vectors, owners = index.vectors(only)
        tasks = tuple(sorted(set(owners)))
        place = {task: n for n, task in enumerate(tasks)}
        examples = [i.removesuffix(RAW) for i in ids]
        number = {example: n for n, example in enumerate(dict.fromkeys(examples))}
        plain = "raw" if index.manifest.template == "raw" else "hinted"
        return Rows(
            tasks,
            vectors,
            np.array([place[owner] for owner in owners]),
            np.array(["raw" if i.endswith(RAW) else plain for i in ids]),
            np.array([number[example] for example in examples]),
            np.array([_unit(example) for example in examples]),
        )

    def subset(self, tasks: Collection[str]) -> Rows:
        """As if the index held `tasks` alone."""
        names = tuple(name for name in self.tasks if name in tasks)
        if names == self.tasks:
            return self
        place = np.array([names.index(name) if name in names else -1 for name in self.tasks])
        kept = place[self.labels] >= 0
        return Rows(
            names,
            self.vectors[kept],
            place[self.labels][kept],
            self.kinds[kept],
            self.groups[kept],
            self.order[kept],
        )

    def sample(self, rows: int) -> np.ndarray:
        """Positions [m] of the vectors of at most `rows` examples a task: those whose hash is smallest."""
        kept = []
        for task in range(len(self.tasks)):
            mine = np.flatnonzero(self.labels == task)
            hashes = np.unique(self.order[mine])[:rows]
            kept.append(mine[np.isin(self.order[mine], hashes)])
        return np.sort(np.concatenate(kept))

    def shares(self, positions: np.ndarray | None = None) -> np.ndarray:
        """Weights [m] of vectors such that every task counts the same, and they sum to 1."""
        labels = self.labels if positions is None else self.labels[positions]
        counts = np.bincount(labels, minlength=len(self.tasks))
        return 1.0 / counts[labels] / len(np.unique(labels))


def _unit(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little") / 2**48


@dataclass(frozen=True)
class LeftOut:
    """Neighbours of m left-out vectors: `distances` [m, k] rising, `labels` [m, k], `own` [m], `kinds` [m] (their own
    kind), `nearest` [m] (the kind of their nearest row), `shares` [m] (every task counts the same)."""

    tasks: tuple[str, ...]
    distances: np.ndarray
    labels: np.ndarray
    own: np.ndarray
    kinds: np.ndarray
    nearest: np.ndarray
    shares: np.ndarray


def leave_one_out(rows: Rows, queries: int = QUERIES, keep: int = KEEP) -> LeftOut:
    """Ask the rows with their own vectors, by one blocked matrix product ``[block, d] x [d, n]``.

    An example is left out whole: with two vectors a row, neither may find the other. Other rows stay, near-duplicates
    of the example within its task included, so distances are a little nearer than those of new text.
    """
    vectors_each = len(rows.labels) / max(1, len(np.unique(rows.groups)))
    asked = rows.sample(max(1, int(queries / len(rows.tasks) / vectors_each)))
    k = max(1, min(keep, len(rows.labels) - int(np.bincount(rows.groups).max())))
    distances = np.zeros((len(asked), k), dtype=np.float32)
    found = np.zeros((len(asked), k), dtype=np.int64)
    for start in range(0, len(asked), 256):
        block = asked[start : start + 256]
        d = 1.0 - rows.vectors[block] @ rows.vectors.T
        for row, group in enumerate(rows.groups[block]):
            d[row, rows.groups == group] = np.inf
        part = np.argpartition(d, k - 1, axis=1)[:, :k] if k < d.shape[1] else np.tile(np.arange(k), (len(block), 1))
        near = np.take_along_axis(d, part, axis=1)
        rank = np.lexsort((part, near), axis=1)
        distances[start : start + len(block)] = np.clip(np.take_along_axis(near, rank, axis=1), 0.0, 2.0)
        found[start : start + len(block)] = np.take_along_axis(part, rank, axis=1)
    return LeftOut(
        rows.tasks,
        distances,
        rows.labels[found],
        rows.labels[asked],
        rows.kinds[asked],
        rows.kinds[found[:, 0]],
        rows.shares(asked),
    )


def nucleus_rows(mass: np.ndarray, p: float) -> np.ndarray:
    """:func:`loralloy.weighting.nucleus` for rows of masses ``[m, tasks]`` that sum to 1; ties go by task."""
    order = np.argsort(-mass, axis=1, kind="stable")
    falling = np.take_along_axis(mass, order, axis=1)
    before = np.cumsum(falling, axis=1) - falling
    kept = np.where((before < p * (1 - 1e-12)) | (p >= 1), falling, 0.0)
    result = np.zeros_like(mass)
    np.put_along_axis(result, order, kept / kept.sum(axis=1, keepdims=True), axis=1)
    return result


def brier(weights: np.ndarray, own: Sequence[int] | np.ndarray, shares: np.ndarray) -> float:
    """Mean squared distance of the weights ``[m, tasks]`` from 1 at the own task and 0 elsewhere (0 to 2)."""
    at = weights[np.arange(len(weights)), own]
    return float(shares @ ((weights**2).sum(axis=1) - 2 * at + 1))
