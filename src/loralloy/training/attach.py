"""The adapter that is trained: a fresh one by the seed, or the factors of one that was trained before."""

from __future__ import annotations

import warnings
from typing import Any

from ..adapter import Adapter
from ..errors import LoralloyError
from .config import TrainConfig
from .data import mix


def attach(model: Any, config: TrainConfig, base_name: str, revision: str | None) -> Any:
    """`model` with a LoRA adapter in float32 (a PeftModel): initialised by the seed alone, or from `config.init_adapter`.

    Raises LoralloyError when a target module is not in the model, or the adapter to go on from does not fit.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    targets = config.target_modules
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    missing = [] if isinstance(targets, str) else [t for t in targets if t.rsplit(".", 1)[-1] not in names]
    if missing:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise LoralloyError(
            f"target module {missing[0]!r} is not in this model; it has {', '.join(linear)} "
            "(or pass --target-modules all-linear)"
        )
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.23 by a name it is giving up
        torch.manual_seed(mix(config.seed))
        # autocast_adapter_dtype (on by default) keeps the factors in float32 over a bfloat16 base
        peft_model = get_peft_model(model, lora)
    # set afterwards: peft takes the folder the base was loaded from, and warns about any other name
    peft_model.peft_config["default"].base_model_name_or_path = base_name
    peft_model.peft_config["default"].revision = revision
    if config.init_adapter is not None:
        _start_from(peft_model, Adapter.load(config.init_adapter), config)
    return peft_model


def _start_from(peft_model: Any, adapter: Adapter, config: TrainConfig) -> None:
    """Copy the factors of `adapter` into the fresh ones; raises LoralloyError unless they are of one shape and scaling."""
    import torch

    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in peft_model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    if set(layers) != set(adapter):
        odd = sorted(set(layers) ^ set(adapter))[0]
        raise LoralloyError(
            f"--init-adapter {adapter.name!r} and --target-modules differ in {odd!r}; train the same modules"
        )
    with torch.no_grad():
        for name, module in layers.items():
            f = adapter[name]
            if f.rank != config.rank or abs(f.scaling - module.scaling["default"]) > 1e-6 * abs(f.scaling):
                raise LoralloyError(
                    f"--init-adapter {adapter.name!r} has rank {f.rank} and scaling {f.scaling:g} at {name!r}; pass --rank "
                    f"{f.rank} --alpha {f.scaling * f.rank:g} to go on from it"
                )
            module.lora_A["default"].weight.copy_(f.A)
            module.lora_B["default"].weight.copy_(f.B)
