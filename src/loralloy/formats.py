"""Tensor names of adapter files: PEFT's, and those of diffusers and kohya, converted or refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .errors import LoralloyError
from .factors import Kind

_PREFIX = "base_model.model."
_PEFT = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?!weight$|bias$)[^.]+)?\.(?P<what>weight|bias)$")
_EMBEDDING = re.compile(r"^(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.[^.]+)?$")
_DOWN_UP = re.compile(
    r"^(?P<module>.+?)(?:\.lora_linear_layer|\.lora|_lora)?[._](?:lora[._])?(?P<side>down|up)\.weight$"
)
_SIDES = {"down": "A", "up": "B"}


@dataclass
class Layout:
    """Where each tensor of a file goes.

    modules: module -> {"A": key, "B": key}; kinds: module -> kind as far as the key tells; alphas: module -> key of a
    stored alpha; extra: name in the base model -> key of a full tensor (modules_to_save, embeddings).
    """

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    alphas: dict[str, str] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)

    def add(self, module: str, side: str, key: str) -> None:
        sides = self.modules.setdefault(module, {})
        if side in sides:
            raise LoralloyError(
                f"module {module!r} has two {side} factors ({sides[side]!r} and {key!r}); the file holds several adapters, "
                "save them one by one"
            )
        sides[side] = key


def layout(keys: Iterable[str], modules_to_save: Iterable[str] = ()) -> Layout:
    """Sort the keys of an adapter file. Raises LoralloyError for keys that cannot be understood or composed."""
    result = Layout()
    unknown: list[str] = []
    for key in keys:
        name = key.removeprefix(_PREFIX)
        if "lora_magnitude_vector" in name or name.endswith(".dora_scale"):
            raise LoralloyError(f"tensor {key!r} is a DoRA magnitude; DoRA is not s*B@A, retrain with use_dora=false")
        if name.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_")):
            raise LoralloyError(
                f"tensor {key!r} is in kohya's form, whose names cannot be turned back into module paths without the model; "
                "load it with diffusers (pipe.load_lora_weights) and save it again with pipe.save_lora_weights"
            )
        if match := _PEFT.match(name):
            if match["what"] == "bias":
                raise LoralloyError(
                    f"tensor {key!r} is a LoRA bias, which is not part of dW; retrain with lora_bias=false"
                )
            result.add(match["module"], match["side"], key)
        elif match := _EMBEDDING.match(name):
            result.add(match["module"], match["side"], key)
            result.kinds[match["module"]] = "embedding"
        elif name.endswith(".alpha"):
            result.alphas[name.removesuffix(".alpha")] = key
        elif (match := _DOWN_UP.match(name)) and "lora" in name:
            module = match["module"].replace(".processor.", ".")
            result.add(module, _SIDES[match["side"]], key)
        elif "lora_" in name:
            unknown.append(key)
        else:
            result.extra[re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.[^.]+$)", "", name)] = key
    if unknown:
        raise LoralloyError(
            f"tensor {unknown[0]!r} (and {len(unknown) - 1} more) is not a LoRA tensor that is understood"
        )
    for module, sides in result.modules.items():
        if len(sides) != 2:
            missing = "B" if "A" in sides else "A"
            raise LoralloyError(
                f"module {module!r} has no factor {missing}; the file is incomplete, fetch or save it again"
            )
    stray = set(result.alphas) - set(result.modules)
    for module in stray:
        raise LoralloyError(f"tensor {result.alphas[module]!r} is an alpha without factors; the file is incomplete")
    return result


def peft_key(module: str, side: str, kind: Kind) -> str:
    """The name PEFT gives a factor on disk."""
    if kind == "embedding":
        return f"{_PREFIX}{module}.lora_embedding_{side}"
    return f"{_PREFIX}{module}.lora_{side}.weight"


def extra_key(name: str) -> str:
    """The name PEFT gives a fully saved tensor on disk."""
    return _PREFIX + name


def front_matter(text: str) -> Mapping[str, object]:
    """The YAML header of a model card; empty if there is none or it is damaged."""
    import yaml

    match = re.match(r"\A---\s*\n(.*?)\n---", text, re.S)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}
