"""Every variant of LoRA (rsLoRA, patterns, convolutions, embeddings, Conv1D) through every rule."""

from __future__ import annotations

import itertools

import pytest
import torch
from engine_scenes import BOUND, ORACLES, expected
from torch import Tensor

from helpers import (
    PROJECTIONS,
    ConvNet,
    as_weight,
    delta,
    load_in_peft,
    peft_deltas,
    peft_folder,
    peft_model,
    relative,
    tiny_gpt2,
    tiny_llama,
)
from loralloy.bank import Bank
from loralloy.factors import LoraFactors
from loralloy.merging import RULES, merge
from loralloy.weights import Weights


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """Three adapters by PEFT (rsLoRA, rank_pattern, alpha_pattern, modules that differ), and PEFT's own dW of each."""
    base, folder = tiny_llama(), tmp_path_factory.mktemp("variants")
    configs = {
        "rs": {
            "r": 3, "target_modules": ["q_proj", "v_proj"], "use_rslora": True,
            "rank_pattern": {"layers.0.self_attn.q_proj": 7},
        },
        "pattern": {"r": 5, "target_modules": PROJECTIONS, "alpha_pattern": {"up_proj": 1, "q_proj": 31}},
        "both": {
            "r": 2, "target_modules": ["q_proj", "up_proj"], "use_rslora": True,
            "alpha_pattern": {"layers.1.mlp.up_proj": 64}, "rank_pattern": {"q_proj": 4},
        },
    }  # fmt: skip
    dense = {}
    for i, (name, config) in enumerate(configs.items()):
        peft_folder(base, folder / name, i + 1, **config)
        dense[name] = peft_deltas(peft_model(base, i + 1, **config))
    return base, Bank.load(folder), dense


@pytest.mark.parametrize("rule", BOUND, ids=str)
def test_rslora_and_patterns_through_every_rule(variants, rule, tmp_path):
    base, b, dense = variants
    w = Weights({"rs": 0.8, "pattern": {"*": -0.3, "model.layers.0.mlp.up_proj": 0.9}, "both": 0.5})
    want = expected(rule, b, w, dense)
    merged = merge(b, w, rule, rank="full", out=tmp_path / "m").adapter
    got = delta(merged)
    assert set(got) == set(want) and max(relative(got[m], want[m]) for m in want) < 1e-5
    loaded = peft_deltas(load_in_peft(base, tmp_path / "m"))
    assert set(loaded) == set(want) and max(relative(loaded[m], want[m]) for m in want) < 1e-5


def placed(x: Tensor, f: LoraFactors, transposed: bool) -> Tensor:
    """dW as a matrix, in the shape of the module's weight."""
    if f.kind == "conv":
        return x.reshape(f.B.shape[0], *f.A.shape[1:])
    return x.T if transposed or f.kind == "embedding" else x


@pytest.mark.parametrize("rule", BOUND, ids=str)
@pytest.mark.parametrize("kind", ["conv", "gpt2"])
def test_convolutions_embeddings_and_conv1d_through_every_rule(kind, rule, tmp_path):
    base = ConvNet() if kind == "conv" else tiny_gpt2()
    names = ["one", "two", "point", "three", "out"] if kind == "conv" else ["c_attn", "c_proj", "wte"]
    more = {} if kind == "conv" else {"fan_in_fan_out": True}
    for i, r in enumerate((2, 3)):
        peft_folder(base, tmp_path / "bank" / f"p{i}", i + 1, r=r, target_modules=names, **more)
    b, w = Bank.load(tmp_path / "bank"), Weights({"p0": 0.9, "p1": -0.6})
    dense = {n: {m: f.dense() for m, f in a.items()} for n, a in b.items()}
    for n, a in b.items():  # the matrices are PEFT's own dW
        theirs = peft_deltas(load_in_peft(base, tmp_path / "bank" / n))
        assert max(relative(as_weight(f, bool(more)), theirs[m]) for m, f in a.items()) < 1e-6
    want = expected(rule, b, w, dense)
    merged = merge(b, w, rule, rank="full", out=tmp_path / "m")
    got = delta(merged.adapter)
    assert set(got) == set(want) and max(relative(got[m], want[m]) for m in want) < 1e-5
    assert {f.kind for f in merged.adapter.values()} == {f.kind for f in b["p0"].values()}
    loaded = peft_deltas(load_in_peft(base, tmp_path / "m"))
    assert max(relative(loaded[m], placed(x, merged.adapter[m], bool(more))) for m, x in want.items()) < 1e-5
    low = merge(b, w, rule, rank=2, out=tmp_path / "low").adapter
    assert low.max_rank == 2
    for m, x in want.items():
        s = torch.linalg.svdvals(x)
        assert relative(delta(low)[m], x) == pytest.approx(float(s[2:].norm() / s.norm()), rel=2e-3, abs=1e-5)


def test_every_rule_is_here():
    """A rule that is new needs an oracle of its own: here, or in a test of its own file."""
    assert set(ORACLES) <= set(RULES)
    assert [r for r, s in itertools.product(RULES, ["delta"]) if s in RULES[r].spaces]
