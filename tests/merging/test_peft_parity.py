"""PEFT's own add_weighted_adapter against ours: dW within 1e-5, equal logits; tiny models and the shipped bank."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import PROJECTIONS, close, load_in_peft, logits, peft_deltas, peft_folder, relative, tiny_llama
from loralloy.bank import Bank
from loralloy.merging import merge
from loralloy.weights import Weights

NEAR = 1e-5
IDS = torch.arange(3, 19).reshape(2, 8)


def loaded(base: Any, folders: list[Path]) -> Any:
    """One PEFT model with every adapter on it."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(base), str(folders[0]), adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(str(folder), adapter_name=folder.name)
    return model.eval()


def theirs(model: Any, weights: dict[str, float], kind: str, **more: Any) -> dict[str, torch.Tensor]:
    """PEFT's merge, set active; module -> its dW."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(list(weights), list(weights.values()), "merged", combination_type=kind, **more)
    model.set_adapter("merged")
    model.eval()  # the new adapter's dropout comes in training mode
    return peft_deltas(model, "merged")


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Same rank; alphas differ; the third has fewer modules."""
    root = tmp_path_factory.mktemp("same")
    return [
        peft_folder(base, root / "a", 1, target_modules=PROJECTIONS, lora_alpha=8),
        peft_folder(base, root / "b", 2, target_modules=PROJECTIONS, lora_alpha=2),
        peft_folder(base, root / "c", 3, target_modules=["q_proj", "down_proj"], lora_alpha=16),
    ]


@pytest.fixture(scope="module")
def mixed(base, tmp_path_factory):
    """Ranks differ."""
    root = tmp_path_factory.mktemp("mixed")
    return [
        peft_folder(base, root / "a", 1, target_modules=PROJECTIONS, r=2, lora_alpha=8),
        peft_folder(base, root / "b", 2, target_modules=PROJECTIONS, r=7, lora_alpha=2),
        peft_folder(base, root / "c", 3, target_modules=["q_proj", "lm_head"], r=4),
    ]


WEIGHTS = [{"a": 0.5, "b": 0.5}, {"a": 0.9, "b": -0.4, "c": 1.3}, {"a": -1.0, "b": 2.0}, {"c": 1.0, "b": 0.0, "a": 0.3}]
CASES = [
    ("linear", "factors", "folders"),
    ("cat", "delta", "folders"),
    ("cat", "factors", "mixed"),
    ("svd", "delta", "mixed"),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("rule", "space", "which"), CASES)
def test_tiny(rule, space, which, weights, base, request, tmp_path):
    paths = request.getfixturevalue(which)
    peft = loaded(base, paths)
    # max rank is that of the adapters that take part: PEFT counts a zero-weighted one, so the rank is given
    rank = 5 if rule == "svd" else None
    want = theirs(peft, weights, rule, **({"svd_rank": rank} if rank else {}))
    merged = merge(Bank.load(paths), Weights(weights), rule, space, rank)
    merged.adapter.save(tmp_path / "ours")
    ours = load_in_peft(base, tmp_path / "ours")
    got = peft_deltas(ours)
    for module, dense in want.items():
        if float(dense.norm()) == 0 and module not in got:
            continue
        assert relative(got[module], dense) < NEAR, module
    assert close(logits(ours, IDS), logits(peft, IDS))
    assert float((logits(peft, IDS) - logits(base, IDS)).abs().max()) > 1e-2


def test_default_svd_rank_is_peft_s(base, mixed):
    peft = loaded(base, mixed)
    want = theirs(peft, {"a": 1.0, "b": 0.5}, "svd")
    got = merge(Bank.load(mixed), Weights({"a": 1.0, "b": 0.5}), "svd").adapter
    assert got.max_rank == 7
    assert all(relative(got[m].dense(), want[m]) < NEAR for m in got)


def test_rslora_is_where_peft_is_wrong(base, tmp_path):
    """PEFT 0.21.2 keeps use_rslora on the merged adapter, so its cat comes out sqrt(r) too strong; ours does not."""
    paths = [
        peft_folder(base, tmp_path / n, i, target_modules=["q_proj"], use_rslora=True, r=8) for i, n in enumerate("ab")
    ]
    peft = loaded(base, paths)
    want = theirs(peft, {"a": 0.5, "b": 0.5}, "cat")
    bank = Bank.load(paths)
    got = merge(bank, Weights({"a": 0.5, "b": 0.5}), "cat").adapter
    for m in got:
        truth = sum(0.5 * f.dense() for f in bank.factors(m).values())
        assert relative(got[m].dense(), truth) < NEAR
        assert relative(want[m], 4 * truth) < NEAR  # sqrt(16): if this fails PEFT is mended, and docs should say so


@pytest.mark.real
@pytest.mark.parametrize(
    ("rule", "space", "rank"), [("linear", "factors", None), ("cat", "delta", None), ("svd", "delta", 4)]
)
def test_shipped_bank(rule, space, rank, real_model_folder, real_bank_folder, tmp_path):
    """Factors-space linear, cat and svd against PEFT on the real bank: dW within 1e-5, equal logits.

    Layers 0 and 29 only, so that PEFT's dense SVDs end in seconds.
    """
    import json

    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(real_model_folder), dtype=torch.float32).eval()
    names = sorted(p.parent.name for p in real_bank_folder.glob("*/adapter_config.json"))
    ranks = {n: json.loads((real_bank_folder / n / "adapter_config.json").read_text())["r"] for n in names}
    alike = [n for n in names if ranks[n] == ranks[names[0]]][:3]
    assert len(alike) >= 2, f"the bank needs two adapters of one rank for this test, it has {ranks}"
    paths = []
    for name in alike:
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((real_bank_folder / name / "adapter_config.json").read_text()) | {
            "layers_to_transform": [0, 29]
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = load_file(real_bank_folder / name / "adapter_model.safetensors")
        kept = {k: v.float() for k, v in tensors.items() if ".layers.0." in k or ".layers.29." in k}
        save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
        paths.append(folder)
    weights = dict(zip(alike, [0.7, -0.4, 0.5], strict=False))
    peft = loaded(model, paths)
    want = theirs(peft, weights, rule, **({"svd_rank": rank, "svd_full_matrices": False} if rule == "svd" else {}))
    merge(Bank.load(paths), Weights(weights), rule, space, rank).adapter.save(tmp_path / "ours")
    ours = load_in_peft(model, tmp_path / "ours")
    got = peft_deltas(ours)
    assert set(got) == set(want) and len(got) == 14
    worst = max(relative(got[m], want[m]) for m in want)
    assert worst < NEAR, worst
    tokenizer = AutoTokenizer.from_pretrained(str(real_model_folder))
    ids = tokenizer("Is this text message spam or ham? Message: You won a prize!", return_tensors="pt").input_ids
    apart = float((logits(ours, ids) - logits(peft, ids)).abs().max())
    assert apart < 1e-3 < float((logits(peft, ids) - logits(model, ids)).abs().max()), apart
