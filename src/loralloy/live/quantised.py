"""A base in 4 or 8 bit: loaded by transformers through bitsandbytes, and known by the files that it was made of.

Its linear layers (not the embedding, not the head) hold packed weights and compute as before. Live composition adds to their
outputs and never touches a weight, so it is as exact there as elsewhere; what writes into weights refuses them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import LoralloyError

KINDS = ("4bit", "8bit")
MARK = "_loralloy_fingerprint"  # on a model that was quantised while it was loaded: its files' fingerprint
INSTALL = "pip install 'loralloy[quantised]'"


def check_kind(kind: str) -> None:
    """Raise LoralloyError unless it is "4bit" or "8bit"."""
    if kind not in KINDS:
        raise LoralloyError(f"quantisation {kind!r} (--load-in) is unknown; load in {' or '.join(KINDS)}")


def settings(kind: str, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' BitsAndBytesConfig: NF4 computed in `dtype`, or LLM.int8() with its own defaults.

    Raises LoralloyError when bitsandbytes is missing or does not run on the device.
    """
    check_kind(kind)
    try:
        import bitsandbytes
        from transformers import BitsAndBytesConfig
    except Exception as error:  # a missing library of the GPU's shows in many ways
        why = "" if isinstance(error, ImportError) else f" ({error})"
        raise LoralloyError(f"loading a base in {kind} needs bitsandbytes{why}: {INSTALL}") from None
    try:
        _try(bitsandbytes, kind, dtype, device)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoralloyError(
            f"bitsandbytes {bitsandbytes.__version__} does not run in {kind} on {device}: {first} "
            f"(load the base without quantisation, or on another device; to upgrade: {INSTALL})"
        ) from None
    if kind == "8bit":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_no_cast)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def settle(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Keep a CPU's layers from what bitsandbytes does at their first pass where it finds AVX512-BF16.

    It packs them anew for a kernel that computes in bfloat16 whatever was asked for, and that fails on sizes which are no
    multiples of its blocks; once packed so, a state_dict (PEFT takes one) seemed to spoil them (0.50.2). In bfloat16 the
    kernel is what is wanted, and is left on where it can run.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and isinstance(module, torch.nn.Linear):
            fits = module.out_features % 32 == 0 and module.in_features % 64 == 0
            module.support_avx512bf16_for_cpu = dtype == torch.bfloat16 and fits  # type: ignore[assignment]


def _try(bnb: Any, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """One product in a tiny layer: what the package claims to support is not always in its build."""
    if kind == "4bit":
        layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=dtype, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    logger.addFilter(_no_cast)
    try:
        with torch.no_grad():
            out = layer.to(device)(torch.ones(2, 64, dtype=dtype, device=device))
    finally:
        logger.removeFilter(_no_cast)
    if not bool(torch.isfinite(out).all()):
        raise RuntimeError("a product is not finite")


def _no_cast(record: logging.LogRecord) -> bool:
    """Drops what LLM.int8() says at every layer of every step: that it quantises from float16."""
    return "inputs will be cast from" not in str(record.msg)


class _Files:
    """Looks like a model to `base_fingerprint`: the parameters of a folder's model, read from its safetensors files."""

    def __init__(self, folder: Path, names: dict[str, str], files: dict[str, Path]) -> None:
        self.folder, self.names, self.files = folder, names, files

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        from safetensors import safe_open

        handles = {path: safe_open(str(path), framework="pt") for path in set(self.files.values())}
        for name, stored in self.names.items():
            yield name, handles[self.files[stored]].get_tensor(stored)  # mapped: pages are read as they are used


def as_in_files(folder: Path, config: Any) -> Any:
    """What `base_fingerprint` takes for the unquantised model of a folder, without loading it where names allow that.

    Names in files are the model's own, or have its base_model_prefix more or less, as transformers allows. Where that does
    not find every parameter (architectures whose weights transformers rearranges), the model is loaded into the host's memory.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(path), framework="pt") as handle:
                files |= dict.fromkeys(handle.keys(), path)
        except (SafetensorError, OSError) as error:
            raise LoralloyError(
                f"{path} cannot be read ({error}); it is incomplete or damaged, fetch it again"
            ) from None
    start = f"{getattr(model, 'base_model_prefix', '')}."
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names = {}
    for name in shapes:
        stored = next((n for n in (name, start + name, name.removeprefix(start)) if n in files), None)
        if stored is not None:
            names[name] = stored
    found = _Files(folder, names, files)
    if len(names) == len(shapes) and all(tuple(t.shape) == shapes[n] for n, t in found.named_parameters()):
        return found
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", use_safetensors=True)
