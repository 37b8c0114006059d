"""adapter_config.json: what it says of each module's scaling, and what in it cannot be composed right."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import LoralloyError

# Fields that change what the adapter computes beyond dW = s B A, each with the way out.
_REFUSED: dict[str, str] = {
    "use_dora": "DoRA rescales the base weight's columns, so its update is not s*B@A; retrain with use_dora=false, or merge "
    "it into the base model with PEFT's merge_and_unload",
    "lora_bias": "the bias of B is not part of dW; retrain with lora_bias=false",
    "target_parameters": "updates of bare parameters (mixture-of-experts weights) are not composed yet; target modules",
    "kasa_config": "KaSA has a diagonal between A and B; fold it into A first",
    "alora_invocation_tokens": "an activated LoRA switches on inside a prompt; it cannot be one dW",
    "use_qalora": "QALoRA pools its input, so dW is not s*B@A; retrain without it",
    "use_bdlora": "block-diagonal LoRA factors do not fit A [r, in] and B [out, r]; retrain without use_bdlora",
    "arrow_config": "this is a router over other adapters, not an adapter; load those adapters instead",
    "monteclora_config": "MonteCLoRA draws its factors at random; export a plain LoRA first",
    "layer_replication": "the base has replicated layers; adapters of it do not fit the plain base",
    "trainable_token_indices": "trained token rows are not low-rank updates; retrain without trainable_token_indices",
    "megatron_config": "Megatron-parallel layers split A and B; gather them into a plain adapter first",
}
# Initialisations that subtract from the base weights: the adapter alone is then not the change it made.
_MUTATED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_HARMLESS = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "target_modules",
    "exclude_modules", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "inference_mode", "auto_mapping", "peft_version",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "runtime_config", "ensure_weight_tying", "velora_config",
}  # fmt: skip


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The entry of rank_pattern or alpha_pattern for `module`: first key that matches `(.*\\.)?(key)$`, as PEFT does."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class AdapterConfig:
    """The part of a PEFT LoRA configuration that composition needs.

    `scaling(module, rank)` is alpha/r, or alpha/sqrt(r) with rsLoRA, after rank_pattern and alpha_pattern.
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()
    target_modules: tuple[str, ...] | str | None = None
    layers_to_transform: Any = None
    task_type: str | None = None
    base_name: str | None = None
    base_revision: str | None = None

    def scaling(self, module: str, rank: int) -> float:
        """Scaling of a module whose factors have `rank` rows. Raises LoralloyError if the file and its ranks disagree."""
        said = pattern_value(self.rank_pattern, module, self.rank)
        if said != rank:
            raise LoralloyError(
                f"A has {rank} rows but the configuration says rank {said} (fields r and rank_pattern); "
                "the folder mixes files of two adapters, or rank_pattern is damaged"
            )
        alpha = float(pattern_value(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @staticmethod
    def read(path: Path) -> AdapterConfig:
        """Parse adapter_config.json. Raises LoralloyError naming file and field for what cannot be composed right."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise LoralloyError(f"{path}: not valid JSON ({error}); the file is damaged, fetch it again") from None
        if not isinstance(raw, dict):
            raise LoralloyError(f"{path}: expected a JSON object, found {type(raw).__name__}")
        try:
            return AdapterConfig.from_dict(raw)
        except LoralloyError as error:
            raise error.within(str(path)) from None

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> AdapterConfig:
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise LoralloyError(f"field 'peft_type' is {kind!r}; only LORA adapters can be composed")
        for name, way_out in _REFUSED.items():
            if raw.get(name):
                raise LoralloyError(f"field {name!r} is {raw[name]!r}: {way_out}")
        init = raw.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_MUTATED_INITS):
            raise LoralloyError(
                f"field 'init_lora_weights' is {init!r}, which changed the base weights at the start of training; save the "
                "adapter with PEFT's path_initial_model_for_weight_conversion, which turns it into a plain LoRA"
            )
        if raw.get("bias", "none") != "none":
            raise LoralloyError(
                f"field 'bias' is {raw['bias']!r}: trained biases are not part of dW; retrain with bias='none'"
            )
        for name, value in raw.items():
            if name not in _HARMLESS and name not in _REFUSED and value:
                raise LoralloyError(
                    f"field {name!r} is {value!r}, which this version does not know, so the result could be wrong; remove "
                    "the field if it does not change what the adapter computes"
                )
        rank, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise LoralloyError(f"field 'r' is {rank!r}; it must be a positive integer")
        if not _is_number(alpha):
            raise LoralloyError(f"field 'lora_alpha' is {alpha!r}; it must be a number")
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = raw.get(name) or {}
            if not isinstance(patterns, Mapping):
                raise LoralloyError(f"field {name!r} is {patterns!r}; it must map module names to numbers")
            for key, value in patterns.items():
                try:
                    re.compile(key)
                except re.error:
                    raise LoralloyError(f"field {name!r}: key {key!r} is not a valid regular expression") from None
                if not _is_number(value) or (name == "rank_pattern" and (value < 1 or value != int(value))):
                    raise LoralloyError(f"field {name!r}: value {value!r} of {key!r} is not a valid number")
        targets, layers = raw.get("target_modules"), raw.get("layers_to_transform")
        if raw.get("exclude_modules") or raw.get("layers_pattern"):
            targets = layers = None  # they narrow the targets; the factors themselves say which modules there are
        return AdapterConfig(
            rank=rank,
            alpha=float(alpha),
            use_rslora=bool(raw.get("use_rslora")),
            rank_pattern=dict(raw.get("rank_pattern") or {}),
            alpha_pattern=dict(raw.get("alpha_pattern") or {}),
            fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
            modules_to_save=tuple(raw.get("modules_to_save") or ()),
            target_modules=targets if isinstance(targets, str) or targets is None else tuple(targets),
            layers_to_transform=layers,
            task_type=raw.get("task_type"),
            base_name=raw.get("base_model_name_or_path") or None,
            base_revision=raw.get("revision") or None,
        )
