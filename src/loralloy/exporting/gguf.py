"""An adapter as a GGUF LoRA, which llama.cpp adds to a model of its own format (`llama-cli -m base.gguf --lora adapter.gguf`).

The file holds A and B of each module under llama.cpp's tensor name, with `.lora_a` and `.lora_b`, and one alpha for all:
llama.cpp adds alpha / r * B @ A, r being B's number of columns. Conventions are those of llama.cpp's convert_lora_to_gguf.py.
"""

from __future__ import annotations

import math
import os
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import hub
from ..adapter import Adapter
from ..atomic import check_free
from ..errors import LoralloyError
from ..factors import LoraFactors, difference, norm
from .checkpoint import read_json

DTYPES = {"f32": torch.float32, "f16": torch.float16}
# transformers' class -> llama.cpp's architecture, where one module is one tensor there. Of Llama and Mistral, llama.cpp
# rotates neighbouring rows of q and k, where transformers rotates halves: their rows are in another order.
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "GPT2LMHeadModel": "gpt2",
}

_COPY = ".base_layer."  # in the names that PEFT gives to a layer's own tensors where an adapter lies over it
_VOCABULARY = ("embed_tokens.base_layer.weight", "wte.base_layer.weight", "lm_head.base_layer.weight")


@dataclass(frozen=True)
class ExportedGguf:
    """What was written. `tensors`: module -> llama.cpp's tensor; `folded`: modules whose B holds part of the scaling;
    `lost`: ||dW_stored - dW|| / ||dW||; `notes`: what to know about it.
    """

    path: Path
    architecture: str
    alpha: float
    dtype: str
    tensors: Mapping[str, str]
    folded: list[str]
    lost: float
    notes: list[str] = field(default_factory=list)


def export_gguf(
    adapter: Adapter,
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: str = "f32",
    weight: float = 1.0,
    overwrite: bool = False,
    on_module: Callable[[str], None] | None = None,
) -> ExportedGguf:
    """Write the adapter as one GGUF file, module by module.

    Args:
        adapter: the adapter.
        out: the file to write.
        base: the base's folder or ``org/name@revision``, of which config.json is read; None for the one that the adapter
            names.
        dtype: "f32", or "f16" (half the size; rounds).
        weight: factor of dW.
        overwrite: replace an existing file.
        on_module: called with each module's name when it is written.

    Raises LoralloyError for an architecture whose names do not map one to one, and for what llama.cpp cannot take: modules
    without a tensor there, convolutions, fully saved tensors, and adapters of embeddings that the base ties.
    """
    if dtype not in DTYPES:
        raise LoralloyError(f"--dtype {dtype!r} is not one of a GGUF LoRA; choose {' or '.join(DTYPES)}")
    if not math.isfinite(weight):
        raise LoralloyError(f"weight {weight} is not a number to scale by; give a finite one")
    try:
        import gguf
    except ImportError:
        raise LoralloyError("writing a GGUF needs the package gguf: pip install 'gguf>=0.17'") from None
    target = Path(out).absolute()
    check_free(target, overwrite)
    if target.is_dir():
        raise LoralloyError(f"--out {target} is a folder; a GGUF LoRA is one file, name it (adapter.gguf)")
    config = _config(adapter, base)
    architecture = _architecture(config)
    tensors, notes = _tensors(adapter, config, architecture), _copies(adapter, config)
    outlines = {module: adapter.outline(module) for module in tensors}
    alpha, ratios = _alpha(outlines, weight)
    kind = gguf.GGMLQuantizationType.F32 if dtype == "f32" else gguf.GGMLQuantizationType.F16

    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(adapter.name)
    if adapter.licence:
        writer.add_license(adapter.licence)
    if adapter.base.name:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, adapter.base.name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "f32" else gguf.LlamaFileType.MOSTLY_F16)
    for module, tensor in tensors.items():
        f = outlines[module]
        embedding = f.kind == "embedding"
        for side, shape in (("lora_a", f.A.T.shape if embedding else f.A.shape), ("lora_b", f.B.shape)):
            size = math.prod(shape) * DTYPES[dtype].itemsize
            numpy_dtype: Any = torch.empty(0, dtype=DTYPES[dtype]).numpy().dtype
            writer.add_tensor_info(f"{tensor}.{side}", list(shape), numpy_dtype, size, kind)

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.new-{os.getpid()}-{secrets.token_hex(4)}")
    lost = total = 0.0
    try:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for module in tensors:
            f = adapter[module]
            stored = _stored(f, ratios[module], alpha, DTYPES[dtype], module)
            if stored.A.dtype.itemsize < f.A.dtype.itemsize or stored.B.dtype.itemsize < f.B.dtype.itemsize:
                wanted = LoraFactors(f.A, f.B, f.scaling * weight, f.kind)
                lost, total = lost + difference(stored, wanted) ** 2, total + norm(wanted) ** 2
            b = _permuted(stored.B, module, config) if architecture == "llama" else stored.B
            for part in (stored.A.T if f.kind == "embedding" else stored.A, b):
                writer.write_tensor_data(part.contiguous().numpy())
            if on_module:
                on_module(module)
        writer.close()
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    folded = [module for module, ratio in ratios.items() if ratio != 1]
    relative = math.sqrt(lost / total) if total else 0.0
    return ExportedGguf(target, architecture, alpha, dtype, tensors, folded, relative, notes)


