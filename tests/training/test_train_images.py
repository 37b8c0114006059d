"""Training an adapter of a vision transformer: what is written, what is learned, and what is left as it was."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from helpers import load_in_peft
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError
from loralloy.live.composed import LiveModel
from loralloy.training.image_config import ImageTrainConfig, find_targets
from loralloy.training.images import train_images
from loralloy.weights import Weights
from vision_scenes import classifier, image_set, tiny_dinov2

QUICK = {"steps": 12, "batch_size": 9, "rank": 2, "alpha": 8, "lr": 5e-3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(classifier, its state before, folder, metrics)."""
    c, out = classifier(), tmp_path_factory.mktemp("images") / "noto"
    before = {k: v.clone() for k, v in c.state_dict().items()}
    return c, before, out, train_images(c, image_set(), out, **QUICK)


def test_the_folder_is_peft_and_reads_strictly(trained):
    c, _, out, metrics = trained
    assert {p.name for p in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "training_log.jsonl", "metrics.json", "README.md",
    }  # fmt: skip
    adapter = Adapter.load(out).validate()
    own = {name for name, _ in c.backbone.named_modules()}
    assert len(adapter) == 12 and set(adapter) <= own
    assert adapter.base.fingerprint == c.fingerprint and adapter.provenance["training"]["rows"] == 18
    assert metrics["training"]["head"] == {"kind": "random", "mode": "frozen"}
    pixels = c.pixels(image_set().load([0, 1]))
    peft = load_in_peft(c.backbone, out)
    live = LiveModel(c.backbone, Bank([adapter]), BaseRef("tiny", None, c.fingerprint))
    with live.compose(Weights({adapter.name: 1.0})):
        got = c.backbone(pixel_values=pixels).last_hidden_state
    live.remove()
    torch.testing.assert_close(got, peft(pixel_values=pixels).last_hidden_state, rtol=1e-3, atol=1e-3)


def test_the_classifier_is_left_as_it_was(trained):
    c, before, _, _ = trained
    after = c.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert not any(p.requires_grad for p in c.parameters()) and not c.backbone.training and c.kind == "random"


def test_it_learns(tmp_path):
    c, data = classifier(), image_set(n=72)
    plain = float((c.predict(data.load(data.rows("test"))) == data.labels[data.rows("test")]).float().mean())
    metrics = train_images(c, data, tmp_path / "a", **{**QUICK, "steps": 60})
    assert metrics["test"]["noto"]["accuracy"] > max(0.8, plain)


def test_one_seed_makes_one_adapter(trained, tmp_path):
    first = Adapter.load(trained[2])
    c = classifier()
    train_images(c, image_set(), tmp_path / "same", **QUICK, evaluate=False)
    train_images(c, image_set(), tmp_path / "other", **QUICK, evaluate=False, seed=1)
    assert Adapter.load(tmp_path / "same").content_hash == first.content_hash
    assert Adapter.load(tmp_path / "other").content_hash != first.content_hash


def test_a_trained_head_is_saved_beside_the_adapter(tmp_path):
    c = classifier(head="learned")
    frozen = c.linear.weight.clone()
    metrics = train_images(c, image_set(n=72), tmp_path / "a", head="train", **{**QUICK, "steps": 30})
    assert torch.equal(c.linear.weight, frozen)
    c.load_head(tmp_path / "a")
    assert not torch.equal(c.linear.weight, frozen)
    bank = Bank.load([tmp_path / "a"])
    live, data = LiveModel(c.backbone, bank), image_set(n=72)
    rows = data.rows("test")
    with live.compose(Weights({bank.names[0]: 1.0})):
        accuracy = float((c.predict(data.load(rows)) == data.labels[rows]).float().mean())
    live.remove()
    assert accuracy == pytest.approx(metrics["test"]["noto"]["accuracy"], abs=0.05)  # saved in fp16


