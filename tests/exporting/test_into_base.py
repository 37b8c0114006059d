"""An adapter added into a copy of its base: transformers' logits of the result against PEFT's merge and the live adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from helpers import PROJECTIONS, adapter, close, factors, logits, peft_folder, peft_model, tiny_gpt2, tiny_llama
from loralloy.adapter import Adapter
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError
from loralloy.exporting import base as exporting
from loralloy.exporting.base import export_into_base
from loralloy.live.base import base_fingerprint

IDS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def tied_llama(seed: int = 0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bert_config(**more):
    return BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, **more,
    )  # fmt: skip


def saved(model: nn.Module, folder: Path, **more) -> Path:
    model.save_pretrained(str(folder), **more)
    (folder / "tokenizer_config.json").write_text('{"a": 1}')
    return folder


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def untouched_are_equal(base: Path, out: Path, touched: set[str]) -> None:
    before, after = whole(base), whole(out)
    for name, tensor in before.items():
        same = tensor.dtype == after[name].dtype and torch.equal(tensor, after[name])
        assert same == (name not in touched), name


def causal(folder: Path, **more):
    return AutoModelForCausalLM.from_pretrained(str(folder), **more).eval()


# -- what PEFT computes ------------------------------------------------------------------------------------------------

LLAMA = {"target_modules": PROJECTIONS, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}
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


# -- prefixes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [False, True])
def test_bert_with_and_without_its_prefix(bare, tmp_path):
    """A classifier's adapter into a checkpoint that says `encoder.layer` where the classifier says `bert.encoder.layer`."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert_config(num_labels=3)).eval()
    base = saved(model.bert if bare else model, tmp_path / "base")
    assert any(n.startswith("bert.") for n in whole(base)) != bare
    config = {"target_modules": ["query", "dense", "word_embeddings"], "task_type": "SEQ_CLS"}
    peft = peft_model(model, 1, **config)
    with torch.no_grad():
        peft.base_model.model.classifier.modules_to_save["default"].weight.mul_(3)
    peft.save_pretrained(str(tmp_path / "a"))
    done = export_into_base(Adapter.load(tmp_path / "a"), base, tmp_path / "out")
    assert sum("is new: the base has none" in note for note in done.notes) == (2 if bare else 0)
    got = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "out"), num_labels=3).eval()
    assert close(logits(got, IDS), logits(peft, IDS)) and not close(logits(model, IDS), logits(peft, IDS), 1e-2)


def test_names_without_the_bases_prefix(tmp_path):
    """An adapter of BertModel into a checkpoint of a head's model."""
    torch.manual_seed(0)
    masked = BertForMaskedLM(bert_config()).eval()
    base = saved(masked, tmp_path / "base")
    folder = peft_folder(masked.bert, tmp_path / "a", 1, target_modules=["query", "value"])
    export_into_base(Adapter.load(folder), base, tmp_path / "out")
    got, peft = (
        BertModel.from_pretrained(str(tmp_path / "out")).eval(),
        peft_model(masked.bert, 1, target_modules=["query", "value"]),
    )
    with torch.no_grad():
        assert close(got(input_ids=IDS).last_hidden_state, peft(input_ids=IDS).last_hidden_state)


