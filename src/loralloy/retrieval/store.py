"""Where the vectors lie: the interface, and the exact store (NumPy): the oracle, and the choice without Chroma."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote

import numpy as np

from ..atomic import atomic_folder, recover
from ..errors import LoralloyError

Neighbours = tuple[list[list[str]], np.ndarray, list[list[str]]]
Rows = tuple[list[str], np.ndarray, list[str]]


class Store(Protocol):
    """Rows (id, unit vector, text) grouped by task. Ids are unique in the whole store."""

    def add(self, task: str, ids: Sequence[str], vectors: np.ndarray, texts: Sequence[str]) -> None:
        """Make these the rows of `task`, replacing any it had; no other task's rows are touched. `vectors` [n, d]."""
        ...

    def remove(self, task: str) -> None:
        """Drop the rows of `task`; nothing happens when it has none."""
        ...

    def tasks(self) -> dict[str, int]:
        """Task -> number of rows, by name."""
        ...

    def query(self, vectors: np.ndarray, k: int, tasks: Collection[str] | None = None) -> Neighbours:
        """The k nearest rows to each of `vectors` [m, d], among the rows of `tasks` (default: all).

        Returns ids, cosine distances ``1 - cos`` [m, min(k, rows)] and the task of each; nearest first, ties by id.
        """
        ...

    def texts(self, ids: Sequence[str]) -> list[str]:
        """The texts of these rows, in order. Raises LoralloyError for an unknown id."""
        ...

    def vectors(self, tasks: Collection[str] | None = None) -> Rows:
        """All rows of `tasks` (default: all), by task and then id: ids, unit vectors float32 [n, d], each one's task."""
        ...

    def close(self) -> None:
        """Release files. Using the store afterwards is an error."""
        ...


