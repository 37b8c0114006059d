"""Chroma, embedded in the process. Its HTTP server is never used (CVE-2026-45829: code runs before authentication)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LoralloyError
from .store import Neighbours, Rows, check_query, check_rows, nearest

BATCH = 4000  # Chroma takes 5,461 rows a call at most, and SQLite 32,766 in one answer
# Cosine, since the default is l2. The rest buys recall where tasks form islands, as they do with hints: at 200, 400, 32
# one query of 700 lost half of its neighbours. benchmarks/recall.py measures what is left to lose at k = 100.
HNSW = {"space": "cosine", "ef_construction": 400, "ef_search": 1000, "max_neighbors": 64}
MARGIN = 16  # rows fetched beyond k, so that equal distances across the k-th place go by id here too


class ChromaStore:
    """One persistent Chroma collection: rows of metadata ``{"task": ...}``, the text as the document, our own vectors.

    Labels (id -> task) are held in memory and queries fetch ids and distances alone: a ``where`` filter would cost tens
    of milliseconds. Raises LoralloyError when chromadb is not installed or the folder is not readable by it.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            import chromadb
            from chromadb.config import Settings
        except ImportError:
            raise LoralloyError(
                "the Chroma store needs chromadb: pip install 'loralloy[retrieval]', or --store exact"
            ) from None

        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._client = chromadb.PersistentClient(str(self.folder), settings=Settings(anonymized_telemetry=False))
            self._rows: Any = self._client.get_or_create_collection(
                "loralloy",
                embedding_function=None,
                configuration={"hnsw": dict(HNSW)},  # type: ignore[arg-type]
            )
            self._labels: dict[str, str] = {}
            self._counts: dict[str, int] | None = None
            self._load_labels()
        except LoralloyError:
            raise
        except Exception as error:  # chromadb raises sqlite, Rust and its own errors
            raise LoralloyError(f"{self.folder}: Chroma cannot open it ({error}); build the index again") from None

    def _load_labels(self) -> None:
        total = self._rows.count()
        for offset in range(0, total, BATCH):
            page = self._rows.get(limit=BATCH, offset=offset, include=["metadatas"])
            self._labels.update(zip(page["ids"], (m["task"] for m in page["metadatas"]), strict=True))

    def add(self, task: str, ids: Sequence[str], vectors: np.ndarray, texts: Sequence[str]) -> None:
        vectors = check_rows(task, ids, vectors, texts)
        foreign = [i for i in ids if self._labels.get(i, task) != task]
        if foreign:
            raise LoralloyError(f"task {task!r}: id {foreign[0]!r} belongs to task {self._labels[foreign[0]]!r}")
        self._drop(sorted(i for i, owner in self._labels.items() if owner == task))
        for start in range(0, len(ids), BATCH):
            part = slice(start, start + BATCH)
            self._rows.upsert(
                ids=list(ids[part]),
                embeddings=vectors[part],
                documents=list(texts[part]),
                metadatas=[{"task": task}] * len(ids[part]),
            )
            self._labels.update(dict.fromkeys(ids[part], task))
            self._counts = None

    def _drop(self, ids: list[str]) -> None:
        for start in range(0, len(ids), BATCH):
            self._rows.delete(ids=ids[start : start + BATCH])
        for i in ids:
            self._labels.pop(i, None)
        self._counts = None

    def remove(self, task: str) -> None:
        self._drop(sorted(i for i, owner in self._labels.items() if owner == task))

    def tasks(self) -> dict[str, int]:
        if self._counts is None:  # every query asks
            self._counts = dict(sorted(Counter(self._labels.values()).items()))
        return dict(self._counts)

    def query(self, vectors: np.ndarray, k: int, tasks: Collection[str] | None = None) -> Neighbours:
        vectors = check_query(vectors, k)
        counts = self.tasks()
        wanted = set(counts) if tasks is None else set(tasks) & set(counts)
        total, available = len(self._labels), sum(counts[name] for name in wanted)
        if not available:
            raise LoralloyError("no rows to search: the index has no task left to choose from")
        k = min(k, available)
        done: dict[int, tuple[list[str], np.ndarray]] = {}
        pending, fetch = list(range(len(vectors))), min(total, k + MARGIN)
        while pending:
            answers = self._search(vectors[pending], fetch)
            for row, (ids, distances) in zip(pending, answers, strict=True):
                kept = [n for n, i in enumerate(ids) if self._labels.get(i) in wanted]
                if len(kept) >= k:
                    held = np.array([ids[n] for n in kept])
                    best = nearest(distances[kept], held, k)
                    done[row] = held[best].tolist(), distances[kept][best]
            pending = [row for row in pending if row not in done]
            if pending and fetch >= total:  # the graph did not reach them: read the vectors themselves
                for row, answer in zip(pending, self._scan(vectors[pending], k, wanted), strict=True):
                    done[row] = answer
                break
            fetch = min(total, 4 * fetch)  # dropped rows took places: ask for more
        found = [done[row][0] for row in range(len(vectors))]
        near = np.array([done[row][1] for row in range(len(vectors))], dtype=np.float32).reshape(len(vectors), k)
        return found, near, [[self._labels[i] for i in names] for names in found]

    def _search(self, vectors: np.ndarray, k: int) -> list[tuple[list[str], np.ndarray]]:
        try:
            found = self._rows.query(query_embeddings=vectors, n_results=k, include=["distances"])
        except Exception as error:
            # hnswlib gives no answer when deleted rows leave fewer than k within reach: the caller widens or scans.
            if "contig" in str(error) or "ef or M" in str(error):
                return [([], np.zeros(0, dtype=np.float32))] * len(vectors)
            raise LoralloyError(
                f"{self.folder}: Chroma cannot answer ({error}); another embedder, or a damaged index"
            ) from None
        pairs = zip(found["ids"], found["distances"], strict=True)
        return [(ids, np.clip(np.array(distances, dtype=np.float32), 0.0, 2.0)) for ids, distances in pairs]

    def _scan(self, vectors: np.ndarray, k: int, tasks: set[str]) -> list[tuple[list[str], np.ndarray]]:
        chosen = sorted(i for i, task in self._labels.items() if task in tasks)
        ids: list[str] = []
        blocks = []
        for start in range(0, len(chosen), BATCH):
            page = self._rows.get(ids=chosen[start : start + BATCH], include=["embeddings"])
            ids += page["ids"]
            blocks.append(np.asarray(page["embeddings"], dtype=np.float32))
        names, stacked = np.array(ids), np.concatenate(blocks)
        distances = np.clip(1.0 - vectors @ stacked.T, 0.0, 2.0)
        best = [nearest(row, names, k) for row in distances]
        return [(names[b].tolist(), row[b]) for b, row in zip(best, distances, strict=True)]

    def texts(self, ids: Sequence[str]) -> list[str]:
        if not ids:
            return []
        page = self._rows.get(ids=list(dict.fromkeys(ids)), include=["documents"])
        held = dict(zip(page["ids"], page["documents"], strict=True))
        for i in ids:
            if i not in held:
                raise LoralloyError(f"no row {i!r} in this store")
        return [held[i] for i in ids]

    def vectors(self, tasks: Collection[str] | None = None) -> Rows:
        owners = sorted((task, i) for i, task in self._labels.items() if tasks is None or task in tasks)
        if not owners:
            raise LoralloyError("no rows to read: the index has no task left to choose from")
        place = {i: n for n, (_, i) in enumerate(owners)}
        ids, result = [i for _, i in owners], None
        for start in range(0, len(ids), BATCH):
            page = self._rows.get(ids=ids[start : start + BATCH], include=["embeddings"])
            block = np.asarray(page["embeddings"], dtype=np.float32)
            result = np.zeros((len(ids), block.shape[1]), dtype=np.float32) if result is None else result
            result[[place[i] for i in page["ids"]]] = block
        assert result is not None
        return ids, result, [task for task, _ in owners]

    def close(self) -> None:
        self._client.close()  # type: ignore[attr-defined]
