"""The laws of the memory buffer."""

from __future__ import annotations

from collections import Counter
from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import generator
from loralloy.continual import MemoryBuffer
from loralloy.continual.buffer import SELECTIONS, herd
from loralloy.errors import LoralloyError

# by domain, the labels of its rows
streams = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), min_size=1, max_size=5)
sizes = st.integers(1, 4)
totals = st.none() | st.integers(1, 20)
selections = st.sampled_from(SELECTIONS)


def filled(domains, per_class, total, selection, seed=0, features=True):
    buffer = MemoryBuffer(per_class, total, selection, seed)
    for d, labels in enumerate(domains):
        offer(buffer, d, labels, features=features)
    return buffer


def offer(buffer, d, labels, start=0, features=True):
    ids = [f"{d}/{start + n}" for n in range(len(labels))]
    x = torch.randn(len(ids), 3, generator=generator(d)) if features else None
    buffer.add(f"domain{d}", ids, labels, x, [{"text": i} for i in ids])


@given(streams, sizes, totals, selections)
def test_never_more_than_total_and_balanced_to_within_one(domains, per_class, total, selection):
    buffer = filled(domains, per_class, total, selection)
    assert total is None or len(buffer) <= total
    counts = Counter(row.stratum for row in buffer.rows)
    there = {f"domain{d}/{label}": n for d, labels in enumerate(domains) for label, n in Counter(labels).items()}
    assert buffer.strata == {name: counts[name] for name in there}
    for name, n in there.items():
        assert counts[name] <= min(per_class, n)
        # smaller than another by more than one only where it never had more
        if counts[name] < min(per_class, n):
            assert max(counts.values()) <= counts[name] + 1
    if total is None or sum(min(per_class, n) for n in there.values()) <= total:
        assert all(counts[name] == min(per_class, n) for name, n in there.items())
    else:
        assert len(buffer) == total


@given(streams, sizes, totals, selections)
def test_rows_are_of_those_offered_with_their_own_data_and_features(domains, per_class, total, selection):
    buffer = filled(domains, per_class, total, selection)
    for row, feature in zip(buffer.rows, buffer.features(), strict=True):
        d, n = map(int, row.id.split("/"))
        assert (row.domain, row.label, row.data) == (f"domain{d}", domains[d][n], {"text": row.id})
        assert torch.equal(feature, torch.randn(len(domains[d]), 3, generator=generator(d))[n])


@given(streams, sizes, totals, selections, st.integers(0, 3))
def test_one_seed_one_buffer(domains, per_class, total, selection, seed):
    one, two = (filled(domains, per_class, total, selection, seed) for _ in range(2))
    assert one.to_dict() == two.to_dict()


def test_another_seed_another_draw():
    labels = ["a"] * 50
    assert len({filled([labels], 1, None, "random", seed).rows[0].id for seed in range(10)}) > 3
    assert len({filled([labels], 1, None, "reservoir", seed).rows[0].id for seed in range(10)}) > 3


@given(streams, sizes, selections)
def test_without_a_total_the_order_of_domains_changes_nothing(domains, per_class, selection):
    forward, backward = MemoryBuffer(per_class, None, selection), MemoryBuffer(per_class, None, selection)
    assert forward.order_free and not MemoryBuffer(1, 5).order_free
    for d, labels in enumerate(domains):
        offer(forward, d, labels)
    for d, labels in reversed(list(enumerate(domains))):
        offer(backward, d, labels)
    assert {row.id for row in forward.rows} == {row.id for row in backward.rows}


@given(streams, sizes, totals, selections)
def test_restored_it_goes_on_as_the_other_would(tmp_path_factory, domains, per_class, total, selection):
    folder = tmp_path_factory.mktemp("buffer") / "b"
    one = filled(domains[:-1], per_class, total, selection)
    one.save(folder)
    two = MemoryBuffer.restore(folder)
    assert two.to_dict() == one.to_dict() and two.rows == one.rows
    for buffer in (one, two):
        offer(buffer, len(domains) - 1, domains[-1])
    assert two.to_dict() == one.to_dict()
    assert torch.equal(one.features(), two.features())


def test_a_random_draw_does_not_depend_on_how_rows_come():
    labels = list("aabbaab")
    ids = [f"0/{n}" for n in range(7)]
    whole, parts = MemoryBuffer(2), MemoryBuffer(2)
    whole.add("d", ids[::-1], labels[::-1])
    for at in (slice(0, 3), slice(3, 7)):
        parts.add("d", ids[at], labels[at])
    assert {row.id for row in whole.rows} == {row.id for row in parts.rows}


