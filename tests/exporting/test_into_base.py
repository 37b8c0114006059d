"""An adapter added into a copy of its base: transformers' logits of the result against PEFT's merge and the live adapter."""

from __future__ import annotations

import json

import pytest
import torch
from base_scenes import IDS, LLAMA, bert_config, causal, saved, snapshot, tied_llama, untouched_are_equal, whole
from safetensors.torch import save_file
from transformers import (
    BertForMaskedLM,
)

from helpers import PROJECTIONS, adapter, close, factors, logits, peft_folder, peft_model, tiny_gpt2, tiny_llama
from loralloy.adapter import Adapter
from loralloy.errors import LoralloyError
from loralloy.exporting.base import export_into_base
from loralloy.factors import LoraFactors

CASES = {
    "llama": (tiny_llama, LLAMA, {}),
    "rslora": (tiny_llama, {"target_modules": PROJECTIONS, "use_rslora": True}, {}),
    "sharded": (tiny_llama, LLAMA, {"max_shard_size": "20KB"}),
    "lm_head": (tiny_llama, {"target_modules": ["lm_head", "o_proj"]}, {}),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "o_proj"]}, {}),
    "gpt2": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, {}),
    "gpt2 sharded": (
        tiny_gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"max_shard_size": "4KB"},
    ),
    "tied": (tied_llama, LLAMA, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_pefts_merge(case, tmp_path):
    make, config, saving = CASES[case]
    model = make()
    base = saved(model, tmp_path / "base", **saving)
    assert len(list(base.glob("*.safetensors"))) > 1 or not saving
    peft = peft_model(model, 1, **config)
    live = logits(peft, IDS)
    thing = Adapter.load(peft_folder(model, tmp_path / "a", 1, **config))
    before = snapshot(tmp_path / "base")
    done = export_into_base(thing, base, tmp_path / "out")
    assert snapshot(base) == before
    got = causal(tmp_path / "out")
    assert close(logits(got, IDS), live)
    merged = peft.merge_and_unload()
    assert close(logits(got, IDS), logits(merged, IDS))
    assert not close(logits(model, IDS), live, 1e-2)
    deltas, plain = {}, dict(model.named_parameters())
    for name, parameter in merged.named_parameters():
        size = float(plain[name].detach().norm())
        deltas[name] = float((parameter - plain[name]).detach().norm()) / (size or 1.0)
    touched = {name for name, size in deltas.items() if size}
    untouched_are_equal(base, tmp_path / "out", touched)
    for module, added in done.modules.items():
        assert added.change == pytest.approx(deltas[f"{module}.weight"], rel=1e-3)
    assert done.lost < 1e-5 and set(done.modules) == set(thing)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        {*(p.name for p in base.iterdir()), "README.md"}
    )


def test_the_weight_scales_dw(tmp_path):
    model, config = tiny_llama(), {"target_modules": PROJECTIONS}
    base, thing = saved(model, tmp_path / "base"), Adapter.load(peft_folder(model, tmp_path / "a", 1, **config))
    done = export_into_base(thing, base, tmp_path / "out", weight=-0.7)
    peft = peft_model(model, 1, **config)
    for module in peft.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {k: -0.7 * v for k, v in module.scaling.items()}
    assert close(logits(causal(tmp_path / "out"), IDS), logits(peft, IDS))
    assert done.weight == -0.7 and "-0.7 dW" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bases_dtype_is_kept_and_what_rounding_costs_is_told(dtype, tmp_path):
    model = tiny_llama().to(dtype)
    base, thing = (
        saved(model, tmp_path / "base"),
        Adapter.load(peft_folder(tiny_llama(), tmp_path / "a", 1, target_modules=PROJECTIONS)),
    )
    done = export_into_base(thing, base, tmp_path / "out")
    before, after = whole(base), whole(tmp_path / "out")
    lost = total = 0.0
    for module in thing:
        name = f"{module}.weight"
        exact = before[name].double() + thing[module].dense()
        half_ulp = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
        assert after[name].dtype == dtype and bool(((after[name] - exact).abs() <= 1.01 * half_ulp).all())
        lost += float((after[name].double() - exact).norm() ** 2)
        total += float(thing[module].dense().norm() ** 2)
    assert done.lost == pytest.approx((lost / total) ** 0.5, rel=1e-3) and done.lost > 1e-5


def test_overflow_of_fp32_is_not_told_to_be_saved_as_such(tmp_path):
    huge = factors(32, 32)
    thing = adapter({"model.layers.0.self_attn.q_proj": LoraFactors(huge.A * 1e20, huge.B * 1e20)})
    for dtype in (torch.float16, torch.float32):
        saved(tiny_llama().to(dtype), tmp_path / str(dtype))
        with pytest.raises(LoralloyError, match=r"W \+ dW is not finite, in fp32 either; give a smaller --weight"):
            export_into_base(thing, tmp_path / str(dtype), tmp_path / "out")


