"""A model-free embedder: signed feature hashing of words. For tests and smoke runs, not for results."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np


class HashEmbedder:
    """Deterministic bag-of-words vectors: each word adds a pseudo-random unit direction drawn from its SHA-256.

    The same text gives the same bytes on every machine, so tests of the index need no download. Texts that share words
    are near, which is all that it knows of language.
    """

    def __init__(self, dimension: int = 64, salt: str = "") -> None:
        self.dimension = dimension
        self.salt = salt
        self.name = "hash-embedder"
        self.identity = f"hash-embedder-{dimension}" + (f"-{salt}" if salt else "")
        self._words: dict[str, np.ndarray] = {}

    def _word(self, word: str) -> np.ndarray:
        if word not in self._words:
            digest = hashlib.sha256(f"{self.salt}|{word}".encode()).digest()
            rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
            self._words[word] = rng.standard_normal(self.dimension)
        return self._words[word]

    def encode(self, texts: Sequence[str], progress: bool = False) -> np.ndarray:
        """Unit vectors, float32 ``[len(texts), dimension]``."""
        rows = np.zeros((len(texts), self.dimension))
        for row, text in zip(rows, texts, strict=True):
            row += self._word("")  # a text without words has a direction too
            for word in re.findall(r"\w+", text.lower()):
                row += self._word(word)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return rows.astype(np.float32)
