"""The adapter's folder: what PEFT loads, the log, the figures, and its card. Written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..atomic import atomic_folder
from ..errors import LoralloyError
from .config import SAVE_DTYPES
from .loop import LOG_NAME

HEADER_VERSION = 1


def base_record(model: Any, folder: str | None, name: str, revision: str | None) -> dict[str, Any]:
    """Which base this is: name, revision, fingerprint, and its weight files' sha256 when it is a local folder."""
    from ..live.base import base_fingerprint

    record: dict[str, Any] = {"name": name, "revision": revision, "fingerprint": base_fingerprint(model)}
    if folder is not None:
        files = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            with path.open("rb") as file:
                digest = hashlib.sha256()
                while block := file.read(1 << 22):
                    digest.update(block)
            files[path.name] = digest.hexdigest()
        record["files"] = files
    return record


def adapter_tensors(model: Any, dtype: str) -> dict[str, Any]:
    """PEFT's state dict (``base_model.model.<module>.lora_A.weight``) on the CPU, in fp16, bf16 or fp32.

    Raises LoralloyError when a value is not finite, or does not fit fp16.
    """
    import torch
    from peft import get_peft_model_state_dict

    tensors = {}
    for key, value in sorted(get_peft_model_state_dict(model, save_embedding_layers=False).items()):
        stored = value.detach().to(getattr(torch, SAVE_DTYPES[dtype])).cpu().contiguous()
        if not torch.isfinite(stored).all():
            way = "save with --save-dtype bf16" if torch.isfinite(value).all() else "lower --lr"
            raise LoralloyError(f"{key} has values that are not finite in {dtype}; {way}")
        tensors[key] = stored
    return tensors


def write(
    output: Path,
    model: Any,
    *,
    base: dict[str, Any],
    training: dict[str, Any],
    metrics: dict[str, Any],
    log: list[dict[str, Any]],
    card: str,
    save_dtype: str,
    overwrite: bool,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write adapter_config.json, adapter_model.safetensors, training_log.jsonl, metrics.json and README.md atomically.

    The safetensors header carries ``{"format": "pt", "loralloy": {"version": 1, "base": ..., "training": ...}}``, so
    that the base can be told from the weights file alone. files: more of them, by name (a trained head).
    """
    from safetensors.torch import save_file

    header = {"version": HEADER_VERSION, "base": base, "training": training}
    tensors = adapter_tensors(model, save_dtype)
    with atomic_folder(output, overwrite) as new:
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt", "loralloy": json.dumps(header)})
        config = model.peft_config["default"]
        training_mode, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(new))
        config.inference_mode = training_mode
        path = new / "adapter_config.json"
        # safetensors writes for the owner alone; a shared adapter is as readable as the files beside it
        (new / "adapter_model.safetensors").chmod(path.stat().st_mode & 0o777)
        plain = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(plain.get("target_modules"), list):
            plain["target_modules"].sort()  # peft holds a set, whose order changes from run to run
        path.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (new / LOG_NAME).write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
        (new / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(card, encoding="utf-8")
        for name, content in (files or {}).items():
            (new / name).write_bytes(content)