def test_overflow_of_the_bases_dtype_is_refused(tmp_path):
    base = saved(tiny_llama().half(), tmp_path / "base")
    big = factors(32, 32, 4)
    thing = adapter({"model.layers.0.self_attn.q_proj": big})
    with pytest.raises(LoralloyError, match=r"q_proj.weight': W \+ dW is not finite in the base's fp16.*--weight"):
        export_into_base(thing, base, tmp_path / "out", weight=1e5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


# -- tied embeddings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [None, "20KB"])
@pytest.mark.parametrize("targets", [["lm_head", "v_proj"], ["embed_tokens", "v_proj"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_are_untied(targets, shards, tmp_path):
    """PEFT changes one of the two; its merge would change both, so the live adapter is the truth."""
    model = tied_llama()
    base = saved(model, tmp_path / "base", **({"max_shard_size": shards} if shards else {}))
    assert "lm_head.weight" not in whole(base)
    thing = Adapter.load(peft_folder(model, tmp_path / "a", 1, target_modules=targets))
    done = export_into_base(thing, base, tmp_path / "out")
    got = causal(tmp_path / "out")
    assert close(logits(got, IDS), logits(peft_model(model, 1, target_modules=targets), IDS))
    assert got.config.tie_word_embeddings is False and any(
        "lm_head.weight is a tensor of its own" in n for n in done.notes
    )
    if shards:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        stored = whole(tmp_path / "out")
        assert set(index["weight_map"]) == set(stored)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
        assert index["metadata"]["total_parameters"] == sum(t.numel() for t in stored.values())


@pytest.mark.parametrize("written", [None, True])
def test_a_head_that_is_tied_and_stored(written, tmp_path):
    """Some checkpoints hold the tied head as well; some leave the flag to the model's default."""
    model = tied_llama()
    base = saved(model, tmp_path / "base")
    tensors = whole(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(config | ({"tie_word_embeddings": True} if written else {})))
    thing = Adapter.load(peft_folder(model, tmp_path / "a", 1, target_modules=["embed_tokens"]))
    export_into_base(thing, base, tmp_path / "out")
    want = logits(peft_model(model, 1, target_modules=["embed_tokens"]), IDS)
    assert close(logits(causal(tmp_path / "out"), IDS), want)


def test_ties_that_files_cannot_undo_are_refused(tmp_path):
    model = BertForMaskedLM(bert_config()).eval()
    base = saved(model, tmp_path / "base")
    config = {"target_modules": ["word_embeddings"]}
    thing = Adapter.load(peft_folder(model, tmp_path / "a", 1, **config))
    with pytest.raises(LoralloyError, match=r"word_embeddings' of .*BertForMaskedLM\) may share its tensor.*untied"):
        export_into_base(thing, base, tmp_path / "out")
    tied = saved(tied_llama(), tmp_path / "llama")
    folder = peft_folder(tied_llama(), tmp_path / "b", 1, target_modules=["embed_tokens"])
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | {"ensure_weight_tying": True}))
    with pytest.raises(LoralloyError, match=r"adapter 'b' was trained with ensure_weight_tying"):
        export_into_base(Adapter.load(folder), tied, tmp_path / "out")
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(LoralloyError, match=r"'lm_head': .* has no tensor 'lm_head.weight' and ties it to none"):
        export_into_base(adapter({"lm_head": factors(64, 32)}), tied, tmp_path / "out")


# -- fully saved tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tied_llama])
def test_saved_modules_replace_the_bases(make, tmp_path):
    model, config = make(), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    base = saved(model, tmp_path / "base")
    peft = peft_model(model, 1, **config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lm_head.modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    peft.save_pretrained(str(tmp_path / "a"))
    done = export_into_base(Adapter.load(tmp_path / "a"), base, tmp_path / "out", weight=1.0)
    assert done.replaced == ["lm_head.weight"]
    assert close(logits(causal(tmp_path / "out"), IDS), logits(peft, IDS))
    half = export_into_base(Adapter.load(tmp_path / "a"), base, tmp_path / "half", weight=0.5)
    assert torch.equal(whole(tmp_path / "half")["lm_head.weight"], whole(tmp_path / "out")["lm_head.weight"])
    assert any("not scaled by the weight" in note for note in half.notes)


@pytest.mark.parametrize("make", [tiny_llama, tied_llama])
def test_pefts_copies_of_embeddings_change_nothing(make, tmp_path):
    """save_embedding_layers writes them beside the factors; a tied model stays tied."""
    model = make()
    base = saved(model, tmp_path / "base")
    peft_model(model, 1, target_modules=["q_proj"]).save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    thing = Adapter.load(tmp_path / "a")
    assert len(thing.extra) == 2
    done = export_into_base(thing, base, tmp_path / "out")
    assert done.replaced == [] and set(whole(tmp_path / "out")) == set(whole(base))
    assert close(logits(causal(tmp_path / "out"), IDS), logits(peft_model(model, 1, target_modules=["q_proj"]), IDS))


def test_a_resized_vocabulary_is_refused(tmp_path):
    base = saved(tiny_llama(), tmp_path / "base")
    thing = adapter({"model.layers.0.self_attn.q_proj": factors(32, 32)}, extra={"lm_head.weight": torch.zeros(66, 32)})
    with pytest.raises(
        LoralloyError, match=r"'lm_head.weight' is \[66, 32\] in the adapter but \[64, 32\].*resize_token"
    ):
        export_into_base(thing, base, tmp_path / "out")
    with pytest.raises(LoralloyError, match=r"'lm_head' is \[66, 32\] in the adapter, but .* is \[64, 32\]"):
        export_into_base(adapter({"lm_head": factors(66, 32)}), base, tmp_path / "out")