def test_gpt2_as_the_hub_has_it(tmp_path):
    """Without `transformer.`, with buffers of masks, and an adapter on the tied head, which is no Conv1D."""
    model = tiny_gpt2()
    base = saved(model, tmp_path / "base")
    tensors = {n.removeprefix("transformer."): t for n, t in whole(base).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = {"target_modules": ["c_proj", "lm_head"], "fan_in_fan_out": True}
    folder = peft_folder(model, tmp_path / "a", 1, **config)
    export_into_base(Adapter.load(folder), base, tmp_path / "out")
    assert close(logits(causal(tmp_path / "out"), IDS), logits(peft_model(model, 1, **config), IDS))


def test_names_that_could_be_two_tensors_are_refused(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "x"}')
    tensors = {f"{part}.layers.0.q_proj.weight": torch.zeros(4, 4) for part in ("vision", "text")}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(LoralloyError, match=r"'layers.0.q_proj' could be '.*' or '.*'.*tells them apart"):
        export_into_base(adapter({"layers.0.q_proj": factors(4, 4, 2)}), tmp_path / "base", tmp_path / "out")


def test_convolutions(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "x"}')
    w = torch.randn(6, 4, 3, 2)
    save_file({"conv.weight": w, "conv.bias": torch.zeros(6)}, tmp_path / "base" / "model.safetensors")
    net = nn.Sequential()
    net.conv = nn.Conv2d(4, 6, (3, 2))
    folder = peft_folder(net, tmp_path / "a", 1, target_modules=["conv"])
    export_into_base(Adapter.load(folder), tmp_path / "base", tmp_path / "out")
    peft = peft_model(net, 1, target_modules=["conv"])
    want = w + peft.base_model.model.conv.get_delta_weight("default").detach()
    assert close(whole(tmp_path / "out")["conv.weight"], want)


# -- the right base ----------------------------------------------------------------------------------------------------


def with_base(thing: Adapter, base: BaseRef) -> Adapter:
    return Adapter(thing.name, {m: thing[m] for m in thing}, thing.config, base)


@pytest.mark.parametrize("make", [tiny_llama, tied_llama, tiny_gpt2])
def test_the_fingerprint_is_that_of_the_loaded_model(make, tmp_path):
    """Taken from the files; shards, ties and a missing prefix do not change it."""
    model = make()
    base = saved(model, tmp_path / "base", max_shard_size="10KB")
    gpt2 = make is tiny_gpt2
    module, shape = ("transformer.h.0.attn.c_proj", 16) if gpt2 else ("model.layers.0.self_attn.q_proj", 32)
    thing = with_base(adapter({module: factors(shape, shape)}), BaseRef("x", None, base_fingerprint(model)))
    assert export_into_base(thing, base, tmp_path / "out").base.fingerprint == base_fingerprint(model)
    other = saved(make(1), tmp_path / "other")
    with pytest.raises(LoralloyError, match=r"the fingerprints of their tensors differ.*--assume-same-base"):
        export_into_base(thing, other, tmp_path / "no")
    done = export_into_base(thing, other, tmp_path / "yes", assume_same_base=True)
    assert any("was not checked" in note for note in done.notes)


def test_a_base_that_no_fingerprint_tells(tmp_path):
    base = saved(tiny_llama(), tmp_path / "base")
    done = export_into_base(adapter({"lm_head": factors(64, 32)}), base, tmp_path / "out")
    assert any("records no fingerprint of its base (tiny/llama)" in note for note in done.notes)


# -- refusals and the folder -------------------------------------------------------------------------------------------


def test_another_model_is_refused(tmp_path):
    base = saved(tiny_llama(layers=1), tmp_path / "base")
    parts = {f"model.layers.{i}.self_attn.q_proj": factors(32, 32) for i in range(3)}
    with pytest.raises(
        LoralloyError, match=r"'model.layers.1.self_attn.q_proj': .* has no tensor .*nor 1 more of its 3"
    ):
        export_into_base(adapter(parts), base, tmp_path / "out")
    with pytest.raises(LoralloyError, match=r"is \[24, 32\] in the adapter, but tensor .* is \[32, 32\]"):
        export_into_base(adapter({"model.layers.0.self_attn.q_proj": factors(24, 32)}), base, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            {"q.qweight": torch.zeros(2, 4, dtype=torch.int32)},
            r"module 'q': its weight .* is quantised \('q.qweight'\)",
        ),
        (
            {"q.weight": torch.zeros(8, 1, dtype=torch.uint8)},
            r"module 'q': tensor 'q.weight' is quantised \(torch.uint8\)",
        ),
        ({"q.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, r"'q.weight' is quantised \(torch.float8_e4m3fn\)"),
    ],
)
def test_quantised_weights_are_refused_by_name(tensors, says, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "x"}')
    save_file(tensors | {"other.weight": torch.zeros(2, 2)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(LoralloyError, match=says):
        export_into_base(adapter({"q": factors(4, 4, 2)}), tmp_path / "base", tmp_path / "out")
    export_into_base(adapter({"other": factors(2, 2, 1)}), tmp_path / "base", tmp_path / "out")
    untouched_are_equal(tmp_path / "base", tmp_path / "out", {"other.weight"})


def test_bases_that_cannot_be_read(tmp_path):
    thing, base = adapter({"q": factors(4, 4, 2)}), tmp_path / "base"
    base.mkdir()
    with pytest.raises(LoralloyError, match=r"has no config.json"):
        export_into_base(thing, base, tmp_path / "out")
    (base / "config.json").write_text('{"model_type": "x"}')
    with pytest.raises(LoralloyError, match=r"holds no model.safetensors"):
        export_into_base(thing, base, tmp_path / "out")
    (base / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(LoralloyError, match=r"only pytorch_model.bin, a pickle"):
        export_into_base(thing, base, tmp_path / "out")
    (base / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(LoralloyError, match=r"model.safetensors cannot be read"):
        export_into_base(thing, base, tmp_path / "out")


def test_the_output_may_not_touch_base_or_adapter(tmp_path):
    model = tiny_llama()
    base = saved(model, tmp_path / "base")
    thing = Adapter.load(peft_folder(model, tmp_path / "a", 1, target_modules=["q_proj"]))
    before = snapshot(tmp_path)
    for out in (base, base / "inside", tmp_path, tmp_path / "a", tmp_path / "a" / "x" / ".." / "y"):
        with pytest.raises(LoralloyError, match=r"overlap"):
            export_into_base(thing, base, out, overwrite=True)
    assert snapshot(tmp_path) == before
    (tmp_path / "out").mkdir()
    with pytest.raises(LoralloyError, match=r"exists already.*--overwrite"):
        export_into_base(thing, base, tmp_path / "out")


def test_what_is_copied_and_what_is_left_out(tmp_path):
    """Tokenizer, code, licence and subfolders; not other copies of the weights, which would be the base's still."""
    base = saved(tiny_llama(), tmp_path / "base")
    (base / "1_Pooling").mkdir()
    for name in ("LICENSE", "modeling_x.py", "1_Pooling/config.json", "consolidated.safetensors", "pytorch_model.bin"):
        (base / name).write_text(name)
    (base / ".cache").mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\nthe base's card")
    seen: list[tuple[int, int]] = []
    done = export_into_base(
        adapter({"lm_head": factors(64, 32)}), base, tmp_path / "out", on_tensor=lambda *at: seen.append(at)
    )
    assert done.left_out == ["consolidated.safetensors", "pytorch_model.bin"]
    out, gone = snapshot(tmp_path / "out"), ("README.md", "model.safetensors", *done.left_out)
    assert {k: v for k, v in out.items() if k not in gone} == {k: v for k, v in snapshot(base).items() if k not in gone}
    tensors = len(load_file(base / "model.safetensors"))
    assert seen == [(i + 1, tensors) for i in range(tensors)]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    text = out["README.md"].decode()
    assert f"{done.change:.3e}" in text and "| mit |" in text and done.adapter.content_hash in text
    assert "the base's card" not in text


def test_equal_inputs_give_equal_bytes(tmp_path):
    base = saved(tiny_llama(), tmp_path / "base", max_shard_size="20KB")
    for out in ("out", "again/out"):
        export_into_base(adapter({"lm_head": factors(64, 32)}), base, tmp_path / out)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "again" / "out")


@pytest.mark.parametrize("block", [1, 5 * 32, 1 << 22])
def test_sums_do_not_depend_on_the_block_of_rows(block, tmp_path, monkeypatch):
    """Blocks of one row, of five (which do not divide 64), and one block."""
    monkeypatch.setattr(exporting, "_BLOCK", block)
    base, f = saved(tiny_llama(), tmp_path / "base"), factors(64, 32)
    done = exporting.export_into_base(adapter({"lm_head": f}), base, tmp_path / "out")
    before = whole(base)["lm_head.weight"]
    assert close(whole(tmp_path / "out")["lm_head.weight"], before + f.dense(torch.float32), 1e-6)
    assert done.change == pytest.approx(float(f.dense().norm() / before.double().norm()), rel=1e-6)
