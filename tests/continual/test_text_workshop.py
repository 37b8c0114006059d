"""The workshop of text on a tiny Llama: real tasks, real training, a stream from end to end."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from small_tasks import write_task

from loralloy.bank import Bank
from loralloy.continual import DomainStream, MemoryBuffer, Workshop, make_workshop
from loralloy.continual.buffer import BufferRow
from loralloy.continual.run import run
from loralloy.continual.workshop import composed
from loralloy.errors import LoralloyError
from loralloy.live.composed import LiveModel
from loralloy.live.scoring import correct, predict
from loralloy.weighting import balance
from loralloy.weighting.balance import shift
from loralloy.weights import Weights

TRAIN = {"rank": 2, "alpha": 4, "lr": 0.01, "epochs": 1, "limit": 16, "max_length": 96, "save_dtype": "fp32"}


def write_stream(folder, **fields):
    data = {
        "version": 1, "model": "model", "out": "out", "train": TRAIN,
        "experiences": [{"name": name, "task": f"tasks/{name}.yaml"} for name in ("spam", "weather")],
        "merges": [{"rule": "linear", "space": "delta"}],
        "strategies": [{"kind": "learned", "steps": 3}, "regmean", {"kind": "entropy", "steps": 2}, "sequential", "oracle"],
        **fields,
    }  # fmt: skip
    (folder / "stream.yaml").write_text(json.dumps(data))
    return DomainStream.load(folder / "stream.yaml")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tiny.save_model(folder / "model")
    for name in ("spam", "weather"):
        write_task(folder / "tasks", name)
    return folder


@pytest.fixture(scope="module")
def workshop(place):
    return make_workshop(write_stream(place))


def test_it_is_a_workshop(workshop):
    assert isinstance(workshop, Workshop)
    assert not workshop.leads() and not workshop.remembers()
    assert workshop.identity("train") == {
        k: v for k, v in workshop.identity("evaluate").items() if k not in ("split", "limit")
    }


def test_rows_are_what_is_trained_on(workshop):
    spam = workshop.experiences["spam"]
    ids, labels = workshop.labels(spam, "train")
    assert len(ids) == 16 and set(labels) == {"a", "b"}  # `limit` of the training
    rows = workshop.rows(spam, ids)
    examples = {e.id: e for e in spam.task.examples("train")}
    for i, label, row in zip(ids, labels, rows, strict=True):
        assert row == {"prompt": examples[i].prompt, "answer": label, "options": ["a", "b"]}
    assert workshop.features(spam, ids[:5]).shape == (5, 32)
    # padding changes nothing
    assert torch.allclose(workshop.features(spam, ids)[3], workshop.features(spam, [ids[3]])[0], atol=1e-4)


def test_entropy_does_not_see_labels(workshop):
    spam = workshop.experiences["spam"]
    ids, labels = workshop.labels(spam, "train")
    buffer = MemoryBuffer(3)
    data = workshop.rows(spam, ids)
    buffer.add("spam", ids, labels, None, data)
    turned = [{**row, "answer": "a" if row["answer"] == "b" else "b"} for row in data]
    other = MemoryBuffer(3)
    other.add("spam", ids, labels, None, turned)
    every = range(len(buffer))
    one, two = (workshop.objective(b.rows, "entropy") for b in (buffer, other))
    assert float(one.loss(every)) == float(two.loss(every)) and one.strata == two.strata
    one, two = (workshop.objective(b.rows) for b in (buffer, other))
    assert float(one.loss(every)) != float(two.loss(every))
    assert set(one.strata) == {"spam/a", "spam/b"}


def test_the_fingerprint_is_of_the_rows(place, workshop, tmp_path):
    prints = {workshop.fingerprint(e) for e in workshop.experiences.values()}
    assert len(prints) == 2
    again = write_task(tmp_path, "spam")
    changed = write_task(tmp_path / "other", "spam", answers="ba")
    from loralloy.continual import Experience

    assert workshop.fingerprint(Experience("x", again)) == workshop.fingerprint(workshop.experiences["spam"])
    assert workshop.fingerprint(Experience("x", changed)) not in prints


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"lrr": 1}, "no option 'lrr'"),
        ({"lr": "1e-3"}, r"`train\.lr` is '1e-3'; give a number, without quotes"),
        ({"limit": 2.5}, "whole number"),
        ({"seed": 1}, "the stream's own"),
        ({"save_dtype": "int8"}, "fp16, bf16, fp32"),
    ],
)
def test_wrong_training_options(place, train, says):
    with pytest.raises(LoralloyError, match=says):
        make_workshop(write_stream(place, train=train))


def test_a_stream_from_end_to_end(place, workshop):
    stream = write_stream(place)
    before = {name: p.clone() for name, p in workshop.model.named_parameters()}
    plan = run(stream, workshop)
    assert all(torch.equal(p, before[name]) for name, p in workshop.model.named_parameters())
    folders = sorted((stream.out / "adapters").iterdir())
    assert len(folders) == 3  # two domains, and the sequential adapter's second
    # adapters are trained from the base: not one from another
    own = [
        f
        for f in folders
        if json.loads((f / "metrics.json").read_text())["training"]["hyperparameters"]["init_adapter"] is None
    ]
    assert len(own) == 2
    # the accuracy on record is that of PEFT's sum, run beside the base
    step = next(s for s in plan.steps.values() if s.strategy and s.strategy.kind == "learned" and len(s.arrived) == 2)
    result = json.loads((stream.out / "experiences" / step.key / "result.json").read_text())
    weights = Weights.load(stream.out / "experiences" / step.key / "weights.json")
    from loralloy.adapter import Adapter

    live = LiveModel(
        workshop.model, Bank([Adapter.load(stream.out / "adapters" / j.folder, j.domains[0]) for j in step.adapters])
    )
    for name, experience in workshop.experiences.items():
        examples = experience.task.examples("test")
        with live.compose(weights):
            found = predict(
                workshop.model, workshop.tokenizer, [e.prompt for e in examples], [e.options for e in examples]
            )
        bits = "".join("01"[c] for c in correct(found, [e.answer for e in examples]))
        assert bits == result["domains"][name]["correct"]
    live.remove()
    assert result["rank"] == "full" and result["cut"] == pytest.approx(0, abs=1e-4)


def test_16_bit_models_are_evaluated_with_the_adapter_beside_the_base(place, workshop):
    """A dW much smaller than the weights is lost when it is added to them in bfloat16."""
    folder = next((place / "out" / "adapters").glob("spam-seed0-*"))
    half = make_workshop(write_stream(place, dtype="bfloat16"))
    ids = torch.tensor([[5, 6, 7, 8]])
    base = half.model(ids).logits
    with composed(half, folder):
        assert "weight" not in half.model.model.layers[0].self_attn.q_proj.__dict__
        inside = half.model(ids).logits
    assert not torch.equal(inside, base) and torch.equal(half.model(ids).logits, base)
    assert load_file(folder / "adapter_model.safetensors")


def test_a_balanced_merge_of_texts(place, workshop, monkeypatch):
    def second(model, tokenizer, labels):  # a token a byte: all answers begin with the space
        ids = [tokenizer(f" {label}", add_special_tokens=False)["input_ids"][1] for label in labels]
        return model.get_output_embeddings().weight.detach()[ids].float()

    monkeypatch.setattr(balance, "text_directions", second)
    strategies = [{"kind": "fixed", "weight": 4.0}, {"kind": "fixed", "weight": 4.0, "balance": True}]
    stream = write_stream(
        place, out="balanced", strategies=strategies, buffer={"per_class": 4}, keep_merged=True, after="last"
    )
    plan = run(stream, workshop)
    steps, shifts = [s for s in plan.steps.values() if s.strategy], {}
    job = next(s.buffer for s in steps if s.buffer is not None)
    rows = MemoryBuffer.restore(stream.out / "buffers" / job.key).rows
    for step in steps:
        folder = stream.out / "experiences" / step.key
        with composed(workshop, folder / "merged"), torch.no_grad():
            shifts[step.strategy.balance] = float(shift(workshop.answering(rows).run()).abs().max())
        told = json.loads((folder / "result.json").read_text()).get("balance")
        assert (told is not None) == step.strategy.balance
        if told:
            assert told["after"] == pytest.approx(shifts[True], abs=5e-3) and told["before"] > told["after"]
    assert shifts[True] < 0.1 * shifts[False]


def test_rows_of_several_sets_of_options_have_no_balance(workshop):
    rows = [BufferRow(str(n), "spam", "a", {"prompt": "p", "options": o}) for n, o in enumerate((["a", "b"], ["a"]))]
    with pytest.raises(LoralloyError, match="2 sets of options or free text; leave it out"):
        workshop.answering(rows)
    with pytest.raises(LoralloyError, match="1 sets of options or free text"):
        workshop.answering([BufferRow("0", "spam", "a", {"prompt": "p", "options": []})])