def check_rows(task: str, ids: Sequence[str], vectors: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """The vectors as contiguous float32, or a LoralloyError that says what does not fit."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or not len(ids) == len(texts) == len(vectors):
        raise LoralloyError(f"task {task!r}: {len(ids)} ids, {len(texts)} texts and vectors {vectors.shape} do not fit")
    if not len(ids):
        raise LoralloyError(f"task {task!r}: no rows to store; remove the task instead")
    if len(set(ids)) != len(ids):
        raise LoralloyError(f"task {task!r}: the same id occurs twice; ids must be unique")
    norms = np.linalg.norm(vectors, axis=1)
    if not np.isfinite(norms).all() or np.abs(norms - 1).max() > 1e-3:
        raise LoralloyError(
            f"task {task!r}: vectors must have unit norm (found {norms.min():.3g} to {norms.max():.3g})"
        )
    return vectors


def check_query(vectors: np.ndarray, k: int) -> np.ndarray:
    if k < 1:
        raise LoralloyError(f"k is {k}; ask for at least one neighbour")
    vectors = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    if not np.isfinite(vectors).all():
        raise LoralloyError("query vectors contain NaN or infinity")
    return vectors


def nearest(distances: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k smallest `distances` [n], in order; ties by id, also those across the k-th place."""
    if k < len(distances):
        candidates = np.flatnonzero(distances <= np.partition(distances, k - 1)[k - 1])
    else:
        candidates = np.arange(len(distances))
    return candidates[np.lexsort((ids[candidates], distances[candidates]))][:k]


class ExactStore:
    """One folder a task (``vectors.safetensors`` [n, d], ``rows.json``), replaced as one; search is a matrix product.

    All vectors are held in memory (40,000 rows of 384: 61 MB); texts are read when asked for. Up to about 100,000 rows
    the search costs less than embedding the query.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._vectors: dict[str, np.ndarray] = {}
        self._ids: dict[str, list[str]] = {}
        self._texts: dict[str, dict[str, str]] = {}
        self._owner: dict[str, str] | None = None
        self._stacked: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for path in list(self.folder.glob(".*.old-*")):  # a replacement that was cut short
            recover(self.folder / path.name[1:].rsplit(".old-", 1)[0])
        for path in sorted(self.folder.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                self._load(unquote(path.name))

    def _path(self, task: str) -> Path:
        return self.folder / quote(task, safe="").replace(".", "%2E")

    def _rows(self, task: str) -> dict[str, list[str]]:
        path = self._path(task) / "rows.json"
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            if len(rows["ids"]) != len(rows["texts"]):
                raise ValueError("ids and texts differ in number")
            return rows
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LoralloyError(f"{path}: damaged ({error}); delete {path.parent} and index {task!r} again") from None

    def _load(self, task: str) -> None:
        from safetensors.numpy import load_file

        ids = self._rows(task)["ids"]
        path = self._path(task) / "vectors.safetensors"
        try:
            vectors = load_file(path)["vectors"]
            if vectors.shape[0] != len(ids):
                raise ValueError(f"{vectors.shape[0]} vectors for {len(ids)} ids")
        except Exception as error:  # safetensors raises its own type; all mean the same here
            raise LoralloyError(f"{path}: damaged ({error}); delete {path.parent} and index {task!r} again") from None
        self._ids[task], self._vectors[task] = ids, vectors

    def _changed(self, task: str) -> None:
        self._stacked.clear()
        self._owner = None
        for held in (self._ids, self._vectors, self._texts):
            held.pop(task, None)

    def add(self, task: str, ids: Sequence[str], vectors: np.ndarray, texts: Sequence[str]) -> None:
        from safetensors.numpy import save_file

        vectors = check_rows(task, ids, vectors, texts)
        for other, held in self._vectors.items():
            if other != task and held.shape[1] != vectors.shape[1]:
                raise LoralloyError(
                    f"task {task!r}: vectors of width {vectors.shape[1]}; this store has {held.shape[1]}"
                )
        with atomic_folder(self._path(task), overwrite=True) as new:
            save_file({"vectors": vectors}, new / "vectors.safetensors")
            rows = {"ids": list(ids), "texts": list(texts)}
            (new / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
        self._changed(task)
        self._load(task)

    def remove(self, task: str) -> None:
        import shutil

        path = self._path(task)
        if path.exists():
            dead = path.with_name(f".{path.name}.dead")  # gone in one step; what is left of a killed removal is hidden
            shutil.rmtree(dead, ignore_errors=True)
            path.rename(dead)
            shutil.rmtree(dead, ignore_errors=True)
        self._changed(task)

    def tasks(self) -> dict[str, int]:
        return {task: len(self._ids[task]) for task in sorted(self._ids)}

    def _stack(self, tasks: Collection[str] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        names = tuple(sorted(self._ids if tasks is None else set(tasks) & set(self._ids)))
        if not names:
            raise LoralloyError("no rows to search: the index has no task left to choose from")
        if names not in self._stacked:
            if len(self._stacked) > 1:  # the whole, and the last selection
                self._stacked.pop(next(reversed(self._stacked)))
            vectors = np.concatenate([self._vectors[name] for name in names])
            ids = np.array([i for name in names for i in self._ids[name]])
            labels = np.array([name for name in names for _ in self._ids[name]])
            self._stacked[names] = vectors, ids, labels
        return self._stacked[names]

    def query(self, vectors: np.ndarray, k: int, tasks: Collection[str] | None = None) -> Neighbours:
        vectors = check_query(vectors, k)
        stacked, ids, labels = self._stack(tasks)
        if vectors.shape[1] != stacked.shape[1]:
            raise LoralloyError(
                f"queries have width {vectors.shape[1]}, the index {stacked.shape[1]}: another embedder?"
            )
        found_ids, found_distances, found_tasks = [], [], []
        for start in range(0, len(vectors), 256):  # [256, n] at a time bounds the memory
            block = np.clip(1.0 - vectors[start : start + 256] @ stacked.T, 0.0, 2.0)
            for row in block:
                best = nearest(row, ids, k)
                found_ids.append(ids[best].tolist())
                found_distances.append(row[best])
                found_tasks.append(labels[best].tolist())
        width = min(k, len(ids))
        return found_ids, np.array(found_distances, dtype=np.float32).reshape(len(vectors), width), found_tasks

    def texts(self, ids: Sequence[str]) -> list[str]:
        if self._owner is None:
            self._owner = {i: task for task, held in self._ids.items() for i in held}
        result = []
        for i in ids:
            task = self._owner.get(i)
            if task is None:
                raise LoralloyError(f"no row {i!r} in this store")
            if task not in self._texts:
                rows = self._rows(task)
                self._texts[task] = dict(zip(rows["ids"], rows["texts"], strict=True))
            result.append(self._texts[task][i])
        return result

    def vectors(self, tasks: Collection[str] | None = None) -> Rows:
        vectors, ids, labels = self._stack(tasks)
        order = np.lexsort((ids, labels))
        return ids[order].tolist(), vectors[order], labels[order].tolist()

    def close(self) -> None:
        self._stacked.clear()
