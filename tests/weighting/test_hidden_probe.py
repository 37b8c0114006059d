"""The hidden layer: what it learns that a line cannot, when it is chosen, its laws, and how it is kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from loralloy.weighting import ProbeRouter, fitted
from loralloy.weighting.calibration import softmax
from loralloy.weighting.hidden_probe import train
from loralloy.weighting.leave_one_out import Rows
from loralloy.weighting.linear_probe import CHOICE_ROWS, choose_strength, folds_of, whitening
from loralloy.weighting.probe_fit import HELD_OUT, Design, Probe, choose_design, fit_probe, logits

DESIGN = Design(64, 0.3)


def corners(each: int, noise: float, width: int = 8, seed: int = 0) -> Rows:
    """Two tasks at opposite corners of a square (exclusive or), in `width` dimensions; two vectors an example."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 0, 1], each)
    x = rng.normal(0, noise, (4 * each, width))
    x[:, 0] += np.repeat([-1, -1, 1, 1], each)
    x[:, 1] += np.repeat([-1, 1, 1, -1], each)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    order = rng.random(4 * each)
    kinds = np.repeat(["hinted", "raw"], 4 * each)
    return Rows(("a", "b"), np.tile(x, (2, 1)).astype(np.float32), np.tile(labels, 2), kinds,
                np.tile(np.arange(4 * each), 2), np.tile(order, 2))  # fmt: skip


def right(probe: Probe, rows: Rows) -> float:
    return float((probe.probabilities(rows.vectors).argmax(axis=1) == rows.labels).mean())


def test_it_learns_what_a_line_cannot_and_is_chosen_for_it():
    rows, fresh = corners(100, 0.3), corners(100, 0.3, seed=1)
    probe = fit_probe(rows)
    assert probe.design.units and [w.shape for w, _ in probe.layers] == [
        (probe.design.units, 8),
        (2, probe.design.units),
    ]
    assert right(probe, fresh) > 0.9
    assert right(fit_probe(rows, (Design(0, 0.02), 1.0)), fresh) < 0.65
    assert set(probe.report["brier"]) == {
        f"C {choose_strength(rows)}",
        *(f"hidden units {u}, dropout {d}" for u, d in [(128, 0.3), (512, 0.3)]),
    }
    assert probe.report["raw"]["calibration_error"] < 0.1