def test_several_domains_train_jointly(tmp_path):
    c = classifier()
    other = image_set("sketch", seed=5, shift=40)
    metrics = train_images(c, [image_set(), other], tmp_path / "joint", **QUICK)
    assert metrics["training"]["rows"] == 36 and set(metrics["test"]) == {"noto", "sketch"}
    assert metrics["training"]["task"] == "noto+sketch"
    with pytest.raises(LoralloyError, match="other classes"):
        train_images(c, dataclasses.replace(other, classes=("a", "b", "c")), tmp_path / "x", **QUICK)


def test_it_goes_on_from_an_adapter(trained, tmp_path):
    c, _, first, _ = trained
    still = {**QUICK, "steps": 1, "lr": 1e-12}
    metrics = train_images(c, image_set(), tmp_path / "more", init_adapter=first, evaluate=False, **still)
    a, b = Adapter.load(first), Adapter.load(tmp_path / "more")
    for module in a:
        torch.testing.assert_close(a[module].dense(), b[module].dense(), rtol=1e-3, atol=1e-5)
    assert metrics["training"]["first_stage"]["hash"] == a.content_hash
    with pytest.raises(LoralloyError, match="pass rank=2 and alpha=8"):
        train_images(c, image_set(), tmp_path / "x", init_adapter=first, **{**QUICK, "rank": 4})
    with pytest.raises(LoralloyError, match="train the same modules"):
        train_images(c, image_set(), tmp_path / "x", init_adapter=first, **{**QUICK, "targets": ("q", "v")})
    assert not any("lora" in name for name, _ in c.backbone.named_modules())


def test_targets_are_found_by_what_the_model_has():
    for backbone in (tiny_dinov2(), old_names(), vit()):
        found = find_targets(backbone, ImageTrainConfig().targets)
        linear = [n for n, m in backbone.named_modules() if isinstance(m, torch.nn.Linear)]
        hit = [[n for n in linear if n.endswith(f".{t}")] for t in found]
        assert len(found) == 6 and all(hit)
        assert sorted({n for names in hit for n in names}) == sorted(linear)  # each linear layer, by one target or two
    with pytest.raises(LoralloyError, match="target 'gate' is not in this model"):
        find_targets(tiny_dinov2(), ["q", "gate"])


def old_names() -> torch.nn.Module:
    """The module names of older releases."""
    names = (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
    )
    root = torch.nn.Module()
    for name in (*names, "mlp.fc1", "mlp.fc2"):
        at = root
        for part in ("layer", *name.split(".")[:-1]):
            if not hasattr(at, part):
                setattr(at, part, torch.nn.Module())
            at = getattr(at, part)
        setattr(at, name.rsplit(".", 1)[-1], torch.nn.Linear(2, 2))
    return root


def vit() -> torch.nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, image_size=16, patch_size=8
    )
    return ViTModel(config, add_pooling_layer=False)


def test_options_out_of_range_are_named(tmp_path):
    c = classifier()
    for options, said in (
        ({"rank": 0}, "option rank is 0"),
        ({"lr": -1.0}, "option lr is -1.0"),
        ({"dropout": 1.0}, "option dropout is 1.0; it must be from 0 to below 1"),
        ({"weight_decay": float("nan")}, "option weight_decay is nan"),
        ({"targets": ""}, "option targets is"),
        ({"epochs": 3}, "no option 'epochs'; it has: rank"),
        ({"head": "half"}, "head 'half' is unknown"),
    ):
        with pytest.raises(LoralloyError, match=said):
            train_images(c, image_set(), tmp_path / "a", **options)
    (tmp_path / "a").mkdir()
    with pytest.raises(LoralloyError, match="exists already"):
        train_images(c, image_set(), tmp_path / "a", **QUICK)


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_nothing(tmp_path):
    c = classifier()
    with pytest.raises(LoralloyError, match="lower lr"):
        train_images(c, image_set(), tmp_path / "a", **{**QUICK, "lr": 1e30})
    assert list(tmp_path.iterdir()) == []
    assert not any("lora" in name for name, _ in c.backbone.named_modules())
