"""What an adapter looks like on disk: PEFT's two files and a model card that says where it came from."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .adapter_config import AdapterConfig
from .base_ref import BaseRef
from .errors import LoralloyError
from .factors import Kind, LoraFactors
from .formats import extra_key, peft_key
from .tensor_file import Spec, TensorFile, metadata_room

if TYPE_CHECKING:
    from .adapter import Adapter


def cast(tensor: Tensor, dtype: torch.dtype | None, what: str) -> Tensor:
    """`tensor` in `dtype` (a counter stays what it is); raises LoralloyError if a finite number becomes infinite."""
    if dtype is None or tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    result = tensor.to(dtype)
    if not bool(torch.isfinite(result).all()):
        if dtype == torch.float16 and bool(torch.isfinite(tensor.float()).all()):
            raise LoralloyError(f"{what} overflows fp16; store it as bf16 or fp32 (--dtype)")
        raise LoralloyError(f"{what} overflows {dtype_name(dtype)}; its values are too large, for fp32 too")
    return result


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}.get(
        dtype, str(dtype)
    )


def outline(
    a_shape: Sequence[int], b_shape: Sequence[int], dtype: torch.dtype, scaling: float = 1.0, kind: Kind = "linear"
) -> LoraFactors:
    """Factors without values (meta device), A [r, in] and B [out, r]: what a module will look like."""
    a, b = (torch.empty(tuple(shape), dtype=dtype, device="meta") for shape in (a_shape, b_shape))
    return LoraFactors(a, b, scaling, kind)


def header(base: BaseRef, provenance: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of adapter_model.safetensors: the base, and where the adapter came from."""
    recorded = {"version": 1, "base": base.to_dict()} | {
        k: v for k, v in provenance.items() if k not in ("version", "base")
    }
    return {"format": "pt", "loralloy": json.dumps(recorded)}