def test_noise_does_not_buy_a_hidden_layer():
    """Tasks that a line parts as well as can be: the linear probe stays unless a gain exceeds its standard error."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 80)
    x = np.eye(8)[labels] + rng.normal(0, 0.7, (240, 8))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    rows = Rows(("a", "b", "c"), x.astype(np.float32), labels, np.full(240, "raw"), np.arange(240), rng.random(240))
    design, scores = choose_design(rows)
    assert design == Design(0, choose_strength(rows)) and len(scores) == 3


def test_held_out_rows_never_train(monkeypatch):
    """No example is on both sides, in choosing or in calibrating, and the last fit is of all rows."""
    seen: list[np.ndarray] = []
    fit = Design.fit

    def watch(self, rows, positions):
        seen.append(positions)
        return fit(self, rows, positions)

    monkeypatch.setattr(Design, "fit", watch)
    rows = corners(30, 0.3)
    fit_probe(rows)
    picked, every = rows.sample(CHOICE_ROWS), np.arange(len(rows.labels))
    for positions in seen[:3]:
        np.testing.assert_array_equal(positions, picked[folds_of(rows, picked, HELD_OUT) > 0])
        left = np.setdiff1d(picked, positions)
        assert len(left) and not set(rows.groups[left]) & set(rows.groups[positions])
    np.testing.assert_array_equal(seen[3], every[folds_of(rows, every, HELD_OUT) > 0])
    np.testing.assert_array_equal(seen[4], every)
    assert len(seen) == 5


def test_whitening_gives_unit_spread_within_tasks():
    rows = corners(50, 0.3)
    every = np.arange(len(rows.labels))
    centre, matrix = whitening(rows, every)
    means = np.stack([rows.vectors[rows.labels == t].mean(0) for t in (0, 1)])
    np.testing.assert_allclose(centre, means.mean(0), atol=1e-6)
    z = (rows.vectors - means[rows.labels]).astype(np.float64)
    values = np.linalg.eigvalsh(z.T @ z / len(z))
    want = values / (values + 0.1 * values.mean())
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix.T @ (z.T @ z / len(z)) @ matrix), np.sort(want), atol=1e-4)


def test_training_depends_on_rows_and_seed_alone():
    rows = corners(40, 0.3)
    every = np.arange(len(rows.labels))
    torch.manual_seed(1)
    one = train(rows, every, 16, 0.3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    with torch.inference_mode(False), torch.no_grad():
        two = train(rows, every, 16, 0.3)
    assert torch.equal(state, torch.get_rng_state())  # nobody else's draws are disturbed
    for (w, b), (v, c) in zip(one, two, strict=True):
        np.testing.assert_array_equal(w, v)
        np.testing.assert_array_equal(b, c)
        assert w.dtype == b.dtype == np.float32
    other = train(rows, every, 16, 0.3, seed=1)
    assert not np.allclose(one[0][0], other[0][0])


def test_tasks_count_the_same_however_many_rows():
    """One blurred task of 300 rows beside one of 30: at the point between them neither is preferred by its size."""
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1], [300, 30])
    x = rng.normal(0, 1, (330, 4)) + np.where(labels[:, None] == 0, 0.5, -0.5)
    rows = Rows(("a", "b"), x.astype(np.float32), labels, np.full(330, "raw"), np.arange(330), rng.random(330))
    p = softmax(logits(train(rows, np.arange(330), 32, 0.5), rows.vectors))
    assert abs((p[labels == 0, 0].mean()) - (p[labels == 1, 1].mean())) < 0.15


@pytest.fixture
def hidden(monkeypatch):
    """Every index gets a hidden layer, as one with many rows would."""
    monkeypatch.setattr("loralloy.weighting.probe_fit.choose_design", lambda rows: (DESIGN, {}))


def test_it_is_kept_and_read_as_the_linear_one(build, questions, hidden, monkeypatch):
    index = build()
    first = ProbeRouter(index).weigh_batch(questions)
    path = next((index.folder / "fitted").glob("probe-*.json"))
    assert json.loads(path.read_text())["fit"]["units"] == 64
    monkeypatch.setattr("loralloy.weighting.probe.fit_probe", None)  # fitting again would fail
    router = ProbeRouter(index)
    assert router.weigh_batch(questions) == first
    assert router.settings["hidden units"] == 64 and router.settings["dropout"] == 0.3
    assert [w.shape for w, _ in router.fit().layers] == [(64, 48), (3, 64)]


def test_leaving_a_task_out_is_an_index_without_it(build, questions, hidden):
    index, small = build(), build("cooking", "weather")
    whole = ProbeRouter(index)
    want = fit_probe(Rows.of(small), (DESIGN, whole.fit().temperature))
    for made, wanted in zip(whole.fit(["spam"]).layers, want.layers, strict=True):
        np.testing.assert_allclose(made[0], wanted[0], atol=1e-5)
        np.testing.assert_allclose(made[1], wanted[1], atol=1e-5)
    left = whole.weigh_batch(questions, exclude=["spam"])
    assert all("spam" not in w.explain["mass"] for w in left)
    only = ProbeRouter(index, only=["cooking", "weather"]).weigh_batch(questions)
    alone = ProbeRouter(small).weigh_batch(questions)
    assert [dict(w.items()) for w in only] == [pytest.approx(dict(w.items()), rel=1e-3) for w in alone]


def test_a_fit_of_an_older_version_is_made_again_and_pruned(build, questions, monkeypatch):
    from loralloy.weighting.choose import fit_all

    index = build()
    with monkeypatch.context() as patch:
        patch.setattr(fitted, "VERSION", 1)
        fitted.save(index, "probe", index.names, {"tasks": index.names, "temperature": 1.0, "strength": 0.02},
                    {"weight": np.zeros((3, 48), np.float32), "bias": np.zeros(3, np.float32)})  # fmt: skip
    old = next((index.folder / "fitted").glob("probe-*.json"))
    fresh = ProbeRouter(build()).weigh_batch(questions)
    assert ProbeRouter(index).weigh_batch(questions) == fresh
    fit_all(index)
    assert not old.exists() and not old.with_suffix(".safetensors").exists()
    assert len(list((index.folder / "fitted").iterdir())) == 4
