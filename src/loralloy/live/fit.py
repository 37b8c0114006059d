"""Whether factors fit the modules of a loaded model: asked once, before any hook is set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..base_ref import BaseRef, Verdict, compare
from ..errors import LoralloyError
from ..factors import LoraFactors

if TYPE_CHECKING:
    from ..bank import Bank


def compare_base(bank: Bank, base: BaseRef, model: nn.Module) -> tuple[Verdict, str]:
    """Whether the loaded model is the base of the bank's adapters, and why.

    A fingerprint is of names too: one that another version of transformers made is looked for under the names of the files.
    """
    verdict, why = compare(bank.base, base)
    if verdict == "different" and bank.base.fingerprint and base.fingerprint:
        from .names import saved_fingerprint

        if saved_fingerprint(model) == bank.base.fingerprint:
            return "same", "their base tensors have one fingerprint under the names of the model's files"
    return verdict, why


def check_base(bank: Bank, base: BaseRef, model: nn.Module) -> None:
    """Raise LoralloyError unless the loaded model is surely the base of the bank's adapters."""
    verdict, why = compare_base(bank, base, model)
    if verdict != "same":
        said = "but the loaded model is" if verdict == "different" else "and it cannot be told whether that is"
        raise LoralloyError(
            f"the bank's adapters are of {bank.base}, {said} {base}: {why}; load the model the adapters were "
            "trained on, or pass --assume-same-base"
        )


def check_saved_modules(model: nn.Module, bank: Bank) -> None:
    """Raise LoralloyError for fully saved tensors, unless they are the model's own.

    PEFT saves a copy of the base's embeddings and head beside their factors (as ``lm_head.base_layer.weight``).
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    for adapter in bank.values():
        for name in adapter.extra:
            tensor, mine = adapter.extra_tensor(name), own.get(name.replace(".base_layer.", "."))
            if mine is None or mine.shape != tensor.shape or not torch.equal(tensor.to(mine), mine):
                raise LoralloyError(
                    f"adapter {adapter.name!r} saved whole modules ({name}, not the model's own), which cannot be mixed row "
                    "by row; leave it out of the bank, or load it alone with PEFT"
                )


def packed(module: nn.Module) -> bool:
    """Whether a module's weight is stored in another form than the matrix it stands for: nothing can be added to it.

    bitsandbytes may keep 4-bit weights in a tensor of a floating dtype (bnb_4bit_quant_storage); its shape tells.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    flat = isinstance(module, nn.Linear) and tuple(weight.shape) != (module.out_features, module.in_features)
    return flat or not weight.dtype.is_floating_point


def check_fit(name: str, module: nn.Module, factors: LoraFactors) -> None:
    """Raise LoralloyError unless the factors fit this module of the base.

    A linear layer is measured by what it maps, not by its weight, which bitsandbytes packs into another shape.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise LoralloyError(f"the model has a {type(module).__name__} there, which has no weight to adapt")
    if factors.kind == "conv":
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise LoralloyError(f"the adapter has convolution factors, the model a {type(module).__name__}")
        if module.groups != 1:
            raise LoralloyError("convolutions with groups cannot be composed; leave this module out of the adapter")
        have, want = tuple(weight.shape), (factors.B.shape[0], *factors.A.shape[1:])
    elif factors.kind == "embedding":
        have, want = tuple(weight.shape), factors.shape[::-1]
    elif isinstance(module, nn.Linear):
        have, want = (module.out_features, module.in_features), factors.shape
    elif type(module).__name__ == "Conv1D":  # GPT-2's linear layer, stored transposed (fan_in_fan_out)
        have, want = tuple(weight.shape), factors.shape[::-1]
    else:
        raise LoralloyError(
            f"the model has a {type(module).__name__} there, which is not a linear, embedding or convolution"
        )
    if tuple(have) != tuple(want):
        hint = " (tokens were added to one of them?)" if factors.kind == "embedding" or name.endswith("head") else ""
        raise LoralloyError(f"the adapter expects a weight of {list(want)}, the model has {list(have)}{hint}")