@pytest.mark.parametrize("selection", ["random", "reservoir"])
def test_every_row_is_kept_equally_often(selection):
    """1,500 seeds, 3 of 12 rows, in two calls: each stays in a quarter, to within 4.5 standard deviations."""
    counts: Counter[str] = Counter()
    trials = 1500
    for seed in range(trials):
        buffer = MemoryBuffer(3, None, selection, seed)
        offer(buffer, 0, ["a"] * 5, features=False)
        offer(buffer, 0, ["a"] * 7, start=5, features=False)
        counts.update(row.id for row in buffer.rows)
    assert len(counts) == 12 and sum(counts.values()) == 3 * trials
    deviation = sqrt(trials * 0.25 * 0.75)
    assert max(abs(n - trials / 4) for n in counts.values()) < 4.5 * deviation


def test_a_reservoir_cut_by_a_total_stays_even():
    """Rows that come before a cut, between cuts and after them: 2,000 seeds, each of 12 rows alike often."""
    counts: Counter[str] = Counter()
    trials = 2000
    for seed in range(trials):
        buffer = MemoryBuffer(6, 6, "reservoir", seed)
        for d, start, many in ((0, 0, 3), (1, 0, 9), (2, 0, 9), (3, 0, 9), (0, 3, 1), (0, 4, 8), (4, 0, 9)):
            offer(buffer, d, ["a"] * many, start, features=False)
        assert len(buffer) == 6
        counts.update(row.id for row in buffer.rows if row.domain == "domain0")
    share = sum(counts.values()) / trials / 12
    deviation = sqrt(trials * share * (1 - share))
    assert max(abs(counts[f"0/{n}"] - trials * share) for n in range(12)) < 4 * deviation


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 50))
def test_herding_is_greedy_towards_the_mean(n, count, seed):
    x = torch.randn(n, 4, generator=generator(seed), dtype=torch.float64)
    chosen = herd(x, count)
    assert len(chosen) == len(set(chosen)) == min(n, count)
    unit = x / x.norm(dim=1, keepdim=True)
    for k in range(len(chosen)):
        best = min(
            float((unit.mean(0) - unit[[*chosen[:k], i]].mean(0)).norm()) for i in range(n) if i not in chosen[:k]
        )
        assert float((unit.mean(0) - unit[chosen[: k + 1]].mean(0)).norm()) == pytest.approx(best, abs=1e-12)


def test_herded_rows_stay_in_the_order_of_their_choice():
    x = torch.randn(9, 3, generator=generator(1))
    buffer = MemoryBuffer(5, None, "herding")
    buffer.add("d", list("012345678"), ["a"] * 9, x)
    assert [int(row.id) for row in buffer.rows] == herd(x, 5)
    small = MemoryBuffer(5, 2, "herding")
    small.add("d", list("012345678"), ["a"] * 9, x)
    assert [int(row.id) for row in small.rows] == herd(x, 2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: MemoryBuffer(0), "at least 1"),
        (lambda: MemoryBuffer(1, 0), "at least 1"),
        (lambda: MemoryBuffer(selection="best"), "choose one of random, herding, reservoir"),
        (lambda: MemoryBuffer().add("d", ["x"], []), "one length"),
        (lambda: MemoryBuffer().add("d", ["x", "x"], ["a", "a"]), "twice"),
        (lambda: MemoryBuffer(1, None, "herding").add("d", ["x"], ["a"]), "by features"),
    ],
)
def test_refused(call, says):
    with pytest.raises(LoralloyError, match=says):
        call()


def test_refused_when_offered_again():
    buffer = filled([["a"] * 4], 4, None, "random")
    with pytest.raises(LoralloyError, match="twice"):
        offer(buffer, 0, ["a"])
    herded = filled([["a"]], 1, None, "herding")
    with pytest.raises(LoralloyError, match="herding has chosen"):
        offer(herded, 0, ["a"], start=5)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(LoralloyError, match="no such memory buffer"):
        MemoryBuffer.restore(tmp_path / "none")
    (tmp_path / "buffer.json").write_text('{"version": 1}')
    with pytest.raises(LoralloyError, match="not a memory buffer"):
        MemoryBuffer.restore(tmp_path)
    (tmp_path / "buffer.json").write_text('{"version": 2}')
    with pytest.raises(LoralloyError, match="version 2"):
        MemoryBuffer.restore(tmp_path)
