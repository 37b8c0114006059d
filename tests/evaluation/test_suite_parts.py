"""The parts of the engine: rounded weights, cached merges, cached vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import relative
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.evaluation.suite.merges import How, Merges, coefficients, rounded, size_of, unique
from loralloy.evaluation.suite.vectors import CachedEmbedder
from loralloy.merging import Linear, Ties, merge
from loralloy.retrieval import HashEmbedder
from loralloy.weights import Weights

WEIGHTS = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.001, 1), min_size=1, max_size=6)


@given(WEIGHTS, st.sampled_from([0.01, 0.05, 0.1, 0.25, 1.0]))
def test_rounding_keeps_the_sum_and_stays_near(weights, step):
    total = sum(weights.values())
    weights = {name: w / total for name, w in weights.items()}
    made = rounded(weights, step)
    assert math.fsum(made.values()) == pytest.approx(1)
    for name, w in weights.items():
        assert abs(made.get(name, 0) - w) < step + 1e-9
        assert (made.get(name, 0) / step) == pytest.approx(round(made.get(name, 0) / step))
    assert all(made.values()) and rounded(made, step) == made  # once is enough


def test_rounding_by_hand():
    assert rounded({"a": 0.62, "b": 0.33, "c": 0.05}, 0.1) == {"a": 0.6, "b": 0.3, "c": 0.1}
    assert rounded({"b": 0.5, "a": 0.5}, 1.0) == {"a": 1.0}  # equals: by name
    assert rounded({"a": 1 / 9, "b": 0.0}, 0) == {"a": 1 / 9}
    assert (
        coefficients({"b": 0.4, "a": 0.6}, 0.5) == (("a", 0.5), ("b", 0.5)) == unique([(("a", 0.5), ("b", 0.5))] * 2)[0]
    )
    for weights, step, says in (({"a": -0.5, "b": 1.5}, 0.1, "not negative"), ({"a": 1.0}, 2.0, "step is 2.0")):
        with pytest.raises(LoralloyError, match=says):
            rounded(weights, step)


@pytest.fixture(scope="module")
def bank(small):
    return Bank.load(small / "suite_bank")


def test_merges_are_merge(bank):
    merges = Merges(bank, torch.device("cpu"))
    key = coefficients({"spam": 0.75, "weather": 0.25})
    for how in (How(Ties(density=0.5), "delta", 2), How(Linear, "factors", None)):
        assert (how, key) not in merges
        made = merges.get(how, key)
        want = merge(bank, Weights(dict(key)), how.rule, how.space, how.rank).adapter
        for module in want:
            assert relative(made[module].dense(), want[module].dense()) < 1e-5
        assert (how, key) in merges and merges.get(how, key) is made
    assert size_of(made, 2) * 2 == size_of(made) == sum(4 * (f.A.numel() + f.B.numel()) for f in made.values())
    with pytest.raises(LoralloyError, match="nothing to merge"):
        merges.get(how, ())


def test_what_is_used_least_goes(bank):
    how = How(Linear, "factors", None)
    keys = [coefficients({"spam": w}) for w in (0.25, 0.5, 0.75)]
    one = size_of(Merges(bank, torch.device("cpu")).get(how, keys[0]))
    merges = Merges(bank, torch.device("cpu"), limit=2 * one)
    for key in (keys[0], keys[1], keys[0], keys[2]):
        merges.get(how, key)
    assert [(how, key) in merges for key in keys] == [True, False, True]
    tiny = Merges(bank, torch.device("cpu"), limit=1)
    tiny.get(how, keys[0])
    tiny.get(how, keys[1])
    assert [(how, key) in tiny for key in keys] == [False, True, False]  # the one in use stays


class Counting(HashEmbedder):
    def __init__(self):
        super().__init__(16)
        self.seen: list[str] = []

    def encode(self, texts, progress=False):
        self.seen += texts
        return super().encode(texts, progress)


def test_every_text_is_embedded_once(tmp_path):
    plain, counting = HashEmbedder(16), Counting()
    cached = CachedEmbedder(counting, tmp_path)
    assert (cached.identity, cached.dimension) == (plain.identity, 16)
    first = cached.encode(["a", "b", "a"])
    assert np.array_equal(first, plain.encode(["a", "b", "a"])) and counting.seen == ["a", "b"]
    assert np.array_equal(cached.encode(["b", "c"]), plain.encode(["b", "c"])) and counting.seen == ["a", "b", "c"]
    assert cached.encode([]).shape == (0, 16)
    cached.save()
    other = CachedEmbedder(counting, tmp_path)
    third = CachedEmbedder(counting, tmp_path)
    assert np.array_equal(other.encode(["c", "a"]), plain.encode(["c", "a"])) and counting.seen == ["a", "b", "c"]
    other.encode(["d"])
    third.encode(["e"])
    other.save()
    third.save()  # what another process wrote meanwhile is kept
    CachedEmbedder(counting, tmp_path).encode(["a", "b", "c", "d", "e"])
    assert counting.seen == ["a", "b", "c", "d", "e"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    CachedEmbedder(HashEmbedder(8), tmp_path).encode(["a"])  # another embedder has another file


def test_weights_are_found_once_and_shared(bench, run_of, monkeypatch):
    """The second method with one weigher reads the first's weights; another protocol has its own."""
    run, examples = run_of("raw", "leave_own_out", 1), bench.examples(2)
    calls = []
    real = type(run)._weigh
    monkeypatch.setattr(type(run), "_weigh", lambda self, *a: calls.append(1) or real(self, *a))
    settings = {"kind": "paper", "k": 17}
    first = run.weigh(settings, examples)
    assert run_of("raw", "leave_own_out", 1).weigh(settings, examples) == first and len(calls) == 1
    for other in (
        run_of("hinted", "leave_own_out", 1),
        run_of("raw", "in_domain", 1),
        run_of("raw", "leave_own_out", 0),
    ):
        other.weigh(settings, examples)
    run.weigh(settings | {"k": 18}, examples)
    run.weigh(settings, examples[:3])
    assert len(calls) == 6 and run.seconds["weigh"] > 0


def test_vectors_follow_the_query(bench, run_of):
    e = bench.examples(1)[:1]
    embed = HashEmbedder(128).encode
    assert np.array_equal(run_of("raw").vectors(e), embed([e[0].raw]))
    assert np.array_equal(run_of("hinted").vectors(e), embed([e[0].query]))


def test_train_examples(bench, run_of):
    from loralloy.retrieval.index import task_rows

    chosen = run_of().train_examples(7, seed=3, exclude=["spam"])
    assert set(chosen) == {"weather", "cooking"}
    for name, rows in chosen.items():
        assert {e.id for e in rows} == set(task_rows(bench.tasks[name], 7, 3, "hinted")[0]) and len(rows) == 7
