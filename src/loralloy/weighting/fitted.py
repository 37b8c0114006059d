"""What is fitted to an index is kept beside it: ``INDEX/fitted/KIND-KEY.{json,safetensors}``, under a hash of its rows.

The key is a hash of the manifest's part that matters (embedder, template, each task's name and the hash of its rows), so
a fit is found again only for exactly the rows that it was made from: a task that is added, changed or removed has another
key, and what is stale is fitted anew. An index that cannot be written to is fitted in memory each time it is opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic import atomic_file

if TYPE_CHECKING:
    from ..retrieval.index import Index

FOLDER = "fitted"
VERSION = 2  # of the fits; a change in how they are made takes the next number


def key_of(index: Index, tasks: Collection[str] | None = None) -> str:
    """The hash of an index that held `tasks` alone (default: all it holds)."""
    manifest = index.manifest
    held = [[n, t.content_hash] for n, t in sorted(manifest.tasks.items()) if tasks is None or n in tasks]
    data = json.dumps([VERSION, manifest.embedder, manifest.template, held], ensure_ascii=False)
    return hashlib.sha256(data.encode()).hexdigest()


def load(index: Index, kind: str, tasks: Collection[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """A kept fit of these tasks, or None when there is none that is whole."""
    from safetensors.numpy import load as read

    key = key_of(index, tasks)
    path = _path(index, kind, key)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        content = path.with_suffix(".safetensors").read_bytes()
        if data["key"] != key or data["sha256"] != hashlib.sha256(content).hexdigest():
            return None
        return data["fit"], read(content)
    except Exception:  # nothing kept, cut short or damaged: all mean "fit it again"
        return None


def save(
    index: Index, kind: str, tasks: Collection[str], fit: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Keep a fit; the JSON is written last and names the hash of the tensors. A read-only index keeps nothing."""
    from safetensors.numpy import save as write

    key = key_of(index, tasks)
    content = write({name: np.ascontiguousarray(array) for name, array in tensors.items()})
    data = {"version": VERSION, "key": key, "sha256": hashlib.sha256(content).hexdigest(), "fit": dict(fit)}
    path = _path(index, kind, key)
    with contextlib.suppress(OSError):
        atomic_file(path.with_suffix(".safetensors"), content)
        atomic_file(path, json.dumps(data | {"of": key_of(index)}, indent=1) + "\n")


def prune(index: Index) -> None:
    """Delete the fits that were made when the index held other rows."""
    now = key_of(index)
    for path in sorted((index.folder / FOLDER).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads(path.read_text(encoding="utf-8")).get("of") != now:
                path.unlink()
                path.with_suffix(".safetensors").unlink(missing_ok=True)


def _path(index: Index, kind: str, key: str) -> Path:
    return Path(index.folder) / FOLDER / f"{kind}-{key[:16]}.json"
