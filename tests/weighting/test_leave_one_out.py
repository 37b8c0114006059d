"""Rows left out of their neighbours, against a plain float64 search; what is tuned and scored on them."""

from __future__ import annotations

import numpy as np
import pytest

from loralloy.errors import LoralloyError
from loralloy.weighting import Router, TunedRouter, fall_back, nucleus
from loralloy.weighting.leave_one_out import Rows, brier, leave_one_out, nucleus_rows
from loralloy.weighting.tuned import task_mass, tune
from loralloy.weighting.unlike import Unlike, usable_threshold
from loralloy.weights import Weights


def test_rows_pair_the_two_vectors_of_an_example(build):
    rows = Rows.of(build())
    assert rows.tasks == ("cooking", "spam", "weather") and rows.vectors.shape == (360, 48)
    assert sorted(np.bincount(rows.groups)) == [2] * 180 and (np.bincount(rows.labels) == 120).all()
    for group in np.unique(rows.groups)[:20]:
        pair = rows.groups == group
        assert set(rows.kinds[pair]) == {"hinted", "raw"} and len(set(rows.labels[pair])) == 1
    part = rows.subset({"spam", "weather"})
    assert part.tasks == ("spam", "weather") and (part.vectors == rows.vectors[rows.labels > 0]).all()
    assert (Rows.of(build("spam", "weather")).vectors == part.vectors).all()  # as an index of these two alone
    assert set(Rows.of(build(template="raw")).kinds) == {"raw"}


def test_an_example_never_finds_itself(build):
    rows = Rows.of(build())
    left = leave_one_out(rows, queries=90, keep=7)
    asked = rows.sample(15)
    assert len(left.own) == 90 and (left.own == rows.labels[asked]).all()
    exact = 1 - rows.vectors[asked].astype(np.float64) @ rows.vectors.T.astype(np.float64)
    for n, row in enumerate(asked):
        others = np.flatnonzero(rows.groups != rows.groups[row])
        order = others[np.argsort(exact[n, others], kind="stable")][:7]
        np.testing.assert_allclose(left.distances[n], exact[n, order], atol=1e-6)
        assert left.nearest[n] == rows.kinds[order[0]] or exact[n, order[1]] - exact[n, order[0]] < 1e-6
    assert left.shares.sum() == pytest.approx(1)
    assert [left.shares[left.own == task].sum() for task in range(3)] == pytest.approx([1 / 3] * 3)


def test_masses_are_the_routers(build):
    """The vectorised kernel and nucleus of tuning are those that route: one row, asked with its example left out."""
    index = build()
    rows = Rows.of(index)
    left = leave_one_out(rows, queries=12, keep=30)
    mass = nucleus_rows(task_mass(left, 20, 0.2), 0.8)
    ids = index.vectors()[0]
    for n, row in enumerate(rows.sample(2)):
        twin = {i for i, group in zip(ids, rows.groups, strict=True) if group == rows.groups[row]}
        found = index.search(rows.vectors[row : row + 1], 22)
        kept = [(d, t) for i, d, t in zip(*(part[0] for part in found), strict=True) if i not in twin][:20]
        s = np.exp(-np.array([d for d, _ in kept], dtype=np.float64) / 0.2)
        want = nucleus({t: s[[u == t for _, u in kept]].sum() / s.sum() for t in {t for _, t in kept}}, 0.8)
        got = {task: w for task, w in zip(rows.tasks, mass[n], strict=True) if w}
        assert got == pytest.approx(want, rel=1e-4)


def test_brier_is_the_squared_distance_from_the_own_task():
    weights = np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert brier(weights, np.array([0, 1]), np.array([0.25, 0.75])) == pytest.approx(0.25 * 0.5 + 0.75 * 2)
    assert brier(np.eye(3), np.arange(3), np.full(3, 1 / 3)) == 0


def test_tuning_takes_the_best_of_its_grid(build):
    left = leave_one_out(Rows.of(build()))
    tuned = tune(left)

    def figure(k, t, p):
        weights = nucleus_rows(task_mass(left, k, t), p)
        return np.mean([brier(weights[r], left.own[r], left.shares[r] / left.shares[r].sum())
                        for r in (left.kinds == "raw", left.kinds == "hinted")])  # fmt: skip

    chosen = figure(tuned.k, tuned.temperature, tuned.p)
    report = tuned.report["chosen"]
    assert chosen == pytest.approx((report["raw"]["brier"] + report["hinted"]["brier"]) / 2)
    for other in [(100, 1.0, 0.9), (5, 0.02, 1.0), (20, 0.1, 0.9), (200, 0.05, 0.7), (10, 0.5, 0.5)]:
        assert chosen <= figure(*other) + 1e-9
    assert chosen < figure(100, 1.0, 0.9)  # and here the paper's is not the best


