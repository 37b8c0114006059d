"""The base model: loaded from a folder or a pinned hub revision, in a dtype that is fast here, known by its weights."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Iterator
from typing import Any

from .. import hub
from ..errors import LoralloyError
from .quantised import MARK, as_in_files, check_kind, settings, settle

FINGERPRINT = "bf16-sampled-v1"
_SAMPLES = 4096  # elements a tensor; enough that two trainings of one architecture cannot agree by chance
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_device(device: str = "auto") -> Any:
    """The torch.device for "auto" (CUDA, else MPS, else CPU) or for a given name."""
    import torch

    if device != "auto":
        try:
            chosen = torch.device(device)
        except RuntimeError as error:
            raise LoralloyError(f"device {device!r} is not one torch knows; use auto, cpu, cuda or cuda:N") from error
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise LoralloyError(f"device {device!r}: torch sees no CUDA GPU here; use --device cpu")
        return chosen
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@functools.cache
def _fast_cpu_dtype() -> str:
    """bfloat16 only where the processor is fast at it (AMX, AVX512-BF16): elsewhere torch emulates it slowly.

    Measured, because the flags do not tell what torch's build makes of them. The shapes are an MLP's: milliseconds.
    """
    import torch

    seconds = {}
    with torch.no_grad():
        for name in ("float32", "bfloat16"):
            x = torch.ones(256, 576, dtype=getattr(torch, name))
            w = torch.ones(1536, 576, dtype=getattr(torch, name))
            torch.nn.functional.linear(x, w)  # the first call picks and compiles kernels
            runs = []
            for _ in range(15):  # the best counts: another job may hold the cores during some
                start = time.perf_counter()
                torch.nn.functional.linear(x, w)
                runs.append(time.perf_counter() - start)
            seconds[name] = min(runs)
    return min(seconds, key=lambda name: seconds[name])


def pick_dtype(dtype: str, device: Any) -> Any:
    """The torch.dtype for "auto" (bfloat16 on an accelerator; on a CPU whichever of bfloat16 and float32 is faster)."""
    import torch

    if dtype not in _DTYPES:
        raise LoralloyError(f"dtype {dtype!r} is unknown; use one of {', '.join(_DTYPES)}")
    if dtype == "auto":
        dtype = _fast_cpu_dtype() if device.type == "cpu" else "bfloat16"
    return getattr(torch, dtype)


def load_base(
    model: str, dtype: str = "auto", device: str = "auto", quantisation: str | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer for inference: ``(model.eval(), tokenizer)``.

    model: a folder in transformers' format, or a hub id with a pinned ``org/name@revision`` (HF_HUB_OFFLINE is respected; only
    safetensors are read, never a pickle). dtype: "auto", "float32", "bfloat16" or "float16" (see :func:`pick_dtype`).
    quantisation: "4bit" (NF4, computed in `dtype`) or "8bit" (LLM.int8()) packs the linear layers with bitsandbytes while they
    are loaded; it stays the base of its files (:func:`base_fingerprint`).
    The tokenizer pads on the left and always has a pad token.

    Raises LoralloyError when the folder or the hub revision is missing or is no model, with the way to get it; and when
    bitsandbytes is asked for and is missing, does not run on the device, or the files are quantised already.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise LoralloyError("running a model needs transformers: pip install 'loralloy[live]'") from None

    if not model:
        raise LoralloyError("the model is empty; give a folder, or a hub id as org/name@revision")
    if quantisation is not None:
        check_kind(quantisation)
    target = pick_device(device)
    wanted = pick_dtype(dtype, target)
    try:
        folder = hub.resolve(os.path.expanduser(model), "model", _MODEL_FILES)
    except LoralloyError as error:
        raise LoralloyError(
            f"{error} (`make setup` makes the demo's model, .assets/models/SmolLM2-135M-Instruct)"
        ) from None
    if not (folder / "config.json").is_file():
        raise LoralloyError(
            f"{folder} has no config.json, so it is no transformers model; `make setup` builds the demo's"
        )
    try:
        more: dict[str, Any] = {}
        mark = ""
        if quantisation is not None:
            config = AutoConfig.from_pretrained(str(folder))
            if getattr(config, "quantization_config", None) is not None:
                raise LoralloyError(
                    f"{model} is quantised already, in its files; leave {quantisation} out, or pass the unquantised model"
                )
            mark = base_fingerprint(as_in_files(folder, config))
            more = {"quantization_config": settings(quantisation, wanted, target), "device_map": {"": target}}
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        loaded = AutoModelForCausalLM.from_pretrained(str(folder), dtype=wanted, use_safetensors=True, **more)
        if quantisation is not None:
            setattr(loaded, MARK, mark)
            settle(loaded, wanted)
    except LoralloyError:
        raise
    except ImportError as error:  # files that are quantised may need a package
        raise LoralloyError(f"cannot load the model {model}: {' '.join(str(error).split())}") from error
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoralloyError(
            f"cannot load the model {model}: {first} (fetch it again, or pass another folder)"
        ) from error
    agree_on_the_end(loaded, tokenizer)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise LoralloyError(f"the tokenizer of {model} has neither a pad nor an eos token; set one in its config")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return (loaded if quantisation else loaded.to(target)).eval(), tokenizer


def agree_on_the_end(model: Any, tokenizer: Any) -> None:
    """Make the tokenizer's eos one that the model stops at: an adapter trained with another would never end its answers.

    Seen with transformers 5.17, which reads another eos from SmolLM2's GGUF than the model's configuration names.
    """
    ends: list[int] = []
    for config in (getattr(model, "generation_config", None), model.config):
        eos = getattr(config, "eos_token_id", None)
        ends += [i for i in (eos if isinstance(eos, list | tuple) else [eos]) if i is not None]
    if ends and tokenizer.eos_token_id not in ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])


def _base_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """The base's own parameters under their plain names, whatever PEFT has wrapped around them; tied ones once."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
            continue
        if parts[:2] == ["base_model", "model"]:
            parts = parts[2:]
        yield ".".join(part for part in parts if part not in ("base_layer", "original_module")), parameter


