from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loralloy.errors import LoralloyError
from loralloy.retrieval import ExactStore, HashEmbedder
from loralloy.weighting import Router, kernel, nucleus
from loralloy.weights import Weights

masses = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.floats(0, 1e6), min_size=1, max_size=8).filter(
    lambda m: sum(m.values()) > 1e-6
)
shares = st.floats(0.01, 1.0)


# -- nucleus -----------------------------------------------------------------------------------------------------------


@given(masses, shares)
def test_nucleus_sums_to_one_and_keeps_ratios(m, p):
    kept = nucleus(m, p)
    assert sum(kept.values()) == pytest.approx(1)
    total = sum(m[name] for name in kept)
    for name, w in kept.items():
        assert w == pytest.approx(m[name] / total)


@given(masses, st.floats(0.01, 0.999))
def test_nucleus_is_the_minimal_prefix(m, p):
    kept = list(nucleus(m, p))
    assert kept == sorted((n for n in m if m[n] > 0), key=lambda n: (-m[n], n))[: len(kept)]
    total = math.fsum(m.values())
    reached = math.fsum(m[n] for n in kept)
    short = math.fsum(m[n] for n in kept[:-1])
    assert reached >= p * total * (1 - 1e-9)  # the crossing task is in
    assert short < p * total  # and without it, p is not reached


@given(masses, shares, shares)
def test_nucleus_is_monotone_in_p(m, p, q):
    low, high = sorted((p, q))
    assert list(nucleus(m, high))[: len(nucleus(m, low))] == list(nucleus(m, low))


@given(masses)
def test_nucleus_at_one_keeps_every_task_with_mass(m):
    assert set(nucleus(m, 1.0)) == {name for name, mass in m.items() if mass > 0}


@given(masses, shares, st.floats(1e-3, 1e3), st.randoms())
def test_nucleus_ignores_scale_and_order(m, p, scale, rng):
    items = list(m.items())
    rng.shuffle(items)
    again = nucleus({name: mass * scale for name, mass in items}, p)
    # Scaling rounds: a task exactly at p may fall on either side, so compare what both keep.
    first = nucleus(m, p)
    if list(first) == list(again):
        assert all(first[n] == pytest.approx(again[n]) for n in first)
    assert list(nucleus(dict(items), p).items()) == list(first.items())


def test_nucleus_worked_example_of_the_paper():
    """arXiv 2602.21222, Table 1: 0.5952 + 0.1646 + 0.1459 + 0.0940 = 0.9997, renormalised; three tasks reach 0.9."""
    table = {"a": 0.5952, "b": 0.1646, "c": 0.1459, "d": 0.0940}
    assert math.fsum(table.values()) == pytest.approx(0.9997)
    kept = nucleus(table, 0.9)
    assert list(kept) == ["a", "b", "c"]  # 0.5952 + 0.1646 = 0.7598 < 0.9 <= 0.9057
    assert kept["a"] == pytest.approx(0.5952 / 0.9057)
    # The table's four weights as the nucleus of a longer tail, which takes 10% less a little of the mass.
    longer = {name: w * 0.95 for name, w in table.items()} | {f"tail{n}": 0.05 / 10 for n in range(10)}
    kept = nucleus(longer, 0.9)
    assert list(kept) == ["a", "b", "c", "d"]
    for name, weight in table.items():
        assert kept[name] == pytest.approx(weight, abs=3e-4)


def test_nucleus_edges():
    assert list(nucleus({"b": 0.6, "a": 0.3, "c": 0.1}, 0.9)) == ["b", "a"]  # 0.6 + 0.3 is 0.8999... in floats
    assert list(nucleus({"b": 1.0, "a": 1.0, "c": 1.0}, 0.5)) == ["a", "b"]  # ties by name
    assert nucleus({"a": 5e-324, "b": 0.0}, 0.9) == {"a": 1.0}
    assert nucleus({"a": 1e308, "b": 1e308}, 1.0) == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("m", "p", "message"),
    [
        ({"a": 1.0}, 0.0, "p is 0"),
        ({"a": 1.0}, 1.1, "p is 1.1"),
        ({"a": 1.0}, math.nan, "p is nan"),
        ({"a": -1.0, "b": 2.0}, 0.9, "mass of 'a'"),
        ({"a": math.nan}, 0.9, "mass of 'a'"),
        ({"a": 0.0}, 0.9, "no task has any mass"),
        ({}, 0.9, "no task has any mass"),
    ],
)
def test_nucleus_refuses(m, p, message):
    with pytest.raises(LoralloyError, match=message):
        nucleus(m, p)


# -- kernel ------------------------------------------------------------------------------------------------------------

distances = st.lists(st.floats(0, 2), min_size=1, max_size=30)


@given(distances, st.floats(0.001, 10))
def test_kernel_is_exp_of_minus_d_over_t(d, t):
    s = kernel(d, "exp", t)
    logs = -np.array(d) / t
    want = np.exp(logs - np.logaddexp.reduce(logs))
    np.testing.assert_allclose(s, want, rtol=1e-9, atol=1e-300)


@given(distances, st.sampled_from(["exp", "inverse", "uniform"]), st.floats(0.001, 10))
def test_kernel_falls_with_distance_and_sums_to_one(d, name, t):
    s = kernel(sorted(d), name, t)
    assert s.sum() == pytest.approx(1) and (np.diff(s) <= 1e-15).all()


