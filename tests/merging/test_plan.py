"""Plans: groups of modules, ranks, and the rank that an energy asks for."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from engine_scenes import EVERYWHERE, WEIGHTS, alike, bank

from helpers import (
    adapter,
    delta,
    factors,
    relative,
)
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.merging import get_rule, make_plan, merge
from loralloy.weights import Weights


@pytest.mark.parametrize(("rule", "space"), EVERYWHERE, ids=lambda x: x)
def test_a_plan_is_what_is_done(rule, space, tmp_path):
    b = alike() if space == "factors" else bank()
    plan = make_plan(b, WEIGHTS, rule, space)
    merged = merge(b, WEIGHTS, rule, space, out=tmp_path / "m")
    assert sorted(plan.modules) == sorted(merged.adapter) == sorted(set(plan.modules))
    assert plan.top == merged.adapter.max_rank == max(g.rank for g in plan.groups)
    assert plan.bytes_out == sum(f.A.nbytes + f.B.nbytes for f in merged.adapter.values())
    assert [p.name for p in plan.parents] == WEIGHTS.names
    for g in plan.groups:
        for j, m in enumerate(g.modules):
            names = [plan.parents[i].name for i in g.who]
            assert [w[j] for w in g.weights] == [WEIGHTS.of(n, m) for n in names]
            assert [s[j] for s in g.scaling] == [b[n][m].scaling for n in names]
            assert [f.shape for f in g.outlines] == [b[n][m].shape for n in names] == [g.shape] * len(names)
            assert g.ranks == tuple(b[n][m].rank for n in names) and all(f.A.is_meta for f in g.outlines)
            votes = space == "factors" and space not in get_rule(rule).sums
            have = [n for n in WEIGHTS.names if m in b[n] and (votes or WEIGHTS.of(n, m))]
            assert names == have


def test_modules_come_in_the_order_of_the_parents():
    order = list(merge(bank(), WEIGHTS, "ties").adapter)
    assert order == ["mlp", "q", "x", "k", "v"]  # b's, then what only a has, then c's: as weights name them
    assert list(merge(bank(), Weights({"c": 1.0, "a": 1.0})).adapter) == ["k", "q", "v", "mlp"]


def test_same_shapes_share_a_group_only_where_the_same_adapters_have_them():
    groups = {tuple(sorted(g.modules)) for g in make_plan(bank(), Weights({"a": 1.0, "b": 1.0, "c": 1.0})).groups}
    assert groups == {("q",), ("k",), ("v",), ("mlp",), ("x",)}
    groups = {tuple(sorted(g.modules)) for g in make_plan(bank(), Weights({"a": 1.0, "c": 1.0})).groups}
    assert groups == {("k", "q"), ("v",), ("mlp",)}
    zero_q = Weights({"a": 1.0, "c": {"*": 1.0, "q": 0.0}})
    groups = {tuple(sorted(g.modules)) for g in make_plan(bank(), zero_q).groups}
    assert groups == {("q",), ("k",), ("v",), ("mlp",)}  # weight 0 is absence


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "space"), EVERYWHERE, ids=lambda x: x)
def test_ranks(rule, space):
    b = alike() if space == "factors" else bank()
    w = Weights({"a": 1.0, "b": 0.5})
    parents = {m: [b[n][m].rank for n in "ab" if m in b[n]] for m in ("q", "k", "v", "mlp", "x")}
    for rank in (1, 3, 1000, "max"):
        merged = merge(b, w, rule, space, rank)
        assert set(merged.adapter) == set(parents)
        assert len({merged.adapter.rank(m) for m in merged.adapter}) == 1  # padded to one rank
        largest = {m: max(r) if rank == "max" else rank for m, r in parents.items()}
        for m, dense in delta(merged.adapter).items():
            assert int(torch.linalg.matrix_rank(dense, rtol=1e-6)) <= largest[m]
        if rank != 1000:
            assert merged.adapter.max_rank <= max(largest.values()) and merged.report.rank == str(rank)
        if rank == "max":
            assert merged.adapter.max_rank == max(largest.values())
            assert int(torch.linalg.matrix_rank(delta(merged.adapter)["mlp"], rtol=1e-6)) == largest["mlp"]
    full, uncut = merge(b, w, rule, space, "full"), merge(b, w, rule, space, 1000)
    assert full.report.cut == uncut.report.cut == 0.0
    assert max(relative(delta(uncut.adapter)[m], x) for m, x in delta(full.adapter).items()) < 1e-5


def test_a_rank_above_the_width_is_not_padded():
    """Ranks 2 and 30 side by side in modules of width 10: a cut to 20 has nothing to put there."""
    merged = merge(bank(), Weights({"a": 1.0, "c": 0.5}), "linear", rank=20)
    assert merged.adapter.max_rank == 10 and merged.report.error < 1e-5
    assert merge(bank(), Weights({"a": 1.0, "c": 0.5}), "linear").adapter.max_rank == 32


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize(
    ("rule", "space"), [("linear", "delta"), ("svd", "delta"), ("ties", "delta"), ("ties", "knots"), ("ties", "core")]
)
def test_energy_gives_the_smallest_rank_that_keeps_it(rule, space, energy, tmp_path):
    """Over all modules together, whatever their shapes and own ranks."""
    b = bank()
    whole = delta(merge(b, WEIGHTS, rule, space, "full").adapter)
    squares = [torch.linalg.svdvals(x) ** 2 for x in whole.values()]
    total = float(sum(s.sum() for s in squares))
    kept = [float(sum(s[:k].sum() for s in squares)) / total for k in range(1, 23)]
    want = next(k for k, share in enumerate(kept, 1) if share >= energy)
    assert want == 1 or kept[want - 2] < energy - 1e-6 < energy + 1e-6 < kept[want - 1]  # no tie decides
    merged = merge(b, WEIGHTS, rule, space, energy=energy)
    assert merged.adapter.max_rank == want and merged.report.rank == f"{want} (energy {energy:g})"
    lost = sum(float((delta(merged.adapter)[m] - x).norm()) ** 2 for m, x in whole.items())
    assert lost / total == pytest.approx(1 - kept[want - 1], rel=1e-3, abs=1e-9)
    assert merged.report.cut == pytest.approx(math.sqrt(lost / total), rel=1e-3, abs=1e-6)
    again = merge(b, WEIGHTS, rule, space, energy=energy, out=tmp_path / "m").adapter
    assert all(torch.equal(again[m].A, merged.adapter[m].A) for m in whole)


def test_all_of_the_energy_is_the_rank_of_dW_and_no_more():
    """The same adapter three times has rank 15 side by side, and rank 5."""
    b = bank()
    triple = Bank(adapter(dict(b["b"]), n) for n in ("b1", "b2", "b3"))
    w = Weights.uniform(triple.names)
    merged = merge(triple, w, energy=1.0)
    assert merged.adapter.max_rank == 5 and merge(triple, w).adapter.max_rank == 15
    assert merged.report.error < 1e-5
    nothing = merge(b, Weights({"a": 0.0}), energy=0.9)
    assert nothing.adapter.max_rank == 1 and nothing.report.error == 0.0


def test_energy_or_rank():
    for rank in (3, "max", "full"):
        with pytest.raises(LoralloyError, match=f"rank {rank} and energy 0.9 are both given; .*drop the other"):
            merge(bank(), WEIGHTS, rank=rank, energy=0.9)
    for energy in (0, -0.5, 1.01, math.nan, math.inf, "0.9", True):
        with pytest.raises(LoralloyError, match=r"energy .* is not valid; give a fraction"):
            merge(bank(), WEIGHTS, energy=energy)


def test_energy_does_not_depend_on_what_is_measured():
    """The same bf16 adapter three times has its own rank, whether the sum is rounded first or not."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 24, generator=g).bfloat16(), torch.randn(20, 4, generator=g).bfloat16()
    same = Bank(adapter({"m": LoraFactors(a, b, 1.0)}, n) for n in ("a", "b", "c"))
    w = Weights({"a": 0.6, "b": 0.37, "c": -0.21})
    ranks = {m: merge(same, w, energy=1.0, measure=m).adapter.max_rank for m in ("exact", "none")}
    assert ranks == {"exact": 4, "none": 4}


