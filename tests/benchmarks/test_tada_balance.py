"""Balances of benchmarks/tada: where answers are read, what raises them, and keys of cells that were made before."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def text(tada, tmp_path, monkeypatch):
    """A site of texts over a tiny Llama and a task of two labels, whose first tokens differ; a random adapter."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests/training"), *sys.path])
    tiny = importlib.import_module("tiny")
    monkeypatch.setattr(tiny, "make_tokenizer", make_tokenizer)

    from transformers import AutoModelForCausalLM

    from helpers import peft_folder
    from loralloy.adapter import Adapter
    from loralloy.live.base import load_base
    from loralloy.tasks.task import Task

    model = str(tiny.save_model(tmp_path / "model"))
    folder = peft_folder(AutoModelForCausalLM.from_pretrained(model), tmp_path / "a", target_modules="all-linear", r=3)
    task = Task.load(tiny.save_task(tmp_path))
    fields = {"domains": {"d": "d.yaml"}, "max_length": 256}
    half = SimpleNamespace(name="language", fields=fields, few=None, calibration=12)
    site = object.__new__(tada.site_text.TextSite)
    site.half, site._tasks = half, {"d.yaml": task}
    site.model, site.tokenizer = load_base(model, "float32", "cpu")
    cell = tada.plan.Cell("t>d", 0, 3, tada.plan.ALONE[1], "balanced")
    outer = tada.work.Site(half, tmp_path, inner=site)
    adapter = Adapter.load(folder, "a")
    return SimpleNamespace(
        inner=site, outer=outer, adapter=adapter, balanced=lambda: outer.balanced(adapter, cell, "d")
    )


def make_tokenizer():
    """One token a byte, and one each for a space before y and n."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "\u0120y", "\u0120n"]
    tokens = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    raw = Tokenizer(models.BPE(tokens, [("\u0120", "y"), ("\u0120", "n")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def test_texts_are_balanced_at_the_last_token(text):
    import torch

    from loralloy.weighting.balance import shift

    found = text.inner.directions("d")
    ids = [text.inner.tokenizer.convert_tokens_to_ids(token) for token in ("\u0120y", "\u0120n")]
    assert torch.equal(found, text.inner.model.get_output_embeddings().weight[ids])
    made, told = text.balanced()
    answers, seen = text.inner.unlabelled_answers("d", 12, 0), []
    for adapter in (text.adapter, made):
        with text.outer.held(adapter):
            seen.append(float(shift(answers()).abs().max()))
    told = told["balance"]
    assert [told["before"], told["after"]] == pytest.approx(seen, rel=1e-3, abs=1e-4)
    assert seen[1] < 0.1 * seen[0] and told["module"] == "model.layers.1.mlp.down_proj"
    assert type(text.inner).read_at == -1  # where `score_options` reads the first token of an answer


@pytest.mark.parametrize("why", ["options of their own", "begin with the same token"])
def test_where_there_is_no_balance_the_adapter_stays_and_the_reason_is_told(text, why):
    if "options" in why:
        text.inner._tasks["d.yaml"] = SimpleNamespace(name="own", labels=())
    else:
        weight = text.inner.model.get_output_embeddings().weight
        ids = [text.inner.tokenizer.convert_tokens_to_ids(token) for token in ("\u0120y", "\u0120n")]
        weight.data[ids[1]] = weight.data[ids[0]]
    made, told = text.balanced()
    assert made is text.adapter and list(told["balance"]) == ["reason"] and why in told["balance"]["reason"]
    assert "balance" in told["seconds"]


def test_directions_of_images_raise_their_class(tada):
    """What is written along them at the class token moves the head's answers by their products, first order in its size."""
    import torch

    from loralloy.live.vision import ImageClassifier
    from vision_scenes import CLASSES, pictures, tiny_dinov2

    model = tiny_dinov2()
    with torch.no_grad():
        model.encoder.layer[-1].layer_scale2.lambda1.uniform_(0.3, 2.0)
        model.layernorm.weight.uniform_(0.5, 2.0)
    site = object.__new__(tada.site_images.ImageSite)
    site.model, site.classifier = model, ImageClassifier(model, CLASSES, size=28, seed=3)
    directions = site.directions("any")
    host = model.encoder.layer[-1].mlp.fc2
    assert (
        directions.shape == (3, host.out_features)
        and directions.dtype == torch.float32
        and tada.site_images.ImageSite.read_at == 0
    )
    images, _ = pictures(8)
    with torch.no_grad():
        plain = site.classifier(images)
    for k in range(3):
        spread = directions[k] - directions.mean(0)

        def write(_, args, output, u=spread):
            return torch.cat([output[:, :1] + 1e-2 * u, output[:, 1:]], 1)

        handle = host.register_forward_hook(write)
        with torch.no_grad():
            moved = site.classifier(images).log_softmax(1) - plain.log_softmax(1)
        handle.remove()
        assert (moved.argmax(1) == k).all() and (moved[:, k] > 0).all()


def test_keys_of_cells_that_were_made_before_stay(tada):
    """As they were when there were neither balances nor freed adapters; each protocol and each freed method has another."""
    from dataclasses import replace

    plan, method = tada.plan, tada.designs.Method
    fields = {"tasks": {"t": "t.yaml", "u": "u.yaml"}, "domains": {"d": "d.yaml"}, "rank": 8, "final": ["t>d"]}
    half = plan.Half("language", fields, (0,), (0,), 32, ("plain",))
    cell = plan.Cell("t>d", 0, 8, method("linear", "linear, dW"), "ones")
    ours = method("plain", "p", "tada", values={"threshold": 0.0}, rank="max", gate={"reference": "none"})
    assert tada.kept.key(half, cell) == "c4e72455e1bd"
    assert tada.kept.key(half, replace(cell, method=ours)) == "be1047745892"
    others = [replace(cell, at=at) for at in ("balanced", "tuned", "best")]
    others += [
        replace(cell, method=replace(cell.method, **more))
        for more in ({"common": 1}, {"common": 1, "common_of": "domain"})
    ]
    assert len({tada.kept.key(half, c) for c in (cell, *others)}) == 6
