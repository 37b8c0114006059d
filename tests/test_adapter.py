"""Adapters made by PEFT: read right, saved right, loaded by PEFT again without a word."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import (
    BASE,
    PROJECTIONS,
    ConvNet,
    Nest,
    adapter,
    as_weight,
    close,
    factors,
    load_in_peft,
    logits,
    peft_deltas,
    peft_folder,
    peft_model,
    relative,
    tiny_gpt2,
    tiny_llama,
)
from loralloy.adapter import Adapter
from loralloy.adapter_config import AdapterConfig
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors

IDS = torch.arange(3, 19).reshape(2, 8)
VARIANTS = {
    "plain": {"target_modules": PROJECTIONS},
    "two modules": {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 7},
    "rslora": {"target_modules": PROJECTIONS, "use_rslora": True, "r": 3, "lora_alpha": 5},
    "rank_pattern": {
        "target_modules": PROJECTIONS,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"v_proj": 3},
    },
    "patterns as regex": {
        "target_modules": PROJECTIONS,
        "use_rslora": True,
        "rank_pattern": {r"layers\.[0].*\.(q|k)_proj": 2, ".*(up|down)_proj": 5},
        "alpha_pattern": {r".*layers\.1\..*": 1, "^model.layers.0.mlp.up_proj": 31},
    },
    "regex targets": {"target_modules": r".*layers\.1\..*\.(q_proj|down_proj)"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "exclude_modules": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
    "all-linear": {"target_modules": "all-linear", "r": 2},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "task type": {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"},
}


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_and_we_mean_the_same(variant, llama, tmp_path):
    """Our dW is PEFT's get_delta_weight; saved by us, PEFT loads it in silence, with the same dW and logits."""
    peft = peft_model(llama, 1, **VARIANTS[variant])
    peft_folder(llama, tmp_path / "a", 1, **VARIANTS[variant])
    loaded = Adapter.load(tmp_path / "a").validate()
    truth = peft_deltas(peft)
    assert set(truth) == set(loaded)
    for module, want in truth.items():
        assert relative(as_weight(loaded[module]), want) < 1e-6, module

    loaded.save(tmp_path / "ours")
    again = load_in_peft(llama, tmp_path / "ours")
    back = peft_deltas(again)
    assert set(back) == set(truth)
    for module, want in truth.items():
        assert relative(back[module], want) < 1e-6, module
    assert close(logits(again, IDS), logits(peft, IDS))
    assert float((logits(peft, IDS) - logits(llama, IDS)).abs().max()) > 1e-3  # it could have failed


def test_layer_one_is_not_layer_eleven(tmp_path):
    base = tiny_llama(layers=12, hidden=16)
    config = {
        "target_modules": ["q_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.11.*": 3},
    }
    peft_folder(base, tmp_path / "a", 1, **config)
    loaded = Adapter.load(tmp_path / "a")
    assert {m.split(".")[2]: loaded.rank(m) for m in loaded} == {str(i): 2 if i == 1 else 4 for i in range(12)}
    truth = peft_deltas(peft_model(base, 1, **config))
    assert all(relative(loaded[m].dense(), truth[m]) < 1e-6 for m in truth)
    loaded.save(tmp_path / "ours")
    back = peft_deltas(load_in_peft(base, tmp_path / "ours"))
    assert all(relative(back[m], truth[m]) < 1e-6 for m in truth)


def test_a_module_whose_name_ends_anothers(tmp_path):
    """`lin` and `block.lin`: the pattern and the target of one must not catch the other."""
    base = Nest()
    peft = peft_model(base, 1, target_modules=["lin"], rank_pattern={"^lin": 2}, alpha_pattern={"^lin": 5})
    peft_folder(base, tmp_path / "a", 1, target_modules=["lin"], rank_pattern={"^lin": 2}, alpha_pattern={"^lin": 5})
    loaded = Adapter.load(tmp_path / "a")
    assert {m: loaded.rank(m) for m in loaded} == {"lin": 2, "block.lin": 4}
    only = Adapter("only", {"lin": loaded["lin"]}, replace(loaded.config, target_modules=None), loaded.base)
    x = torch.randn(3, 6)
    loaded.save(tmp_path / "both")
    with torch.no_grad():
        assert close(load_in_peft(base, tmp_path / "both")(x), peft(x))
        only.save(tmp_path / "only")
        again = load_in_peft(base, tmp_path / "only")
    assert set(peft_deltas(again)) == {"lin"}


