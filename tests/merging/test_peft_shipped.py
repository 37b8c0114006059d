"""PEFT against ours on the shipped bank: dW and logits; and what each keeps of equal magnitudes."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import ENTRYWISE, agree, both, drawn, loaded, lowest_index_first, masks, named, ours, theirs
from torch import Tensor

from helpers import (
    as_weight,
    load_in_peft,
    logits,
)
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.merging import DareLinear, DareTies, Linear, MagnitudePrune, Ties, merge
from loralloy.merging.select import largest
from loralloy.weights import Weights


@pytest.fixture(scope="module")
def real(real_model_folder, real_bank_folder, tmp_path_factory):
    """(base, PEFT's model, folders) of three adapters of one rank; layers 0 and 29, so that PEFT's dense SVDs end in seconds."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(real_model_folder), dtype=torch.float32).eval()
    configs = {p.parent: json.loads(p.read_text()) for p in sorted(real_bank_folder.glob("*/adapter_config.json"))}
    ranks = {folder.name: config["r"] for folder, config in configs.items()}
    alike = [folder for folder in configs if ranks[folder.name] == next(iter(ranks.values()))][:3]
    assert len(alike) == 3, f"the bank needs three adapters of one rank for this test, it has {ranks}"
    paths = []
    for source in alike:
        folder = tmp_path_factory.mktemp("real") / source.name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(configs[source] | {"layers_to_transform": [0, 29]}))
        tensors = load_file(source / "adapter_model.safetensors")
        kept = {k: v.float() for k, v in tensors.items() if ".layers.0." in k or ".layers.29." in k}
        save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
        paths.append(folder)
    return model, loaded(model, paths), paths


def weighed(paths: list[Path]) -> dict[str, float]:
    return dict(zip([p.name for p in paths], [0.7, -0.4, 0.5], strict=True))


def same_logits(real: Any, merged: Adapter, folder: Path) -> None:
    from transformers import AutoTokenizer

    model, peft, _ = real
    merged.save(folder)
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    ids = tokenizer("Is this text message spam or ham? Message: You won a prize!", return_tensors="pt").input_ids
    want = logits(peft, ids)
    apart = float((logits(load_in_peft(model, folder), ids) - want).abs().max())
    assert apart < 1e-3 < float((want - logits(model, ids)).abs().max()), apart


@pytest.mark.real
@pytest.mark.parametrize(("rule", "space", "rank"), [("cat", "delta", None), ("svd", "delta", 4)])
def test_shipped_bank(rule, space, rank, real, tmp_path):
    _, peft, paths = real
    bank, weights = Bank.load(paths), weighed(paths)
    want = theirs(peft, weights, rule, **({"svd_rank": rank, "svd_full_matrices": False} if rule == "svd" else {}))
    got = merge(bank, Weights(weights), rule, space, rank).adapter
    assert set(got) == set(want) and len(got) == 14
    agree({m: as_weight(got[m]) for m in got}, want)
    same_logits(real, got, tmp_path / "ours")


@pytest.mark.real
@pytest.mark.parametrize("rule", [Linear, *ENTRYWISE], ids=str)
def test_shipped_bank_in_factors_space(rule, real, tmp_path):
    _, peft, paths = real
    bank, weights = Bank.load(paths), weighed(paths)
    with lowest_index_first():
        got, want = both(peft, bank, weights, rule)
    assert len(got) == 14
    agree(got, want)
    if rule in (Linear, Ties):
        same_logits(real, merge(bank, Weights(weights), rule, "factors").adapter, tmp_path / "ours")


@pytest.mark.real
@pytest.mark.parametrize("rule", [Ties, MagnitudePrune, DareLinear(seed=3), DareTies(majority="frequency")], ids=str)
def test_shipped_bank_in_delta_space_before_the_cut(rule, real):
    """PEFT's `_svd` variants up to their SVD: its rule on its own dW."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import merge_utils

    _, peft, paths = real
    bank, weights = Bank.load(paths), weighed(paths)
    kind, more = named(rule)
    want: dict[str, Tensor] = {}
    given = masks(peft, list(bank.values()), rule, True) if "seed" in rule.values else iter(())
    with warnings.catch_warnings(), drawn(given):
        warnings.simplefilter("ignore")
        for module, layer in peft.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                dense = [layer.get_delta_weight(n) for n in weights]
                want[module] = getattr(merge_utils, kind)(dense, torch.tensor(list(weights.values())), **more)
    assert len(want) == 14
    agree(ours(bank, weights, rule, "delta", "full"), want)


@pytest.mark.real
def test_shipped_bank_cut_to_a_rank(real):
    """PEFT's `ties_svd` from end to end."""
    _, peft, paths = real
    bank, weights = Bank.load(paths), weighed(paths)
    got, want = both(peft, bank, weights, Ties, 4)
    assert len(got) == 14
    agree(got, want)


@pytest.mark.real
def test_equal_magnitudes(real_bank_folder):
    """Of the bank's fp16 factors, PEFT and we keep the same magnitudes and differ only in which of those at the limit."""
    from peft.utils import merge_utils

    parted = 0
    for folder in sorted(real_bank_folder.glob("*/adapter_config.json"))[:3]:
        of = Adapter.load(folder.parent)
        for module in [m for m in of if ".layers.0." in m]:
            for x, density in itertools.product((of[module].A.float(), of[module].B.float()), (0.1, 0.2, 0.5, 0.8)):
                flat = x.flatten()[None]
                limits = largest(lambda flat=flat: iter([flat]), x.numel(), int(density * x.numel()), True)
                got, want = limits.keep(flat)[0], merge_utils.prune(x, density, "magnitude").flatten()
                assert torch.equal(got.abs().sort().values, want.abs().sort().values)
                at_limit = flat[0].abs() == limits.magnitude
                assert torch.equal(got[~at_limit], want[~at_limit])
                kept = got[at_limit] != 0
                assert bool((kept[:-1] >= kept[1:]).all())  # the first ones
                parted += not bool(kept.all())
    assert parted > 50  # else this test says nothing
