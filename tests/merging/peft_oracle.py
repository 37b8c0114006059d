"""PEFT as an oracle: its add_weighted_adapter on our adapters, given the random masks and the order of equals that ours has.

DARE: PEFT draws its masks from the global generator, so it is handed ours. Equal magnitudes at the limit of a trim: torch.topk
leaves open which it keeps. On the shipped bank, whose factors are fp16 numbers, there are many, so PEFT is handed a top-k that
keeps the lowest index.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import as_weight, peft_deltas, relative
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.merging import DareLinear, DareTies, MagnitudePrune, Rule, Ties, merge, spaces
from loralloy.merging.entries import random_mask
from loralloy.merging.stack import Stack
from loralloy.merging.stacking import keys_of as _keys
from loralloy.weights import Weights

NEAR = 1e-5
ENTRYWISE = [
    Ties,
    Ties(majority="frequency"),
    MagnitudePrune,
    DareLinear(seed=3),
    DareTies(seed=4),
    DareTies(majority="frequency"),
]


def loaded(base: Any, folders: list[Path]) -> Any:
    """One PEFT model with every adapter on it."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(base), str(folders[0]), adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(str(folder), adapter_name=folder.name)
    return model.eval()


def theirs(model: Any, weights: dict[str, float], kind: str, **more: Any) -> dict[str, Tensor]:
    """PEFT's merge, set active in place of the one before; module -> its dW."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
        model.add_weighted_adapter(list(weights), list(weights.values()), "merged", combination_type=kind, **more)
    model.set_adapter("merged")
    model.eval()  # the new adapter's dropout comes in training mode
    return peft_deltas(model, "merged")


def ours(bank: Bank, weights: dict[str, float], rule: str | Rule, space: Any, rank: Any = None) -> dict[str, Tensor]:
    """module -> dW in the shape of the module's weight."""
    merged = merge(bank, Weights(weights), rule, space, rank, measure="none").adapter
    return {m: as_weight(merged[m], merged.config.fan_in_fan_out) for m in merged}


def agree(got: dict[str, Tensor], want: dict[str, Tensor], near: float = NEAR) -> float:
    """The largest relative distance over all modules, asserted to be below `near`; a module of zeros may be missing."""
    assert not any(bool(w.isnan().any()) for w in want.values())
    apart = {m: relative(got[m], w) if m in got else float(w.norm()) for m, w in want.items()}
    assert set(got) <= set(want) and max(apart.values()) < near, apart
    return max(apart.values())


def agree_cut(got: dict[str, Tensor], want: dict[str, Tensor], whole: dict[str, Tensor], rank: int) -> float:
    """Two best approximations of `whole`: both as near to it as the other; the same dW where the spectrum has a gap there.

    Without a gap the cut is not unique: float32 rounding turns the last directions.
    """
    assert set(got) == set(want) == set(whole)
    apart, clear = 0.0, 0
    for m, full in whole.items():
        matrix = full.flatten(1).double()
        s = torch.linalg.svdvals(matrix)
        optimum = float(s[rank:].norm() / s.norm())
        for result in (got, want):
            assert relative(result[m].flatten(1), matrix) <= optimum * (1 + 1e-5) + NEAR, m
        if rank >= len(s) or s[rank - 1] - s[rank] > 0.03 * s[rank - 1]:
            apart, clear = max(apart, relative(got[m], want[m])), clear + 1
    assert apart < NEAR and clear > 0, (apart, clear)
    return apart


# -- handing PEFT our choices ------------------------------------------------------------------------------------------


def masks(model: Any, parents: Sequence[Adapter], rule: Rule, dense: bool) -> Iterator[Tensor]:
    """Our random masks in the order in which PEFT asks for them, in the shapes of its tensors."""
    from peft.tuners.lora import LoraLayer

    key = _keys(rule, parents)
    for module, layer in model.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        having = [i for i, p in enumerate(parents) if module in p]
        for side in ("dW",) if dense else ("A", "B"):
            for i in having:
                f = parents[i][module]
                one = torch.ones(1, 1)
                stack = Stack((f.a[None],), (f.b[None],), one, one, torch.tensor([[key(i, module)]]))
                pieces = spaces.view(stack, "delta" if dense else "factors").pieces
                piece = pieces[1 if side == "B" else 0]
                drawn = random_mask(piece.keys[0], 0, piece.size, rule.values["density"], rule.values["seed"])
                shape = f.shape if dense else getattr(f, side).shape
                turned = dense and (f.kind == "embedding" or getattr(layer, "fan_in_fan_out", False))
                yield drawn.reshape(shape).T if turned else drawn.reshape(shape)


@contextlib.contextmanager
def drawn(given: Iterator[Tensor]) -> Iterator[None]:
    """PEFT drops what `given` says; every mask must be asked for."""
    from peft.utils import merge_utils

    def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        kept = tensor * next(given).reshape(tensor.shape)
        return kept / density if rescale else kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_utils, "random_pruning", random_pruning)
        yield
    assert next(given, None) is None


@contextlib.contextmanager
def lowest_index_first() -> Iterator[None]:
    """PEFT's magnitude pruning with a stable order."""
    from peft.utils import merge_utils

    def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
        order = tensor.abs().flatten().argsort(descending=True, stable=True)
        mask = torch.zeros_like(tensor).flatten()
        mask[order[: int(density * tensor.numel())]] = 1
        return tensor * mask.reshape(tensor.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_utils, "magnitude_based_pruning", magnitude_based_pruning)
        yield


def named(rule: Rule) -> tuple[str, dict[str, Any]]:
    """PEFT's name and arguments of a rule."""
    more = {"density": rule.values["density"]} if "density" in rule.values else {}
    if "majority" in rule.values:
        more["majority_sign_method"] = rule.values["majority"]
    return rule.name, more


def both(
    model: Any, bank: Bank, weights: dict[str, float], rule: Rule, rank: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ours and PEFT's: in factors space, or cut to a rank in delta space (PEFT's `_svd` variants)."""
    kind, more = named(rule)
    parents = [bank[n] for n in weights]
    given = masks(model, parents, rule, rank is not None) if "seed" in rule.values and more["density"] < 1 else iter(())
    with drawn(given):
        if rank is None:
            want = theirs(model, weights, kind, **more)
        else:
            more |= {"svd_rank": rank, "svd_full_matrices": False}
            want = theirs(model, weights, f"{kind}_svd", **more)
    return ours(bank, weights, rule, "factors" if rank is None else "delta", rank), want
