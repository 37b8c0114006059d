"""The probe: the linear one against its gradient, the router's laws, and what is kept beside the index."""

from __future__ import annotations

import json

import numpy as np
import pytest

from loralloy.errors import LoralloyError
from loralloy.weighting import ProbeRouter, Router, TunedRouter, fitted, nucleus, open_weigher
from loralloy.weighting.calibration import calibration_error, log_loss, softmax, squared_distances
from loralloy.weighting.choose import fit_all
from loralloy.weighting.leave_one_out import Rows, brier
from loralloy.weighting.linear_probe import solve
from loralloy.weighting.probe_fit import Design, Probe, fit_probe


def same(a, b):
    return all(x.names == y.names and dict(x.items()) == pytest.approx(dict(y.items()), rel=1e-4)
               for x, y in zip(a, b, strict=True))  # fmt: skip


def test_the_solution_is_a_minimum(build):
    """The gradient of balanced log-loss + L2 (in whitened coordinates), written out in float64, is about 0."""
    rows = Rows.of(build())
    every = np.arange(len(rows.labels))
    (weight, bias), (weaker, _) = solve(rows, (0.02, 5.0), every)
    x, own, share = rows.vectors.astype(np.float64), rows.labels, rows.shares()
    means = np.stack([x[own == t].mean(0) for t in range(3)])
    spread = x - means[own]
    values, axes = np.linalg.eigh((spread * share[:, None]).T @ spread)
    unwhiten = axes * np.sqrt(values + 0.1 * values.mean())
    inner = weight @ unwhiten  # the weights that the L2 norm counts
    p = softmax(x @ weight.T + bias)
    residual = (p - np.eye(3)[own]) * share[:, None]
    gradient = residual.T @ (x - means.mean(0)) @ (axes / np.sqrt(values + 0.1 * values.mean()))
    gradient += inner / (0.02 * len(own))
    assert np.abs(gradient).max() < 1e-3 and np.abs(residual.sum(0)).max() < 1e-3
    assert np.abs(inner).max() > 0.05 and np.linalg.norm(weaker @ unwhiten) > np.linalg.norm(inner)


def test_measures_by_hand():
    logits = np.log(np.array([[0.8, 0.2], [0.6, 0.4]]))
    assert log_loss(logits, np.array([0, 1]), np.array([0.5, 0.5])) == pytest.approx(-(np.log(0.8) + np.log(0.4)) / 2)
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.55, 0.45], [0.55, 0.45]])
    assert calibration_error(p, np.array([0, 0, 0, 1])) == pytest.approx((0.1 + 0.05) / 2)
    assert calibration_error(np.eye(2), np.array([0, 1])) == 0
    scores = squared_distances(p, np.array([0, 0, 0, 1]))
    np.testing.assert_allclose(scores, [2 * 0.1**2, 2 * 0.1**2, 2 * 0.45**2, 2 * 0.55**2])
    assert scores.mean() == pytest.approx(brier(p, [0, 0, 0, 1], np.full(4, 0.25)))


def test_weights_are_the_probabilities_after_the_nucleus(build, questions):
    index = build()
    router = ProbeRouter(index, p=0.8)
    probe, vectors = router.fit(), index.embed(questions)
    x = vectors.astype(np.float64)
    for n, (weight, bias) in enumerate(probe.layers):
        x = (np.maximum(x, 0) if n else x) @ weight.T.astype(np.float64) + bias
    p = softmax(x / probe.temperature)
    for weights, row in zip(router.weigh_vectors(vectors), p, strict=True):
        mass = dict(zip(probe.tasks, row, strict=True))
        assert weights.explain["mass"] == pytest.approx(mass, rel=1e-4) and weights.source == "probe"
        assert dict(weights.items()) == pytest.approx(nucleus(mass, 0.8), rel=1e-4)
        assert 0 <= weights.explain["unlike"] <= 1 and len(weights.explain["neighbours"]) == 5
    flat = ProbeRouter(index, p=1.0, temperature=1e4).weigh(questions[0])
    assert max(w for _, w in flat.items()) < 0.45  # of three
    assert set(router.settings) == {"router", "p", "temperature", "calibration temperature", *probe.design.settings}


def test_the_probe_knows_the_tasks_by_both_kinds_of_query(build, tasks):
    router = ProbeRouter(build())
    rows = [e for task in tasks.values() for e in task.examples("test")]
    for texts in ([e.raw for e in rows], [e.query for e in rows]):
        right = [w.names[0] == e.task for w, e in zip(router.weigh_batch(texts), rows, strict=True)]
        assert np.mean(right) > 0.85
    report = router.fit().report
    assert report["held out"] == 36 and set(report) == {"held out", "hinted", "raw", "brier"}
    assert report["raw"]["top1"] > 0.8 and 0 <= report["raw"]["calibration_error"] < 0.3