def test_tuned_router_is_a_router_with_what_was_chosen(build, questions):
    index = build()
    tuned = TunedRouter(index)
    fit = tuned.fit()
    plain = Router(index, fit.k, fit.p, temperature=fit.temperature, unlike=fit.unlike)
    assert tuned.weigh_batch(questions) == plain.weigh_batch(questions)
    assert tuned.settings["k"] == fit.k and tuned.settings["leave-one-out chose"] == ["k", "p", "temperature"]
    given = TunedRouter(index, k=3, p=1.0)
    assert (given.settings["k"], given.settings["p"], given.settings["temperature"]) == (3, 1.0, fit.temperature)
    with pytest.raises(LoralloyError, match="k is 0"):
        TunedRouter(index, k=0)


# -- unlike ------------------------------------------------------------------------------------------------------------


def test_unlike_is_a_tail_probability(build):
    """Of the left-out rows themselves, a share u exceeds 1 - u."""
    left = leave_one_out(Rows.of(build(template="raw")))
    unlike = Unlike.of(left)
    scores = np.array([unlike.score(["spam/train/1"], d) for d in left.distances])
    for u in (0.05, 0.2, 0.5):
        assert (scores > 1 - u).mean() == pytest.approx(u, abs=2 / len(scores) + 0.01)
    assert unlike.score(["x"], np.zeros(10)) == 0 and unlike.score(["x"], np.full(10, 2.0)) > 0.99
    near, far = unlike.score(["x"], left.distances[0]), unlike.score(["x"], left.distances[0] + 0.1)
    assert far >= near


def test_a_kind_has_its_own_sample():
    unlike = Unlike({"hinted": np.array([0.1, 0.2]), "raw": np.array([0.5, 0.6])})
    assert unlike.score(["a/train/1"], np.full(10, 0.3)) == pytest.approx(2 / 3)
    assert unlike.score(["a/train/1#raw"], np.full(10, 0.3)) == 0
    assert Unlike({"raw": np.array([0.5, 0.5])}).score(["a/train/1#raw"], np.full(10, 0.5)) == 0  # nearer, not as near
    assert Unlike({"raw": np.array([0.5])}).score(["a/train/1"], np.full(10, 0.7)) == 0.5
    assert Unlike({"hinted": np.array([0.5])}).score(["a/train/1#raw"], np.full(10, 0.7)) == 0.5


def test_other_words_are_unlike_and_own_are_not(build, questions):
    router = TunedRouter(build())
    known = [w.explain["unlike"] for w in router.weigh_batch(questions)]
    strange = [w.explain["unlike"] for w in router.weigh_batch(["quantum boson lepton", "violin cello oboe harp"])]
    assert min(strange) > 0.99 and np.mean([score > 0.95 for score in known]) < 0.2


def test_fall_back():
    explain = {"unlike": 0.995}
    weights = Weights({"a": 0.7, "b": 0.3}, "probe", explain)
    gone = fall_back(weights, 0.99)
    assert gone.coefficients == {"a": 0.0, "b": 0.0} and gone.source == "probe"
    assert gone.explain == {"unlike": 0.995, "fallback": 0.99, "routed": {"a": 0.7, "b": 0.3}}
    assert fall_back(weights, 1.0) is weights and fall_back(weights, 0.995) is weights
    plain = Weights({"a": 1.0})
    assert fall_back(plain, 0.5) is plain
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(LoralloyError, match="unlike is"):
            fall_back(weights, wrong)


def test_tasks_count_the_same_whatever_their_rows():
    """One task with four vectors, one with twelve: each has half of the weight, so the bias does not follow the counts."""
    labels = np.repeat([0, 1], [4, 12])
    rows = Rows(
        ("few", "many"), np.eye(16, dtype=np.float32), labels, np.full(16, "raw"), np.arange(16), np.arange(16) / 16
    )
    shares = rows.shares()
    assert [shares[labels == t].sum() for t in (0, 1)] == pytest.approx([0.5, 0.5])
    assert rows.shares(np.array([0, 1, 4])) == pytest.approx([0.25, 0.25, 0.5])
    assert sorted(np.bincount(labels[rows.sample(3)])) == [3, 3]


def test_the_score_does_not_depend_on_k(build, questions):
    index = build()
    unlike = TunedRouter(index).fit().unlike
    few = Router(index, k=1, unlike=unlike).weigh_batch(questions)
    many = Router(index, k=30, unlike=unlike).weigh_batch(questions)
    assert [w.explain["unlike"] for w in few] == [w.explain["unlike"] for w in many]
    assert all(w.explain["found"] == 1 and len(w.names) == 1 for w in few)


@pytest.mark.parametrize("template, expected", [("both", 0.99), ("hinted", 1.0), ("raw", 1.0)])
def test_one_kind_of_rows_gives_no_fall_back(template, expected):
    assert usable_threshold(0.99, template) == expected