def _config(adapter: Adapter, base: str | os.PathLike[str] | None) -> dict[str, Any]:
    """config.json of the base."""
    ref = base or adapter.base.name
    if ref is None:
        raise LoralloyError(f"adapter {adapter.name!r} names no base model; pass its folder as --base")
    if base is None and adapter.base.revision and not Path(ref).is_dir():
        ref = f"{ref}@{adapter.base.revision}"
    try:
        folder = hub.resolve(os.path.expanduser(ref), "model", ["config.json"])
    except LoralloyError as error:
        if base:
            raise
        raise LoralloyError(
            f"the base that adapter {adapter.name!r} names, {ref}, is not here; pass its folder, or org/name@revision, as "
            "--base (its config.json is read)"
        ) from error
    if not (folder / "config.json").is_file():
        raise LoralloyError(
            f"{folder} has no config.json, which tells the architecture; pass the base's folder as --base"
        )
    return read_json(folder / "config.json")


def _architecture(config: Mapping[str, Any]) -> str:
    name = str((config.get("architectures") or ["none"])[0])
    if name not in _ARCHITECTURES:
        raise LoralloyError(
            f"the base's architecture is {name}, whose modules cannot be named for llama.cpp here; known: "
            f"{', '.join(_ARCHITECTURES)}. Export into the base (--into) and convert that with llama.cpp"
        )
    return _ARCHITECTURES[name]


def _tensors(adapter: Adapter, config: Mapping[str, Any], architecture: str) -> dict[str, str]:
    """Module -> llama.cpp's tensor name. Raises LoralloyError for what has none."""
    import gguf

    kept = [n for n in adapter.extra if _COPY not in n]
    if kept:
        raise LoralloyError(
            f"adapter {adapter.name!r} saved whole tensors ({kept[0]}), which a GGUF LoRA cannot hold; export into the base "
            "(--into) and convert that with llama.cpp"
        )
    layers = config.get("num_hidden_layers", config.get("n_layer", 0))
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, int(layers))
    tied = config.get("tie_word_embeddings")
    if tied is None:  # the model's own default
        tied = architecture in ("gpt2", "gemma", "gemma2", "gemma3")
    result: dict[str, str] = {}
    for module in adapter:
        outline = adapter.outline(module)
        name = names.get_name(module) or names.get_name(f"model.{module}") or names.get_name(f"transformer.{module}")
        if name is None or outline.kind == "conv":
            raise LoralloyError(
                f"module {module!r} ({outline.kind}) is no tensor of llama.cpp's {architecture} with {layers} layers; leave it "
                "out of the adapter, or check --base"
            )
        if name in ("token_embd", "output") and tied:
            raise LoralloyError(
                f"module {module!r}: the base ties its two embeddings, and llama.cpp cannot adapt one of them; export into "
                "the base (--into), which unties them, and convert that with llama.cpp"
            )
        if (name == "token_embd") != (outline.kind == "embedding"):
            raise LoralloyError(f"module {module!r}: a {outline.kind} module cannot be llama.cpp's tensor {name!r}")
        result[module] = f"{name}.weight"
    twice = [module for module, name in result.items() if Counter(result.values())[name] > 1]
    if twice:
        raise LoralloyError(
            f"modules {', '.join(map(repr, twice))} are one tensor of llama.cpp's; the adapter's names are mixed"
        )
    return result


