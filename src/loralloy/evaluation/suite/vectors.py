"""An embedder that embeds every text once: vectors are kept by the text's hash, in memory and in one safetensors file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...atomic import atomic_file
from ...retrieval.embed import TextEncoder
from .locks import lock


class CachedEmbedder:
    """`encoder` with a memory. The same name and identity, so an index takes either for the other.

    Args:
        encoder: what embeds the texts that are not known yet.
        folder: where the file lies; :meth:`save` writes it.
    """

    def __init__(self, encoder: TextEncoder, folder: Path) -> None:
        self.encoder = encoder
        self.identity, self.name, self.dimension = encoder.identity, encoder.name, encoder.dimension
        tag = hashlib.sha256(encoder.identity.encode()).hexdigest()[:12]
        self.path = folder / f"vectors-{tag}.safetensors"
        self._rows: dict[bytes, np.ndarray] = self._read()
        self._new = False

    def encode(self, texts: Sequence[str], progress: bool = False) -> np.ndarray:
        """Unit vectors, float32 ``[len(texts), dimension]``."""
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._rows}
        if missing:
            made = self.encoder.encode(list(missing.values()), progress=progress)
            self._rows.update(zip(missing, made, strict=True))
            self._new = True
        return np.stack([self._rows[key] for key in keys]) if keys else np.zeros((0, self.dimension), np.float32)

    def save(self) -> None:
        """Write what is new, with what other processes have written meanwhile."""
        from safetensors.numpy import save

        if not self._new:
            return
        with lock(self.path.with_name(f".{self.path.name}.lock")):
            rows = self._read() | self._rows
            keys = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 32)
            atomic_file(self.path, save({"keys": keys, "vectors": np.stack(list(rows.values()))}))
        self._rows, self._new = rows, False

    def _read(self) -> dict[bytes, np.ndarray]:
        from safetensors.numpy import load_file

        if not self.path.is_file():
            return {}
        held = load_file(self.path)
        return {key.tobytes(): vector for key, vector in zip(held["keys"], held["vectors"], strict=True)}