class AdapterWriter:
    """adapter_config.json, adapter_model.safetensors and README.md in an empty folder, one module in memory at a time.

    A context manager; the three files are whole only after :meth:`finish`.

    Args:
        folder: an empty folder that exists (see :func:`loralloy.atomic.atomic_folder`).
        name: of the adapter, for the card.
        base, config: what goes into adapter_config.json; rank, alpha and their patterns come from `modules`.
        modules: module -> its outline (see :func:`outline` and `Adapter.outline`): shapes, scaling, kind, dtype.
        extra: name -> (dtype, shape) of fully saved tensors.
        dtype: cast to; None keeps the dtype of each outline. Integers stay what they are.
        reserve: bytes kept in the header for what `finish` records (`metadata_room(header(...))`, or an estimate; where it
            takes more, the data is moved once).

    Raises LoralloyError when a cast overflows, when a tensor is not the announced one, or when one is missing at the end.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        base: BaseRef,
        config: AdapterConfig,
        modules: Mapping[str, LoraFactors],
        extra: Mapping[str, Spec] | None = None,
        dtype: torch.dtype | None = None,
        reserve: int = 0,
    ) -> None:
        self.folder, self.name, self.base, self.config = folder, name, base, config
        self._modules, self._dtype = dict(modules), dtype
        specs: dict[str, Spec] = {}
        for module, f in self._modules.items():
            for side, tensor in (("A", f.A), ("B", f.B)):
                specs[peft_key(module, side, f.kind)] = self._stored(tensor.dtype), tensor.shape
        for extra_name, (of, shape) in (extra or {}).items():
            specs[extra_key(extra_name)] = self._stored(of), shape
        self._file = TensorFile(folder / "adapter_model.safetensors", specs, reserve)

    def _stored(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype

    def __enter__(self) -> AdapterWriter:
        self._file.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.__exit__(kind, error, at)

    def write(self, module: str, factors: LoraFactors) -> None:
        """Cast and write one module's A and B, on whatever device they are."""
        said = self._modules.get(module)
        if said is None or (said.kind, said.scaling) != (factors.kind, factors.scaling):
            raise LoralloyError(
                f"module {module!r} ({factors.kind}, scaling {factors.scaling:g}) is not what was announced "
                f"({f'{said.kind}, scaling {said.scaling:g}' if said else 'nothing'})"
            )
        for side, tensor in (("A", factors.A), ("B", factors.B)):
            self._write(peft_key(module, side, factors.kind), tensor)

    def write_extra(self, name: str, tensor: Tensor) -> None:
        """Cast and write one fully saved tensor, by its name in the base model."""
        self._write(extra_key(name), tensor)

    def _write(self, key: str, tensor: Tensor) -> None:
        self._file.write(key, cast(tensor.detach(), self._dtype, f"tensor {key!r}"))

    def finish(self, provenance: Mapping[str, Any] | None = None, licence: str | None = None) -> None:
        """Write the header, the configuration and the card."""
        ranks = {module: f.rank for module, f in self._modules.items()}
        alphas = {module: f.scaling * f.rank for module, f in self._modules.items()}
        self._file.finish(header(self.base, provenance or {}))
        config = json.dumps(peft_config(self, ranks, alphas), indent=2, sort_keys=True)
        (self.folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
        text = card(self.name, self.base, ranks, provenance or {}, licence)
        (self.folder / "README.md").write_text(text, encoding="utf-8")


def write_adapter(adapter: Adapter, folder: Path, dtype: torch.dtype | None) -> None:
    """Write adapter_config.json, adapter_model.safetensors and README.md into an empty folder, module by module."""
    with AdapterWriter(
        folder,
        adapter.name,
        adapter.base,
        adapter.config,
        {module: adapter.outline(module) for module in adapter},
        {name: (t.dtype, t.shape) for name, t in ((n, adapter.outline_extra(n)) for n in adapter.extra)},
        dtype,
        metadata_room(header(adapter.base, adapter.provenance)),
    ) as writer:
        for module in adapter:
            writer.write(module, adapter[module])
        for name in adapter.extra:
            writer.write_extra(name, adapter.extra_tensor(name))
        writer.finish(adapter.provenance, adapter.licence)


class _Configured(Protocol):
    @property
    def base(self) -> BaseRef: ...
    @property
    def config(self) -> AdapterConfig: ...


def peft_config(adapter: _Configured, ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """A PEFT LoraConfig with only fields that every PEFT release since 0.5 knows, so that none warns.

    One rank and alpha where modules agree; patterns, keyed by escaped full module names, for the modules that do not.
    rsLoRA is folded into alpha.
    """
    config = adapter.config
    rank, alpha = config.rank, config.alpha
    if ranks:
        rank = Counter(ranks.values()).most_common(1)[0][0]
        alpha = Counter(alphas[m] for m in ranks if ranks[m] == rank).most_common(1)[0][0]
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


def card(
    name: str, base: BaseRef, ranks: Mapping[str, int], recorded: Mapping[str, Any], licence: str | None = None
) -> str:
    """The model card: what it is, its parents with hashes and licences, and the merge's own error."""
    import yaml

    front: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "loralloy"]}
    if base.name and not base.name.startswith((".", "/")):
        front["base_model"] = base.name
    if licence:
        front["license"] = licence
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    lines += [f"A LoRA adapter of {base}: {len(ranks)} modules, rank {max(ranks.values(), default=0)}.", ""]
    merge = recorded.get("merge")
    if merge:
        lines += [
            f"Merged by LoRAlloy with rule `{_call(merge['rule'], merge.get('parameters'))}` in {merge['space']} space, "
            f"rank `{merge['rank']}`.",
            *(
                f"Plug-in {when} the rule: `{_call(merge[when]['name'], merge[when].get('parameters'))}`."
                for when in ("before", "after")
                if merge.get(when)
            ),
            "",
            "| error of dW against the exact weighted sum (relative, Frobenius) | |",
            "|---|---|",
            f"| before the cast | {_figure(merge['error']['before_cast'])} |",
            f"| as stored ({merge['dtype']}) | {_figure(merge['error']['stored'])} |",
            "",
            "| parent | weight | content hash | licence |",
            "|---|---|---|---|",
        ]
        for parent in merge["parents"]:
            weight = parent["weight"]
            shown = f"{weight:.6g}" if isinstance(weight, int | float) else "by module"
            licence = parent.get("licence") or "not stated"
            freed = ", freed of what its inputs shared" if "freed_from" in parent else ""
            lines.append(
                f"| {parent['name']} | {shown} | `{parent.get('freed_from', parent['hash'])}`{freed} | {licence} |"
            )
        lines.append("")
    told = recorded.get("tada") or {}
    if told.get("freed"):
        count, who = told["freed"]["directions"], ", ".join(told["freed"]["share"])
        what = (
            "a direction of each module that all inputs shared"
            if count == 1
            else f"{count} directions of each module that all inputs shared"
        )
        lines += [f"Freed before the merge of {what}: {who}.", ""]
    if (even := told.get("balanced") or recorded.get("balanced")) and even["after"] != even["before"]:
        lines += [
            f"Balanced afterwards at `{even['module']}`: the errors above are of the merge before that.",
            "",
        ]
    if recorded.get("training"):
        lines += ["Training record:", "", "```json", json.dumps(recorded["training"], indent=2), "```", ""]
    return "\n".join(lines)


def _call(name: str, parameters: Mapping[str, Any] | None) -> str:
    """ties(density=0.2, majority=total); the name alone where a record has no parameters."""
    return f"{name}({', '.join(f'{k}={v}' for k, v in parameters.items())})" if parameters else name


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3e}"
