"""Export into a base: names, the right base, and the files of the folder."""

from __future__ import annotations

import pytest
import torch
from base_scenes import IDS, bert_config, causal, saved, snapshot, tied_llama, untouched_are_equal, whole
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

from helpers import adapter, close, factors, logits, peft_folder, peft_model, tiny_gpt2, tiny_llama
from loralloy.adapter import Adapter
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError
from loralloy.exporting import base as exporting
from loralloy.exporting.base import export_into_base
from loralloy.live.base import base_fingerprint

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
