"""Groups of adapters: cosines against dense ones, assignment, and what a group's adapter is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import adapter, delta, factors, relative
from loralloy.bank import Bank
from loralloy.continual.grouping import Groups, assign, group_adapter, group_bank, similarity
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.merging import MagnitudePrune, merge
from loralloy.weights import Weights


def made(seed, name="a", modules=("m", "n"), rank=3):
    return adapter({m: factors(6, 5, rank, seed * 10 + k, 0.7) for k, m in enumerate(modules)}, name)


def scaled(one, c, name):
    return adapter({m: LoraFactors(one[m].A, one[m].B * c, one[m].scaling) for m in one}, name)


def flat(one, modules=("m", "n")):
    dense = delta(one)
    return torch.cat([dense[m].flatten() if m in dense else torch.zeros(30, dtype=torch.float64) for m in modules])


@given(st.integers(0, 50), st.integers(0, 50), st.booleans())
def test_similarity_is_the_cosine_of_dense_weights(a, b, partial):
    one, two = made(a), made(b, modules=("m",) if partial else ("m", "n"), rank=2)
    x, y = flat(one), flat(two)
    assert similarity(one, two) == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=1e-6)
    assert similarity(one, scaled(one, 0.1, "b")) == pytest.approx(1, abs=1e-6)
    assert similarity(one, scaled(one, -2.0, "b")) == pytest.approx(-1, abs=1e-6)


def test_like_adapters_share_a_group_and_others_open_one():
    a, b = made(1, "a"), made(2, "b")
    more = [a, b, scaled(a, 2.0, "a2"), scaled(b, 0.5, "b2"), made(3, "c")]
    assert assign(more, 0.5, 3, Groups(1.0)) == [["a", "a2"], ["b", "b2"], ["c"]]
    assert assign(more, -1.0, 3) == [["a", "b", "a2", "b2", "c"]]  # everything is like something
    assert len(assign(more, 1.0, 2)) == 2  # no more groups than asked for
    with pytest.raises(LoralloyError, match="at least one"):
        assign(more, 0.5, 0)


@given(st.integers(1, 4), st.floats(-1, 1), st.permutations("abcd"))
def test_everyone_is_in_one_group(groups, threshold, order):
    adapters = [made(ord(name), name) for name in order]
    found = assign(adapters, threshold, groups)
    assert sorted(name for group in found for name in group) == list("abcd") and 1 <= len(found) <= groups
    assert [group[0] for group in found] == sorted((g[0] for g in found), key=order.index)


def test_a_group_is_the_mean_of_its_pruned_members():
    a, b = made(1, "a"), made(2, "b")
    group = group_adapter([a, b], "group", 0.5)
    want = merge(Bank([a, b]), Weights.uniform("ab"), MagnitudePrune(density=0.5), "delta", "max").adapter
    dense = [delta(x)["m"] for x in (a, b)]
    kept = [x.where(x.abs() >= x.abs().flatten().kthvalue(16).values, 0) for x in dense]  # 15 of 30 entries
    uncut = merge(Bank([a, b]), Weights.uniform("ab"), MagnitudePrune(density=0.5), "delta", "full").adapter
    assert relative(delta(uncut)["m"], sum(kept) / 2) < 1e-6
    assert relative(delta(group)["m"], delta(want)["m"]) < 1e-6 and group.max_rank == 3
    whole = group_adapter([a], "group", 0.5)
    assert relative(delta(whole)["m"], dense[0]) < 1e-12
    bank = group_bank(Bank([a, b]), [["a", "b"]])
    assert bank.names == ["a+b"]
    kept = Groups(0.5)
    assert kept.adapter([a, b]) is kept.adapter([a, b]) is not kept.adapter([b, a])


def test_a_zero_adapter_is_named():
    with pytest.raises(LoralloyError, match="'z' is all zero"):
        similarity(made(1), scaled(made(1), 0.0, "z"))
