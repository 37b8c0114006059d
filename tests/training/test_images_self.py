"""Adapters of a style from images without labels: what is learned, that no label is read, and what is left behind."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from loralloy.adapter import Adapter
from loralloy.errors import LoralloyError
from loralloy.live.vision import ImageClassifier
from loralloy.tasks.image_set import from_arrays
from loralloy.training.images_self import blanked, train_images_unlabelled
from vision_scenes import CLASSES, pictures, tiny_dinov2

SMALL = {"rank": 2, "alpha": 4.0, "steps": 30, "batch_size": 8, "lr": 5e-3}


@pytest.fixture
def scene():
    images, labels = pictures(24, seed=0)
    split = torch.tensor([0] * 16 + [2] * 8)
    return ImageClassifier(tiny_dinov2(), CLASSES, size=28), from_arrays("style", images, labels, split, CLASSES)


def factors(folder):
    adapter = Adapter.load(folder)
    return {m: adapter[m].dense() for m in adapter}


def test_it_learns_what_is_hidden_and_leaves_the_classifier_as_it_was(scene, tmp_path):
    classifier, data = scene
    before = {k: v.clone() for k, v in classifier.state_dict().items()}
    told = train_images_unlabelled(classifier, data, tmp_path / "a", **SMALL)
    log = [json.loads(line) for line in (tmp_path / "a/training_log.jsonl").read_text().splitlines()]
    assert len(log) == 30 and sum(e["loss"] for e in log[-5:]) < 0.9 * sum(e["loss"] for e in log[:5])
    assert told["training"]["rows"] == 16 and "no labels" in told["training"]["objective"]
    assert all(d.norm() > 0 for d in factors(tmp_path / "a").values())
    after = classifier.state_dict()
    assert after.keys() == before.keys() and all(after[k].equal(v) for k, v in before.items())
    assert not any(p.requires_grad for p in classifier.parameters())


def test_labels_and_other_splits_change_nothing(scene, tmp_path):
    classifier, data = scene
    short = SMALL | {"steps": 4}
    train_images_unlabelled(classifier, data, tmp_path / "a", **short)
    images = data.load(range(24)).clone()
    images[16:] = 255 - images[16:]
    other = from_arrays("style", images, 1 - data.labels.clamp(max=1), data.split, CLASSES)
    classifier.draw_head(5)
    train_images_unlabelled(classifier, other, tmp_path / "b", **short)
    one, two = factors(tmp_path / "a"), factors(tmp_path / "b")
    assert all(one[m].equal(two[m]) for m in one)
    train_images_unlabelled(classifier, data, tmp_path / "c", **short, seed=1)
    assert any(not one[m].equal(d) for m, d in factors(tmp_path / "c").items())


def test_masks_hide_their_share_and_are_the_seeds():
    mask = blanked(50, 16, 0.5, 3)
    assert mask.sum(1).eq(8).all() and mask.equal(blanked(50, 16, 0.5, 3)) and not mask.equal(blanked(50, 16, 0.5, 4))
    assert blanked(5, 4, 0.01, 0).sum(1).eq(1).all() and blanked(5, 4, 0.99, 0).sum(1).eq(3).all()


def test_wrong_settings_are_refused(scene, tmp_path):
    classifier, data = scene
    with pytest.raises(LoralloyError, match="masked is 1"):
        train_images_unlabelled(classifier, data, tmp_path / "a", masked=1.0)
    with pytest.raises(LoralloyError, match="no images"):
        train_images_unlabelled(classifier, data, tmp_path / "a", rows=[])
    empty = replace(data, split=torch.full((24,), 2, dtype=torch.uint8))
    with pytest.raises(LoralloyError, match="no images"):
        train_images_unlabelled(classifier, empty, tmp_path / "a")
    assert not (tmp_path / "a").exists()