@pytest.mark.parametrize("kind", ["probe", "kernel", "paper"])
def test_leaving_a_task_out_is_an_index_without_it(build, questions, kind):
    """`exclude`, `exclude_each` and `only` against an index that never held the task; same design and temperature."""
    index, small = build(), build("cooking", "weather")
    router = open_weigher(index, kind)
    if kind == "probe":
        whole, alone = ProbeRouter(index), ProbeRouter(small)
        want = fit_probe(Rows.of(small), (whole.fit().design, whole.fit().temperature))
        for made, wanted in zip(whole.fit(["spam"]).layers, want.layers, strict=True):
            np.testing.assert_allclose(made[0], wanted[0], atol=1e-5)
        assert whole.fit(["spam"]).tasks == ("cooking", "weather")
        assert same(
            ProbeRouter(index, only=["cooking", "weather"]).weigh_batch(questions), alone.weigh_batch(questions)
        )
    else:
        left = router.weigh_batch(questions, exclude=["spam"])
        assert same(left, open_weigher(small, kind).weigh_batch(questions))
        assert same(open_weigher(index, kind, only=["cooking", "weather"]).weigh_batch(questions), left)
    left = router.weigh_batch(questions, exclude=["spam"])
    each = router.weigh_batch(questions, exclude_each=["spam", None, "weather"] * (len(questions) // 3))
    assert all("spam" not in w.explain["mass"] and w.explain["exclude"] == ["spam"] for w in left)
    assert same(each[::3], left[::3]) and all("weather" not in w.explain["mass"] for w in each[2::3])
    assert same(each[1::3], router.weigh_batch(questions[1::3]))
    with pytest.raises(LoralloyError, match="no task left"):
        router.weigh("x", exclude=index.names)


def test_fits_are_kept_and_stale_ones_are_not_used(build, tasks, questions, monkeypatch):
    index = build("cooking", "spam", folder="i")
    first = ProbeRouter(index).weigh_batch(questions)
    kept = sorted(p.name for p in (index.folder / "fitted").iterdir())
    assert [n.split("-")[0] + n[n.index("."):] for n in kept] == [
        "kernel.json", "kernel.safetensors", "probe.json", "probe.safetensors"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("loralloy.weighting.probe.fit_probe", None)  # fitting again would fail
        patch.setattr("loralloy.weighting.tuned.tune", None)
        assert ProbeRouter(index).weigh_batch(questions) == first
    open_router = ProbeRouter(index)
    open_router.prepare()
    index.add(tasks["weather"], 60)
    added = open_router.weigh_batch(questions)  # a router that was open sees the new task
    assert same(added, ProbeRouter(build()).weigh_batch(questions)) and not same(added, first)
    assert len(list((index.folder / "fitted").iterdir())) == 8
    fit_all(index)
    assert len(list((index.folder / "fitted").iterdir())) == 4  # the stale ones are gone
    index.remove("weather")
    assert same(ProbeRouter(index).weigh_batch(questions), first)


@pytest.mark.parametrize("damage", ["tensors", "json", "key"])
def test_a_damaged_fit_is_made_again(build, questions, damage):
    index = build()
    want = ProbeRouter(index).weigh_batch(questions)
    path = next((index.folder / "fitted").glob("probe-*.json"))
    if damage == "tensors":
        path.with_suffix(".safetensors").write_bytes(b"x" * 100)
    elif damage == "json":
        path.write_text("{")
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"key": "0"}))
    before = path.with_suffix(".safetensors").read_bytes()
    assert fitted.load(index, "probe", index.names) is None
    assert ProbeRouter(index).weigh_batch(questions) == want
    assert fitted.load(index, "probe", index.names) is not None
    assert damage != "tensors" or path.with_suffix(".safetensors").read_bytes() != before


def test_fitting_is_deterministic_to_the_byte(build):
    made = []
    for _ in range(2):
        index = build()
        ProbeRouter(index).prepare()
        made.append({p.name: p.read_bytes() for p in (index.folder / "fitted").iterdir()})
    assert made[0] == made[1] and len(made[0]) == 4


def test_one_task_and_tiny_tasks(build, questions):
    assert ProbeRouter(build("spam")).weigh("free prize").coefficients == {"spam": 1.0}
    few = ProbeRouter(build(rows=2)).weigh_batch(questions)
    assert all(sum(w for _, w in weights.items()) == pytest.approx(1) for weights in few)
    assert ProbeRouter(build("spam", "weather")).weigh("rain and storm").names[0] == "weather"


def test_open_weigher(build):
    both, hinted, raw = build(), build(template="hinted"), build(template="raw")
    kinds = {
        ProbeRouter: [(both, {}), (raw, {}), (both, {"kind": "probe", "temperature": 2.0})],
        TunedRouter: [(hinted, {}), (both, {"kind": "kernel", "k": 3})],
        Router: [
            (both, {"k": 7}),
            (both, {"temperature": 0.1}),
            (both, {"kernel": "uniform"}),
            (both, {"kind": "paper"}),
        ],
    }
    for cls, calls in kinds.items():
        for index, options in calls:
            assert type(open_weigher(index, **options)) is cls, (cls, options)
    paper = open_weigher(both, "paper", show=2)
    assert (paper.k, paper.p, paper.temperature, paper.kernel, paper.show) == (100, 0.9, 1.0, "exp", 2)
    assert open_weigher(both, k=7).settings == {
        "router": "kernel",
        "k": 7,
        "p": 0.9,
        "kernel": "exp",
        "temperature": 1.0,
    }
    assert "unlike" not in paper.weigh("rain").explain
    assert "unlike" in open_weigher(both, "paper", unlike=True).weigh("rain").explain
    for options, message in [
        ({"kind": "oracle"}, "router is 'oracle'; known: auto, paper, kernel, probe"),
        ({"kind": "probe", "k": 3}, "no neighbours to count"),
        ({"kind": "kernel", "kernel": "uniform"}, "goes with the paper's router"),
        ({"kind": "probe", "p": 0}, "p is 0"),
        ({"kind": "probe", "temperature": 0}, "temperature is 0"),
    ]:
        with pytest.raises(LoralloyError, match=message):
            open_weigher(both, **options)


def test_temperature_divides_the_logits():
    linear = (np.eye(2, dtype=np.float32), np.zeros(2, np.float32))
    probe = Probe(("a", "b"), (linear,), 0.5, Design(0, 1.0))
    np.testing.assert_allclose(
        probe.probabilities(np.array([[1.0, 0.0]])), [[1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))]]
    )