def test_conv1d_of_gpt2(tmp_path):
    base = tiny_gpt2()
    config = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    peft = peft_model(base, 1, **config)
    loaded = Adapter.load(peft_folder(base, tmp_path / "a", 1, **config))
    truth = peft_deltas(peft)
    assert set(truth) == set(loaded)
    for module, want in truth.items():
        assert relative(as_weight(loaded[module], fan_in_fan_out=True), want) < 1e-6
    loaded.save(tmp_path / "ours")
    assert close(logits(load_in_peft(base, tmp_path / "ours"), IDS), logits(peft, IDS))


def test_convolutions(tmp_path):
    base, config = ConvNet(), {"target_modules": ["one", "two", "point", "three", "out"]}
    peft = peft_model(base, 1, **config)
    loaded = Adapter.load(peft_folder(base, tmp_path / "a", 1, **config))
    truth = peft_deltas(peft)
    assert set(truth) == set(loaded) and {loaded.outline(m).kind for m in loaded} == {"conv", "linear"}
    for module, want in truth.items():
        if module != "three":  # PEFT's get_delta_weight of Conv3d is tested by its output below
            assert relative(as_weight(loaded[module]), want.reshape(as_weight(loaded[module]).shape)) < 1e-6, module
    loaded.save(tmp_path / "ours")
    x = torch.randn(4, 3, 8)
    with torch.no_grad():
        assert close(load_in_peft(base, tmp_path / "ours")(x), peft(x))


