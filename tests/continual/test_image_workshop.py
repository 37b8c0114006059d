"""The workshop of images: the protocol's promises, and a whole stream of tiny pictures."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import yaml

from loralloy.bank import Bank
from loralloy.continual.buffer import BufferRow, MemoryBuffer
from loralloy.continual.experience import DomainStream
from loralloy.continual.images import ImageWorkshop
from loralloy.continual.run import run
from loralloy.continual.workshop import Workshop, composed, make_workshop
from loralloy.errors import LoralloyError
from loralloy.live.vision import HEAD_FILE
from loralloy.weighting.balance import shift
from vision_scenes import image_tree, tiny_dinov2

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    image_tree(folder / "pacs", DOMAINS, images=5)
    tiny_dinov2().save_pretrained(folder / "vit")
    return folder


def stream_of(place, out="out", head="random", **changes) -> DomainStream:
    data = {
        "version": 1, "kind": "images", "model": "vit", "device": "cpu", "out": out,
        "images": {"path": "pacs", "layout": "pacs", "size": 28, "head": head},
        "experiences": [{"name": "photo"}, {"name": "drawn", "domain": "sketch"}],
        "train": {"steps": 4, "batch_size": 6, "rank": 2, "alpha": 4, "lr": 0.003, "augment": False},
        "merges": [{"rule": "linear", "space": "delta"}],
        "strategies": [{"kind": "fixed", "weight": 0.5}],
    }  # fmt: skip
    path = place / f"{out}.yaml"
    path.write_text(yaml.safe_dump(data | changes))
    return DomainStream.load(path)


def workshop_of(place, **options) -> ImageWorkshop:
    found = make_workshop(stream_of(place, **options))
    assert isinstance(found, ImageWorkshop) and isinstance(found, Workshop)
    return found


def buffer_rows(workshop, count=6):
    rows = []
    for experience in workshop.experiences.values():
        ids, labels = workshop.labels(experience, "train")
        data = workshop.rows(experience, ids)
        found = zip(ids[:count], labels, data, strict=False)
        rows += [BufferRow(i, experience.name, label, own) for i, label, own in found]
    return rows


def test_what_a_domain_is(place):
    w = workshop_of(place)
    drawn = w.experiences["drawn"]
    ids, labels = w.labels(drawn, "test")
    assert len(ids) == 3 and all(i.startswith("sketch/") for i in ids) and labels == ["circle", "square", "star"]
    train, _ = w.labels(drawn, "train")
    assert len(train) == 12 and not set(train) & set(ids)
    features = w.features(drawn, train[:3])
    assert features.shape == (3, 32) and features.device.type == "cpu"
    assert w.fingerprint(drawn) != w.fingerprint(w.experiences["photo"])
    assert w.fingerprint(drawn) == workshop_of(place).fingerprint(drawn)
    json.dumps([w.identity("train"), w.identity("evaluate")])


def test_training_leaves_the_model_and_the_adapter_fits_it(place, tmp_path):
    w = workshop_of(place)
    before = {k: v.clone() for k, v in w.model.state_dict().items()}
    w.begin(3, None)
    out = w.train([w.experiences["photo"]], tmp_path / "photo", 3)
    after = w.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    images = w.sets["photo"].load(range(4))
    plain = w.classifier(images)
    with composed(w, out):
        assert not torch.allclose(w.classifier(images), plain)
    torch.testing.assert_close(w.classifier(images), plain)
    assert Bank.load([out]).base.fingerprint == w.base.fingerprint
    more = w.train([w.experiences["drawn"]], tmp_path / "more", 3, out)
    joint = w.train(list(w.experiences.values()), tmp_path / "joint", 3)
    for folder, steps in ((more, 4), (joint, 8)):  # jointly, each domain gets its own steps
        assert len((folder / "training_log.jsonl").read_text().splitlines()) == steps
        assert not (folder / HEAD_FILE).exists()


def test_a_head_learned_on_the_first_domain_is_shared(place, tmp_path):
    w = workshop_of(place, head="learned")
    assert w.leads() and not w.remembers()
    w.begin(0, None)
    drawn = w.classifier.linear.weight.clone()
    lead = w.train([w.experiences["photo"]], tmp_path / "lead", 0)
    assert (lead / HEAD_FILE).is_file()
    w.begin(0, lead)
    shared = w.classifier.linear.weight.clone()
    assert not torch.equal(shared, drawn)
    second = w.train([w.experiences["drawn"]], tmp_path / "second", 0)
    assert not (second / HEAD_FILE).exists() and torch.equal(w.classifier.linear.weight, shared)
    joint = w.train(list(w.experiences.values()), tmp_path / "joint", 0)
    w.after_merge([], joint)
    assert not torch.equal(w.classifier.linear.weight, shared)
    w.after_merge([], None)
    assert torch.equal(w.classifier.linear.weight, shared)


def test_prototypes_are_made_again_after_each_merge(place, tmp_path):
    w = workshop_of(place, head="prototypes")
    assert w.remembers() and not w.leads()
    with pytest.raises(LoralloyError, match="buffer with at least one row"):
        w.after_merge([])
    w.begin(0, None)
    out = w.train([w.experiences["photo"]], tmp_path / "photo", 0)
    rows = buffer_rows(w)
    w.after_merge(rows)
    plain = w.classifier.support[0].clone()
    with composed(w, out):
        w.after_merge(rows)
        assert not torch.allclose(w.classifier.support[0], plain)
    w.begin(0, None)
    with pytest.raises(LoralloyError, match="no prototypes yet"):
        w.evaluate(w.experiences["photo"])
    random = workshop_of(place)
    assert w.identity("train") == random.identity("train")  # one adapter serves both
    assert w.identity("evaluate") != random.identity("evaluate")


def test_heads_are_drawn_by_the_runs_seed(place):
    w = workshop_of(place)
    w.begin(1, None)
    one = w.classifier.linear.weight.clone()
    w.begin(2, None)
    assert not torch.equal(one, w.classifier.linear.weight)
    w.begin(1, None)
    assert torch.equal(one, w.classifier.linear.weight)


def test_objectives_and_inputs_are_the_buffers_rows(place):
    w = workshop_of(place)
    rows = buffer_rows(w)
    rows = rows[::2] + rows[1::2]  # domains mixed
    o = w.objective(rows)
    assert o.size == 12 and list(o.strata) == [row.stratum for row in rows] and o.model is w.model
    images = torch.cat([w.sets[row.domain].load(w.sets[row.domain].find([row.id])) for row in rows])
    (batch,) = w.inputs(rows)
    torch.testing.assert_close(batch["pixel_values"], w.classifier.pixels(images))
    w.model(**batch)
    entropy = w.objective(rows, "entropy")
    assert float(entropy.loss(range(12))) > 0
    unlabelled = [dataclasses.replace(row, label="") for row in rows]  # drawn without their labels
    assert torch.equal(w.inputs(unlabelled)[0]["pixel_values"], batch["pixel_values"])
    torch.testing.assert_close(w.objective(unlabelled, "entropy").loss(range(12)), entropy.loss(range(12)))
    with pytest.raises(LoralloyError, match="the images have no labels"):
        w.objective(unlabelled)


def test_evaluations_are_row_by_row(place):
    w = workshop_of(place)
    photo = w.experiences["photo"]
    rows = w.sets["photo"].rows("test")
    want = w.classifier.predict(w.sets["photo"].load(rows)) == w.sets["photo"].labels[rows]
    assert list(w.evaluate(photo).correct) == want.tolist()
    limited = workshop_of(place, out="limited", evaluate={"limit": 2, "batch_size": 1})
    assert list(limited.evaluate(photo).correct) == want.tolist()[:2]
    with pytest.raises(LoralloyError, match="no validation images"):
        workshop_of(place, out="none", evaluate={"split": "validation"}).evaluate(photo)


def test_what_is_refused(place):
    with pytest.raises(LoralloyError, match="has no domain 'oil'; it has art_painting"):
        workshop_of(place, experiences=[{"name": "oil"}])
    with pytest.raises(LoralloyError, match="no option 'epochs'"):
        workshop_of(place, train={"epochs": 1})
    with pytest.raises(LoralloyError, match=r"`train\.seed`"):
        workshop_of(place, train={"seed": 1})
    with pytest.raises(LoralloyError, match=r"no validation images \(`evaluate\.split`\)"):  # before any training
        workshop_of(place, evaluate={"split": "validation"})
    with pytest.raises(LoralloyError, match="'nope' is not in this model"):
        workshop_of(place, train={"targets": ["q", "nope"]})


@pytest.mark.parametrize(
    "train",
    [
        {"lr": "1e-3"}, {"lr": None}, {"lr": math.nan}, {"steps": 4.0}, {"rank": True}, {"augment": "no"}, {"targets": []},
        {"targets": [1]}, {"targets": None}, {"dropout": "x"}, {"weight_decay": math.nan}, {"limit": "3"},
        {"save_dtype": ["fp16"]},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_training_options(place, train):
    with pytest.raises(LoralloyError, match=rf"{next(iter(train))}`? is "):
        workshop_of(place, train=train)


@pytest.mark.parametrize("head", ["random", "learned", "prototypes"])
def test_a_stream_runs_to_its_end(place, head):
    strategies = ["joint", "sequential", "oracle", {"kind": "fixed", "weight": 0.5}, {"kind": "learned", "steps": 2}]
    if head == "random":
        strategies += [{"kind": "entropy", "unlabelled": 4, "steps": 2}, {"kind": "regmean", "unlabelled": 4}]
    stream = stream_of(place, out=f"run-{head}", head=head, strategies=strategies)
    plan = run(stream)
    assert len(plan.runs) == len(strategies)
    for step in plan.steps.values():
        result = json.loads((stream.out / "experiences" / step.key / "result.json").read_text())
        assert all(0 <= d["accuracy"] <= 1 and d["n"] == 3 for d in result["domains"].values())


def test_a_balanced_merge_answers_evenly_over_the_buffer(place):
    """What is evaluated is the balanced adapter, and the strategy without it is another experience."""
    strategies = [{"kind": "fixed", "weight": [4.0]}, {"kind": "fixed", "weight": [4.0], "balance": True}]
    strategies.append({"kind": "learned", "steps": 2, "balance": True})
    stream = stream_of(place, out="balanced", strategies=strategies, buffer={"per_class": 2}, keep_merged=True)
    workshop = workshop_of(place, out="balanced", strategies=strategies, buffer={"per_class": 2}, keep_merged=True)
    plan = run(stream, workshop)
    assert len({r.strategy for r in plan.runs}) == 3
    last = [s for s in plan.steps.values() if s.strategy and len(s.arrived) == 2]
    assert len(last) == 3
    shifts = {}
    for step in last:
        folder = stream.out / "experiences" / step.key
        result = json.loads((folder / "result.json").read_text())
        rows = MemoryBuffer.restore(stream.out / "buffers" / next(s for s in last if s.buffer).buffer.key).rows
        workshop.begin(step.seed, None)
        with composed(workshop, folder / "merged"), torch.no_grad():
            shifts[step.strategy.name] = float(shift(workshop.answering(rows).run()).abs().max())
        assert ("balance" in result) == step.strategy.balance
        if step.strategy.balance:
            told = result["balance"]
            assert told["after"] == pytest.approx(shifts[step.strategy.name], abs=2e-3)
            assert told["after"] <= max(0.02, 0.2 * told["before"])
    plain, even = (s.strategy.name for s in last if s.strategy.kind == "fixed")
    assert shifts[plain] > 0.1 > shifts[even]


def test_a_balance_needs_a_linear_head_and_a_merge(place):
    strategies = [{"kind": "fixed", "weight": 1.0, "balance": True}]
    stream = stream_of(place, out="even", head="prototypes", strategies=strategies)
    with pytest.raises(LoralloyError, match="head of prototypes has no direction"):
        run(stream)
    with pytest.raises(LoralloyError, match="joint merges nothing: leave it out"):
        stream_of(place, out="odd", strategies=[{"kind": "joint", "balance": True}])