def test_kernels_differ():
    np.testing.assert_allclose(kernel([0, 1], "exp"), [1 / (1 + math.exp(-1)), 1 / (1 + math.e)])
    np.testing.assert_allclose(kernel([0, 1], "inverse"), [2 / 3, 1 / 3])
    np.testing.assert_allclose(kernel([0, 1], "uniform"), [0.5, 0.5])
    np.testing.assert_allclose(kernel([1.0, 1.9], "exp", 1e-5), [1, 0])  # no underflow to 0/0


@pytest.mark.parametrize(
    ("d", "name", "t", "message"),
    [
        ([1], "gauss", 1, "known: exp"),
        ([1], "exp", 0, "temperature is 0"),
        ([], "exp", 1, "at least one"),
        ([math.nan], "exp", 1, "finite"),
    ],
)
def test_kernel_refuses(d, name, t, message):
    with pytest.raises(LoralloyError, match=message):
        kernel(d, name, t)


# -- router ------------------------------------------------------------------------------------------------------------

TEXTS = {
    "spam": ["win a free prize now", "free cash call now", "urgent prize call", "claim cash prize free"],
    "weather": ["rain and wind", "sun and cloud", "storm and rain now", "snow and wind"],
    "cooking": ["boil and salt", "bake bread", "salt and butter now"],
}


@pytest.fixture
def index(tmp_path):
    """What a Router needs of an Index, over an exact store."""
    store, embedder = ExactStore(tmp_path), HashEmbedder(64)
    for task, texts in TEXTS.items():
        store.add(task, [f"{task}/train/{n}" for n in range(len(texts))], embedder.encode(texts), texts)

    def search(vectors, k, exclude=(), only=None):
        left = set(TEXTS) - set(exclude)
        return store.query(vectors, k, left if only is None else left & set(only))

    return SimpleNamespace(embed=embedder.encode, search=search, texts=store.texts)


def test_router_is_the_paper_by_hand(index):
    text = "call for a free prize"
    router = Router(index, k=8)
    weights = router.weigh(text)
    _ids, d, tasks = index.search(index.embed([text]), 8)
    s = np.exp(-d[0].astype(np.float64))
    mass = {t: s[[u == t for u in tasks[0]]].sum() / s.sum() for t in set(tasks[0])}
    kept, total = [], 0.0
    for name in sorted(mass, key=lambda t: -mass[t]):
        kept.append(name)
        total += mass[name]
        if total >= 0.9:
            break
    assert weights.names == kept
    for name in kept:
        assert weights.of(name) == pytest.approx(mass[name] / total)
    assert weights.explain["mass"] == pytest.approx(mass)
    assert weights.names[0] == "spam" and weights.source == "retrieved"


def test_router_explains(index):
    weights = Router(index, k=6, show=3, kernel="inverse", temperature=0.5, p=0.8).weigh("free prize")
    e = weights.explain
    assert (e["k"], e["found"], e["p"], e["kernel"], e["temperature"]) == (6, 6, 0.8, "inverse", 0.5)
    assert len(e["neighbours"]) == 3
    for n in e["neighbours"]:
        task, _split, row = n["id"].split("/")
        assert n["task"] == task and n["text"] == TEXTS[task][int(row)] and 0 <= n["distance"] <= 2
    assert [n["distance"] for n in e["neighbours"]] == sorted(n["distance"] for n in e["neighbours"])
    again = Weights.from_dict(json.loads(json.dumps(weights.to_dict())))
    assert again == weights


@settings(max_examples=20, deadline=None)
@given(k=st.integers(1, 20), p=shares, t=st.floats(0.01, 5))
def test_batch_equals_one_by_one(tmp_path_factory, k, p, t):
    store, embedder = ExactStore(tmp_path_factory.mktemp("s")), HashEmbedder(64)
    for task, texts in TEXTS.items():
        store.add(task, [f"{task}/train/{n}" for n in range(len(texts))], embedder.encode(texts), texts)
    index = SimpleNamespace(
        embed=embedder.encode,
        texts=store.texts,
        search=lambda v, k, e=(), o=None: store.query(v, k, set(TEXTS) - set(e)),
    )
    router = Router(index, k=k, p=p, temperature=t)
    queries = ["free prize", "rain now", "salt and butter", "now"]
    for one, weights in zip(queries, router.weigh_batch(queries), strict=True):
        alone = router.weigh(one)
        assert dict(weights.items()) == pytest.approx(dict(alone.items()), rel=1e-5)
        assert sum(w for _, w in weights.items()) == pytest.approx(1)


def test_leaving_tasks_out(index):
    router = Router(index, k=4)
    assert router.weigh("free prize").names[0] == "spam"
    left = router.weigh("free prize", exclude=["spam"])
    assert "spam" not in left.explain["mass"] and left.explain["found"] == 4 and left.explain["exclude"] == ["spam"]
    assert router.weigh("free prize", exclude="spam") == left
    own = router.weigh_batch(["free prize", "free prize", "rain"], exclude_each=["spam", None, "weather"])
    assert own[0] == left and own[1].names[0] == "spam" and "weather" not in own[2].explain["mass"]
    assert Router(index, only=["cooking"]).weigh("free prize").coefficients == {"cooking": 1.0}
    with pytest.raises(LoralloyError, match="no rows to search"):
        router.weigh("x", exclude=list(TEXTS))
    with pytest.raises(LoralloyError, match="2 entries for 1"):
        router.weigh_batch(["x"], exclude_each=[None, None])
    assert router.weigh_batch([]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 1.5}, "k is 1.5"),
        ({"p": 0}, "p is 0"),
        ({"kernel": "rbf"}, "kernel is 'rbf'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"show": -1}, "show is -1"),
    ],
)
def test_router_refuses_at_once(index, options, message):
    with pytest.raises(LoralloyError, match=message):
        Router(index, **options)
