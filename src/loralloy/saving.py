"""What an adapter looks like on disk: PEFT's two files and a model card that says where it came from."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import LoralloyError
from .formats import extra_key, peft_key

if TYPE_CHECKING:
    from .adapter import Adapter


def cast(tensor: Tensor, dtype: torch.dtype | None, what: str) -> Tensor:
    """`tensor` in `dtype` (a counter stays what it is); raises LoralloyError if a finite number becomes infinite."""
    if dtype is None or tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    result = tensor.to(dtype)
    if not bool(torch.isfinite(result).all()):
        raise LoralloyError(f"{what} overflows {dtype_name(dtype)}; store it as bf16 or fp32 (--dtype)")
    return result


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}.get(
        dtype, str(dtype)
    )


def write_adapter(adapter: Adapter, folder: Path, dtype: torch.dtype | None) -> None:
    """Write adapter_config.json, adapter_model.safetensors and README.md into an empty folder."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for module in adapter:
        f = adapter[module]
        ranks[module], alphas[module] = f.rank, f.scaling * f.rank
        for side, tensor in (("A", f.A), ("B", f.B)):
            key = peft_key(module, side, f.kind)
            tensors[key] = cast(tensor.detach().cpu(), dtype, f"tensor {key!r}").contiguous()
    for name in adapter.extra:
        key = extra_key(name)
        tensors[key] = cast(adapter.extra_tensor(name).detach().cpu(), dtype, f"tensor {key!r}").contiguous()
    config = peft_config(adapter, ranks, alphas)
    recorded = {"version": 1, "base": adapter.base.to_dict()} | {
        k: v for k, v in adapter.provenance.items() if k not in ("version", "base")
    }
    weights = folder / "adapter_model.safetensors"
    save_file(tensors, weights, {"format": "pt", "loralloy": json.dumps(recorded)})
    _settle_header(weights)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(adapter, recorded), encoding="utf-8")
    # safetensors writes for the owner alone; a shared adapter is as readable as the files beside it
    (folder / "adapter_model.safetensors").chmod((folder / "README.md").stat().st_mode & 0o777)


def _settle_header(file: Path) -> None:
    """Sort the header's metadata, which safetensors writes in random order, so that equal adapters have equal bytes."""
    with open(file, "r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        settled = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(settled) == length:
            handle.seek(8)
            handle.write(settled)


def peft_config(adapter: Adapter, ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """A PEFT LoraConfig with only fields that every PEFT release since 0.5 knows, so that none warns.

    One rank and alpha where modules agree; patterns, keyed by escaped full module names, for the modules that do not.
    rsLoRA is folded into alpha.
    """
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas[m] for m in ranks if ranks[m] == rank).most_common(1)[0][0]
    config = adapter.config
    # The list that trained the adapter also names exactly these modules; one that came from a merge names them all.
    targets: Any = config.target_modules if config.target_modules else _targets(ranks)
    return {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "base_model_name_or_path": adapter.base.name,
        "revision": adapter.base.revision,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "target_modules": list(targets) if not isinstance(targets, str) else targets,
        "layers_to_transform": config.layers_to_transform,
        "rank_pattern": {_pattern(m, ranks): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {_pattern(m, ranks): _number(a) for m, a in alphas.items() if a != alpha},
        "fan_in_fan_out": config.fan_in_fan_out,
        "modules_to_save": list(config.modules_to_save) or None,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _targets(modules: Iterable[str]) -> list[str] | str:
    """Full names; as one regular expression if a name has no dot, since in a list "lin" would also mean "block.lin"."""
    names = sorted(modules)
    return names if all("." in name for name in names) else "|".join(map(re.escape, names))


def _pattern(module: str, modules: Iterable[str]) -> str:
    """A rank_pattern key for exactly this module: PEFT also matches the end of a name, hence `^` where that would hit."""
    return ("^" if any(other.endswith(f".{module}") for other in modules) else "") + re.escape(module)


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def card(adapter: Adapter, recorded: dict[str, Any]) -> str:
    """The model card: what it is, its parents with hashes and licences, and the merge's own error."""
    import yaml

    header: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "loralloy"]}
    if adapter.base.name and not adapter.base.name.startswith((".", "/")):
        header["base_model"] = adapter.base.name
    if adapter.licence:
        header["license"] = adapter.licence
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "", f"# {adapter.name}", ""]
    lines += [f"A LoRA adapter of {adapter.base}: {len(adapter)} modules, rank {adapter.max_rank}.", ""]
    merge = recorded.get("merge")
    if merge:
        lines += [
            f"Merged by LoRAlloy with rule `{merge['rule']}` in {merge['space']} space, rank `{merge['rank']}`.",
            "",
            "| error of dW against the exact weighted sum (relative, Frobenius) | |",
            "|---|---|",
            f"| before the cast | {merge['error']['before_cast']:.3e} |",
            f"| as stored ({merge['dtype']}) | {merge['error']['stored']:.3e} |",
            "",
            "| parent | weight | content hash | licence |",
            "|---|---|---|---|",
        ]
        for parent in merge["parents"]:
            weight = parent["weight"]
            shown = f"{weight:.6g}" if isinstance(weight, int | float) else "by module"
            licence = parent.get("licence") or "not stated"
            lines.append(f"| {parent['name']} | {shown} | `{parent['hash']}` | {licence} |")
        lines.append("")
    if recorded.get("training"):
        lines += ["Training record:", "", "```json", json.dumps(recorded["training"], indent=2), "```", ""]
    return "\n".join(lines)
