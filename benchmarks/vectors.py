"""Vectors of task texts, kept between runs in .assets/vectors: embedding some 100,000 texts takes minutes on a CPU."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loralloy.atomic import atomic_file
from loralloy.retrieval import Index, TextEncoder
from loralloy.tasks import Task


class CachedEncoder:
    """A TextEncoder that embeds a text once: one safetensors file of vectors and a JSON list of text hashes a shelf.

    `shelf` is a task's name; vectors of another embedder lie in another folder.
    """

    def __init__(self, inner: TextEncoder, folder: str | Path = ".assets/vectors") -> None:
        self.inner, self.identity, self.name, self.dimension = inner, inner.identity, inner.name, inner.dimension
        self.folder = Path(folder) / hashlib.sha256(inner.identity.encode()).hexdigest()[:12]
        self.shelf = "other"
        self._held: dict[str, tuple[dict[str, int], np.ndarray]] = {}

    def _read(self, shelf: str) -> tuple[dict[str, int], np.ndarray]:
        from safetensors.numpy import load_file

        if shelf not in self._held:
            keys, path = self.folder / f"{shelf}.json", self.folder / f"{shelf}.safetensors"
            if keys.is_file() and path.is_file():
                known = {key: n for n, key in enumerate(json.loads(keys.read_text()))}
                self._held[shelf] = known, load_file(path)["vectors"]
            else:
                self._held[shelf] = {}, np.zeros((0, self.dimension), dtype=np.float32)
        return self._held[shelf]

    def encode(self, texts: Sequence[str], progress: bool = False) -> np.ndarray:
        """Unit vectors, float32 ``[len(texts), dimension]``; what is new is embedded and kept."""
        from safetensors.numpy import save

        known, vectors = self._read(self.shelf)
        keys = [hashlib.sha256(text.encode()).hexdigest()[:24] for text in texts]
        fresh = list({key: text for key, text in zip(keys, texts, strict=True) if key not in known}.items())
        if fresh:
            vectors = np.concatenate([vectors, self.inner.encode([text for _, text in fresh], progress=progress)])
            known = known | {key: len(known) + n for n, (key, _) in enumerate(fresh)}
            atomic_file(self.folder / f"{self.shelf}.safetensors", save({"vectors": vectors}))
            atomic_file(self.folder / f"{self.shelf}.json", json.dumps(list(known)))
            self._held[self.shelf] = known, vectors
        return vectors[[known[key] for key in keys]]


def build_index(
    folder: Path, tasks: Sequence[Task], encoder: CachedEncoder, store: str, rows: int, seed: int, template: str
) -> Index:
    """An index whose vectors come from the shelves of its tasks."""
    index = Index.build(folder, [], encoder, store, rows, seed, template)
    for task in tasks:
        encoder.shelf = task.name
        index.add(task, rows, seed)
    return index


def ask(
    tasks: Sequence[Task], encoder: CachedEncoder, split: str, rows: int, kind: str
) -> tuple[np.ndarray, list[str]]:
    """Vectors [m, d] of at most `rows` rows a task of a split, "hinted" or "raw", and each one's task."""
    vectors, owners = [], []
    for task in tasks:
        encoder.shelf = task.name
        examples = task.examples(split)[:rows]
        vectors.append(encoder.encode([e.query if kind == "hinted" else e.raw for e in examples]))
        owners += [task.name] * len(examples)
    return np.concatenate(vectors), owners