def base_fingerprint(model: Any) -> str:
    """``bf16-sampled-v1:<sha256>`` of a base's weights: the same however it was loaded, different after any training.

    Over the sorted parameters: name, shape and up to 4096 evenly strided elements, cast to bfloat16. A bfloat16
    checkpoint therefore has one fingerprint in bfloat16 and float32; a LoRA adapter on top (PEFT) does not change it. A base
    that :func:`load_base` quantised has that of its files.
    Raises LoralloyError for weights that are not loaded (meta device) or were quantised elsewhere.
    """
    import torch

    for part in model.modules() if isinstance(model, torch.nn.Module) else ():
        if MARK in part.__dict__:
            return str(part.__dict__[MARK])
    digest, samples = hashlib.sha256(), []
    for name, parameter in sorted(_base_parameters(model), key=lambda item: item[0]):
        # bitsandbytes may store 4 bits in a tensor of a floating dtype
        quantised = not parameter.is_floating_point() or getattr(parameter, "quant_state", None) is not None
        if parameter.device.type == "meta" or quantised:
            kind = "not loaded" if parameter.device.type == "meta" else f"{parameter.dtype}, quantised"
            raise LoralloyError(
                f"parameter {name} is {kind}: load the base in bfloat16 or float32 to compare fingerprints"
            )
        flat = parameter.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to(torch.bfloat16))
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
    if not samples:
        raise LoralloyError("the model has no parameters to take a fingerprint of")
    if len({s.device for s in samples}) > 1:
        samples = [s.cpu() for s in samples]
    # One transfer for the whole model: a copy for each tensor would wait on the GPU hundreds of times.
    digest.update(torch.cat(samples).cpu().view(torch.int16).numpy().tobytes())
    return f"{FINGERPRINT}:{digest.hexdigest()}"
