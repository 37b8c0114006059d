"""The objective of images against plain sums, and learning coefficients with it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.live.learnable import Learnable
from loralloy.live.vision import affines, prototype_logits
from loralloy.training.images import train_images
from loralloy.weighting.learned import LearnConfig, learn
from loralloy.weighting.learned.images import ImageObjective
from vision_scenes import CLASSES, classifier, image_set, pictures

DOMAINS = ["noto"] * 6 + ["sketch"] * 3


def objective(c, **options):
    images, labels = pictures(9)
    return ImageObjective(c, images, labels, DOMAINS, **options), images, labels


def test_the_loss_is_the_mean_over_strata():
    o, images, labels = objective(c := classifier())
    assert o.size == 9 and o.strata[:2] == [f"noto/{CLASSES[0]}", f"noto/{CLASSES[1]}"] and o.model is c.backbone
    each = F.cross_entropy(c(images), labels, reduction="none")
    strata = [float(torch.stack([each[i] for i in range(9) if o.strata[i] == s]).mean()) for s in sorted(set(o.strata))]
    assert float(o.loss(range(9))) == pytest.approx(sum(strata) / len(strata), rel=1e-5)
    torch.testing.assert_close(o.losses([8, 0, 3]), each[[8, 0, 3]])


def test_entropy_looks_at_no_label():
    c = classifier()
    o, images, _ = objective(c, kind="entropy")
    p = c(images).softmax(1)
    torch.testing.assert_close(o.losses(range(9)), -(p * p.log()).sum(1))
    blind = ImageObjective(c, images, None, DOMAINS, kind="entropy")
    assert float(blind.loss(range(9))) == float(o.loss(range(9))) and set(o.strata) == {"noto", "sketch"}


def test_steps_are_augmented_and_repeatable():
    c = classifier()
    o, images, labels = objective(c, seed=5)
    still, _, _ = objective(c, augment=False)
    rows = [1, 5, 6]
    assert torch.equal(o.losses(rows, 3), o.losses(rows, 3))
    assert not torch.allclose(o.losses(rows, 3), o.losses(rows, 4))
    torch.testing.assert_close(o.losses(rows, 0), still.losses(rows, 9))
    want = F.cross_entropy(c(images[rows], affines(3, 5, 2)), labels[rows], reduction="none")
    torch.testing.assert_close(o.losses(rows, 2), want)
    two, _, _ = objective(c, seed=5, views=2)
    both = F.cross_entropy(
        c(images[rows].repeat(2, 1, 1, 1), affines(6, 5, 2)), labels[rows].repeat(2), reduction="none"
    )
    torch.testing.assert_close(two.losses(rows, 2), both.view(2, 3).mean(0))


def test_prototypes_leave_the_image_itself_out():
    c = classifier(head="prototypes", temperature=2.0)
    o, images, labels = objective(c, augment=False)
    features, rows = c.features(images), [2, 4]
    own = prototype_logits(features[rows], features, labels, classes=3, temperature=2.0, own=torch.tensor(rows))
    torch.testing.assert_close(o.losses(rows), F.cross_entropy(own, labels[rows], reduction="none"))
    assert c.support is None


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A classifier, a bank of two adapters of it, and a buffer of their domains."""
    folder, c = tmp_path_factory.mktemp("bank"), classifier()
    sets = [image_set("noto", 36, 0), image_set("sketch", 36, 5, shift=40)]
    for one in sets:
        train_images(c, one, folder / one.name, steps=30, batch_size=9, rank=2, alpha=8, lr=5e-3, evaluate=False)
    rows = [one.rows("train")[:6] for one in sets]
    images = torch.cat([one.load(own) for one, own in zip(sets, rows, strict=True)])
    labels = torch.cat([one.labels[own] for one, own in zip(sets, rows, strict=True)])
    return c, Bank.load([folder / one.name for one in sets]), (images, labels, ["noto"] * 6 + ["sketch"] * 6)


@pytest.mark.parametrize("head", ["random", "prototypes"])
def test_the_gradient_is_the_slope_of_the_loss(scene, head):
    _, bank, buffer = scene
    c = classifier(head=head)
    c.backbone.double()
    c.temperature = 0.5
    o = ImageObjective(c, *buffer, augment=False)
    live = Learnable(c.backbone, bank, "linear", "delta", dtype=torch.float64)
    table = torch.tensor([0.6, 0.3], dtype=torch.float64, requires_grad=True)
    with live.at(table):
        o.loss(range(12)).backward()
    slopes = []
    for i in range(2):
        ends = []
        for sign in (1, -1):
            moved = table.detach().clone()
            moved[i] += sign * 1e-2
            with live.at(moved):
                ends.append(float(o.loss(range(12))))
        slopes.append((ends[0] - ends[1]) / 2e-2)
    live.remove()
    assert table.grad.tolist() == pytest.approx(slopes, rel=2e-2, abs=1e-4)


def test_learning_lowers_the_loss_on_the_buffer(scene):
    c, bank, buffer = scene
    o = ImageObjective(c, *buffer, augment=False)
    with torch.no_grad():
        plain = float(o.loss(range(12)))
    config = LearnConfig(steps=15, hold_out=0, start="zero")
    learned = learn(c.backbone, bank, o, rule="linear", space="delta", b_max=1.0, config=config, progress=False)
    losses = [entry["loss"] for entry in learned.history]
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert float(o.loss(range(12))) == plain  # nothing is left in the model
    assert learned.weights.source == "learned" and set(learned.weights.names) == {"noto", "sketch"}


def test_what_is_refused():
    c = classifier()
    images, labels = pictures(3)
    for arguments, options, said in (
        ((images[:0], labels[:0], []), {}, "no images"),
        ((images, labels, ["a"]), {}, "give as many labels and domains"),
        ((images, None, ["a"] * 3), {}, "have no labels"),
        ((images, labels + 2, ["a"] * 3), {}, "out of range"),
        ((images, labels, ["a"] * 3), {"kind": "margin"}, "kind 'margin'"),
        ((images, labels, ["a"] * 3), {"views": 0}, "views is 0"),
    ):
        with pytest.raises(LoralloyError, match=said):
            ImageObjective(c, *arguments, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("head", ["random", "prototypes"])
def test_a_recorded_step_sees_its_own_augmentation(scene, head):
    _, bank, buffer = scene
    c = classifier(head=head).to("cuda")
    o, found = ImageObjective(c, *buffer, seed=3), []
    for replay in (True, False):
        config = LearnConfig(steps=15, hold_out=0, start="zero", replay=replay)
        found.append(learn(c.backbone, bank, o, rule="ties", config=config, progress=False))
    assert found[0].settings["replayed"] == 12 and found[1].settings["replayed"] == 0
    losses = [[step["loss"] for step in one.history] for one in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len({round(x, 4) for x in losses[0]}) > 10
    for name in bank.names:
        assert found[0].weights[name] == pytest.approx(found[1].weights[name], abs=1e-4)
