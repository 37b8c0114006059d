"""`loralloy export`: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import close, logits, peft_folder, peft_model, tiny_llama
from loralloy.adapter import Adapter
from loralloy.exporting import base as exporting
from loralloy.live.base import base_fingerprint

IDS = torch.arange(3, 13)[None]
CONFIG = {"target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def model(tmp_path):
    made = tiny_llama()
    made.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    peft_folder(made, tmp_path / "a", 1, **CONFIG)
    return made


def causal(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder)).eval()


def test_into_a_base(cli, model, tmp_path):
    ran = cli("export", tmp_path / "a", "--into", tmp_path / "base", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "dW added to 4 of the base's weights, stored as fp32" in ran.out and f"wrote {tmp_path / 'out'}" in ran.out
    assert "note: the adapter records no fingerprint of its base" in ran.out
    assert close(logits(causal(tmp_path / "out"), IDS), logits(peft_model(model, 1, **CONFIG), IDS))
    names = {p.name for p in (tmp_path / "base").iterdir()} | {"README.md"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base", "out"]
    cli("export", tmp_path / "a", "--into", tmp_path / "base", "-o", tmp_path / "out").refused(
        "exists already", "--overwrite"
    )


def test_weight_json_and_overwrite(cli, model, tmp_path):
    (tmp_path / "out").mkdir()
    ran = cli(
        "export", tmp_path / "a", "--into", tmp_path / "base", "-o", tmp_path / "out", "--weight", "-0.5", "--overwrite",
        "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    told, thing = json.loads(ran.out), Adapter.load(tmp_path / "a")
    assert told["adapter"] == {"name": "a", "hash": thing.content_hash, "weight": -0.5, "licence": None}
    before = model.state_dict()
    norms = torch.tensor([[before[f"{m}.weight"].norm(), 0.5 * thing[m].dense().norm()] for m in thing])
    assert told["change"] == pytest.approx(float(norms[:, 1].norm() / norms[:, 0].norm()), rel=1e-4)
    assert set(told["modules"]) == set(thing) and told["replaced"] == [] and told["out"] == str(tmp_path / "out")
    after = causal(tmp_path / "out").state_dict()
    module = "model.layers.0.self_attn.q_proj"
    assert close(after[f"{module}.weight"] - before[f"{module}.weight"], -0.5 * thing[module].dense(torch.float32))


def test_an_earlier_export_is_replaced_and_nothing_else(cli, model, tmp_path):
    run = ["export", tmp_path / "a", "--into", tmp_path / "base", "-o", tmp_path / "out", "--overwrite"]
    assert cli(*run).code == 0 and cli(*run, "--weight", "2").code == 0
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "mine.txt").write_text("keep")
    cli(*run).refused("also holds notes/mine.txt, which --overwrite would lose")
    assert (tmp_path / "out" / "notes" / "mine.txt").read_text() == "keep"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("keep")
    for target, says in (("other", "no earlier output"), ("file", "is a file")):
        cli(*run[:4], "-o", tmp_path / target, "--overwrite").refused(says)
    assert (tmp_path / "other" / "config.json").read_text() == "{}" and (tmp_path / "file").read_text() == "keep"


def test_another_base_is_refused(cli, model, tmp_path):
    thing = Adapter.load(tmp_path / "a")
    recorded = {"base": {"name": "x", "revision": None, "fingerprint": base_fingerprint(tiny_llama(5))}}
    other = Adapter("b", dict(thing), thing.config, type(thing.base).from_dict(recorded["base"]))
    other.save(tmp_path / "b")
    run = ["export", tmp_path / "b", "--into", tmp_path / "base", "-o", tmp_path / "out"]
    cli(*run).refused("adapter 'b' is of", "fingerprints", "--assume-same-base")
    assert not (tmp_path / "out").exists()
    ran = cli(*run, "--assume-same-base")
    assert ran.code == 0 and "was not checked" in ran.out


def test_small_changes_that_bf16_rounds_away_are_told(cli, model, tmp_path):
    tiny_llama().bfloat16().save_pretrained(tmp_path / "low")
    ran = cli("export", tmp_path / "a", "--into", tmp_path / "low", "-o", tmp_path / "out", "--weight", "0.001")
    assert ran.code == 0 and "stored as bf16" in ran.out and "saved in fp32 keeps them" in ran.out


def test_gguf(cli, model, tmp_path):
    gguf = pytest.importorskip("gguf")
    ran = cli(
        "export", tmp_path / "a", "--gguf", "--base", tmp_path / "base", "-o", tmp_path / "a.gguf", "--dtype", "f16"
    )
    assert ran.code == 0, ran.err
    assert "4 modules for llama.cpp's llama, alpha 8, f16" in ran.out and "lost to rounding" in ran.out
    names = {t.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert names == {f"blk.{i}.attn_{m}.weight.lora_{s}" for i in range(2) for m in "qv" for s in "ab"}
    told = cli("export", tmp_path / "a", "--gguf", "--base", tmp_path / "base", "-o", tmp_path / "b.gguf", "--json")
    assert json.loads(told.out)["tensors"]["model.layers.0.self_attn.q_proj"] == "blk.0.attn_q.weight"


def test_gguf_says_what_it_leaves_out(cli, model, tmp_path):
    pytest.importorskip("gguf")
    thing = Adapter.load(tmp_path / "a")
    copy = {"model.embed_tokens.base_layer.weight": torch.zeros(64, 32)}
    Adapter("b", dict(thing), thing.config, thing.base, copy).save(tmp_path / "b")
    run = ["export", tmp_path / "b", "--gguf", "--base", tmp_path / "base", "-o"]
    ran = cli(*run, tmp_path / "b.gguf")
    assert ran.code == 0 and "note: left out: model.embed_tokens.base_layer.weight" in ran.out
    notes = json.loads(cli(*run, tmp_path / "c.gguf", "--json").out)["notes"]
    assert len(notes) == 1 and "left out: model.embed_tokens.base_layer.weight" in notes[0]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "give one of --into BASE"),
        (["--gguf", "--into", "BASE"], "give one of --into BASE"),
        (["--into", "BASE", "--base", "BASE"], "--base goes with --gguf"),
        (["--into", "BASE", "--dtype", "f16"], "--dtype goes with --gguf"),
        (["--into", "nowhere"], "model folder 'nowhere' does not exist"),
        (["--into", "org/name"], "names no revision"),
        (["--into", "BASE", "--weight", "nan"], "weight nan is not a number to scale by"),
        (["--gguf", "--dtype", "q4_0", "--base", "BASE"], "--dtype 'q4_0'"),
        (["--gguf", "--base", "BASE", "--assume-same-base"], "--assume-same-base goes with --into"),
    ],
)
def test_flags_that_are_refused(flags, says, cli, model, tmp_path):
    given = [str(tmp_path / "base") if flag == "BASE" else flag for flag in flags]
    cli("export", tmp_path / "a", *given, "-o", tmp_path / "out").refused(says)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


def test_nothing_is_left_of_an_export_that_dies(cli, model, tmp_path, monkeypatch):
    """A disk that fills up in the middle."""
    write, calls = exporting.TensorFile.write, []

    def full(self, name, tensor):
        calls.append(name)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(exporting.TensorFile, "write", full)
    cli("export", tmp_path / "a", "--into", tmp_path / "base", "-o", tmp_path / "out").refused(
        "No space left on device"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]