def test_overflow_on_the_way_to_a_rank_names_modules():
    b = Bank([adapter({"m": factors(9, 8, 3, 1)}, "a"), adapter({"m": factors(9, 8, 3, 2)}, "b")])
    for rule in ("linear", "ties"):
        with pytest.raises(LoralloyError, match=r"^modules like 'm': dW overflows fp32"):
            merge(b, Weights({"a": 1e80, "b": 1.0}), rule, energy=0.9)


def test_cat_has_no_use_for_an_adapter_of_weight_0():
    b = Bank([adapter({"m": factors(9, 8, 3, 1)}, "a"), adapter({"m": factors(9, 8, 3, 2)}, "b")])
    for space in ("delta", "factors"):
        assert merge(b, Weights({"a": 1.0, "b": 0.0}), "cat", space).adapter.max_rank == 3


def test_a_vote_at_weight_0_is_said_by_module():
    parts = [{m: factors(9, 8, 3, i + j) for j, m in enumerate("mn")} for i in (1, 5)]
    b = Bank([adapter(parts[0], "a"), adapter(parts[1], "b")])
    notes = make_plan(b, Weights({"a": 1.0, "b": {"m": 1.0, "n": 0.0}}), "ties", "factors").notes
    assert any("b: weight 0 still votes" in note and "1 of 2 modules" in note for note in notes)


def test_merge_and_its_plan_take_the_same_arguments():
    """What `merge` takes beyond a plan's arguments says where the result goes."""
    plan, whole = (inspect.signature(f).parameters for f in (make_plan, merge))
    assert [n for n in whole if n not in plan] == ["on_module", "out", "overwrite"]
    assert {n: (p.default, p.annotation, p.kind) for n, p in plan.items()} == {
        n: (p.default, p.annotation, p.kind) for n, p in whole.items() if n in plan
    }