def _copies(adapter: Adapter, config: Mapping[str, Any]) -> list[str]:
    """What to know about tensors that PEFT saved of layers under adapters: the base's own, unless its vocabulary was resized.

    Raises LoralloyError for a vocabulary that is not the base's.
    """
    copies, vocabulary = [n for n in adapter.extra if _COPY in n], config.get("vocab_size")
    for name in copies:
        rows = adapter.outline_extra(name).shape[0]
        if vocabulary and rows != vocabulary and name.endswith(_VOCABULARY):
            raise LoralloyError(
                f"adapter {adapter.name!r} saved {name} with {rows} rows, but the base's vocabulary has {vocabulary}; a GGUF "
                "LoRA cannot hold it. Save the base after model.resize_token_embeddings(...), export into that (--into) and "
                "convert the result with llama.cpp"
            )
    if not copies:
        return []
    return [
        f"left out: {', '.join(copies)}; PEFT saved them as the base's own values, which was not checked. If the adapter's "
        "training changed them, export into the base (--into)"
    ]


def _alpha(outlines: Mapping[str, LoraFactors], weight: float) -> tuple[float, dict[str, float]]:
    """The file's one alpha (a float32, never 0, which would mean scaling 1), and what each B is multiplied by."""
    alphas = {module: f.scaling * weight * f.rank for module, f in outlines.items()}
    common = Counter(a for a in alphas.values() if a).most_common(1)
    alpha = float(torch.tensor(common[0][0] if common else 1.0, dtype=torch.float32))
    return alpha, {module: 1.0 if math.isclose(a, alpha, rel_tol=1e-6) else a / alpha for module, a in alphas.items()}


def _stored(f: LoraFactors, ratio: float, alpha: float, dtype: torch.dtype, module: str) -> LoraFactors:
    """The factors as llama.cpp reads them: scaling alpha / r."""
    b = f.B if ratio == 1 else f.B.double() * ratio
    sides = [tensor.to(dtype).cpu() for tensor in (f.A, b)]
    for side, tensor in zip("AB", sides, strict=True):
        if not bool(torch.isfinite(tensor).all()):
            narrow = dtype == torch.float16 and bool(torch.isfinite((f.A if side == "A" else b).float()).all())
            way_out = (
                "overflows fp16; write it as f32 (--dtype f32)" if narrow else "overflows fp32; give a smaller --weight"
            )
            raise LoralloyError(f"{side} of module {module!r} {way_out}")
    return LoraFactors(sides[0], sides[1], alpha / f.rank, f.kind)


def _permuted(b: Tensor, module: str, config: Mapping[str, Any]) -> Tensor:
    """B of q_proj and k_proj with each head's rows [first half, second half] interleaved, as llama.cpp rotates them."""
    part = module.rsplit(".", 1)[-1]
    if part not in ("q_proj", "k_proj"):
        return b
    heads = int(config["num_attention_heads"])
    if part == "k_proj":
        heads = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))
    if b.shape[0] != heads * size:
        raise LoralloyError(
            f"module {module!r} has {b.shape[0]} outputs, but the base's configuration says {heads} heads of {size}; --base is "
            "not the base of this adapter"
        )
    return b.reshape(heads, 2, size // 2, -1).transpose(1, 2).reshape(b.shape)