# -- round trip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_to_the_bit(dtype, tmp_path):
    parts = {
        f"layers.{i}.q_proj": factors(9, 7, r, i, s).to(dtype)
        for i, (r, s) in enumerate([(2, 0.3), (3, 2 / 3), (2, 0.3)])
    }
    extra = {"lm_head.weight": torch.randn(4, 3).to(dtype), "bn.num_batches_tracked": torch.tensor(70_000)}
    first = adapter(parts, extra=extra)
    first.save(tmp_path / "a")
    second = Adapter.load(tmp_path / "a")
    for module in parts:
        assert second[module].A.dtype == dtype
        assert torch.equal(second[module].dense(), parts[module].dense())
    assert torch.equal(second.extra_tensor("lm_head.weight"), extra["lm_head.weight"])
    assert second.extra_tensor("bn.num_batches_tracked") == 70_000
    assert second.content_hash == first.content_hash
    second.save(tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@given(st.integers(1, 256), st.floats(0.01, 512), st.booleans())
def test_scaling_survives_the_round_trip(rank, alpha, rslora):
    """alpha = scaling * r and back costs at most the last bit, which the content hash does not see."""
    from loralloy.saving import peft_config

    scaling = AdapterConfig(rank, alpha, rslora).scaling("m", rank)
    thing = adapter({"m": LoraFactors(torch.zeros(rank, 1), torch.zeros(1, rank), scaling)})
    config = AdapterConfig.from_dict(json.loads(json.dumps(peft_config(thing, {"m": rank}, {"m": scaling * rank}))))
    again = LoraFactors(torch.zeros(rank, 1), torch.zeros(1, rank), config.scaling("m", rank))
    assert again.scaling == pytest.approx(scaling, rel=1e-15)
    assert adapter({"m": again}).content_hash == thing.content_hash


def test_save_twice_keeps_the_hash_with_rslora_and_odd_ranks(llama, tmp_path):
    config = {
        "target_modules": PROJECTIONS,
        "use_rslora": True,
        "r": 7,
        "lora_alpha": 11,
        "rank_pattern": {"q_proj": 3},
    }
    first = Adapter.load(peft_folder(llama, tmp_path / "a", 1, **config))
    first.save(tmp_path / "b")
    second = Adapter.load(tmp_path / "b")
    assert all(torch.equal(first[m].dense(), second[m].dense()) for m in first)
    assert first.content_hash == second.content_hash


def test_content_hash_tells_adapters_apart():
    f = factors()
    same = adapter({"m": f}, "another name").content_hash
    assert adapter({"m": LoraFactors(f.A.clone(), f.B.clone(), f.scaling)}).content_hash == same
    flipped = f.A.clone()
    flipped[0, 0] += 1e-6
    others = [
        {"m": LoraFactors(flipped, f.B, f.scaling)},
        {"m": LoraFactors(f.A, f.B, f.scaling * 2)},
        {"n": f},
        {"m": f, "n": f},
        {"m": f.to(torch.float64)},
    ]
    hashes = {adapter(parts).content_hash for parts in others} | {adapter({"m": f}, extra={"h": flipped}).content_hash}
    assert len(hashes | {same}) == 7
    shapes = [adapter({"m": f}, extra={"h": torch.zeros(s)}).content_hash for s in ((2, 3), (3, 2))]
    assert shapes[0] != shapes[1]


def test_opening_reads_no_tensor(llama, tmp_path, monkeypatch):
    """The header alone gives names, shapes and ranks; a tensor is read when its module is asked for."""
    peft_folder(llama, tmp_path / "a", 1, target_modules=PROJECTIONS, rank_pattern={"q_proj": 2})
    read: list[str] = []
    opener = safetensors.safe_open

    class Counting:
        def __init__(self, *args, **more):
            self.handle = opener(*args, **more)

        def get_tensor(self, key):
            read.append(key)
            return self.handle.get_tensor(key)

        def __getattr__(self, name):
            return getattr(self.handle, name)

    monkeypatch.setattr(safetensors, "safe_open", Counting)
    loaded = Adapter.load(tmp_path / "a")
    assert len(loaded) == 14 and loaded.max_rank == 4
    assert [loaded.outline(m).shape for m in loaded] and read == []
    module = next(iter(loaded))
    assert loaded[module].A.shape == loaded.outline(module).A.shape
    assert len(read) == 2 and all(module in key for key in read)


def test_header_keeps_where_it_came_from(tmp_path):
    base = BaseRef(BASE, "abc", "bf16-sampled-v1:123")
    record = {"training": {"task": "spam", "seed": 3}, "merge": None}
    first = Adapter("a", {"m": factors()}, AdapterConfig(4, 2.0), base, provenance=record, licence="apache-2.0")
    first.save(tmp_path / "a")
    second = Adapter.load(tmp_path / "a")
    assert (
        second.base == base and second.provenance["training"] == record["training"] and second.licence == "apache-2.0"
    )
    with safetensors.safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    second.save(tmp_path / "b")
    assert Adapter.load(tmp_path / "b").provenance == second.provenance


def test_what_lies_in_a_saved_folder(tmp_path):
    adapter({"m": factors()}).save(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "README.md",
        "a",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with pytest.raises(LoralloyError, match=r"exists already.*--overwrite"):
        adapter({"m": factors()}).save(tmp_path / "a")


def test_saving_over_the_folder_it_reads_from(tmp_path):
    adapter({"m": factors()}).save(tmp_path / "a")
    lazy = Adapter.load(tmp_path / "a")
    lazy.save(tmp_path / "a", overwrite=True, dtype=torch.float16)
    assert relative(Adapter.load(tmp_path / "a")["m"].dense(), factors().dense()) < 2e-3


# -- casts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_cast_on_saving(dtype, bound, tmp_path):
    first = adapter({"m": factors()}, extra={"count": torch.tensor([70_000])})
    first.save(tmp_path / "a", dtype=dtype)
    second = Adapter.load(tmp_path / "a")
    assert second.dtype == dtype and 0 < relative(second["m"].dense(), first["m"].dense()) < bound
    assert second.extra_tensor("count").tolist() == [70_000]  # a counter is no weight


def test_fp16_overflow_is_refused(tmp_path):
    big = factors()
    big = LoraFactors(big.A * 1e6, big.B, 1.0)
    with pytest.raises(LoralloyError, match=r"'base_model.model.m.lora_A.weight' overflows fp16.*bf16 or fp32"):
        adapter({"m": big}).save(tmp_path / "a", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    adapter({"m": big}).save(tmp_path / "a", dtype=torch.bfloat16)


def test_mapping_and_names(tmp_path):
    thing = adapter({"m": factors(), "n": factors(rank=2)})
    assert list(thing) == ["m", "n"] and len(thing) == 2 and "m" in thing and "x" not in thing
    assert thing.rank("n") == 2 and thing.max_rank == 4 and "rank 4" in repr(thing)
    assert math.isclose(thing["m"].scaling, 0.5)
