"""The rank of a rule's own result is known beforehand: nothing is stored that is zeros by construction."""

from __future__ import annotations

import itertools

import pytest
import torch
from dense import make_stack

from helpers import adapter, factors, relative
from loralloy.bank import Bank
from loralloy.merging import IsoC, IsoCts, Rule, TsvM, make_plan, merge, merge_factors
from loralloy.merging.plan import natural_rank
from loralloy.weights import Weights

BOUND = [
    *(rule(directions=k) for rule, k in itertools.product((IsoC, IsoCts), (0, 1, 4, 100))),
    *(TsvM(keep=keep) for keep in (0.1, 0.5, 1.0)),
]
EVERY = pytest.mark.parametrize("rule", BOUND, ids=str)


@EVERY
@pytest.mark.parametrize(("shape", "ranks"), [((14, 12), (4, 3)), ((9, 5), (4, 3)), ((5, 9), (6,))])
def test_the_plan_knows_what_the_rule_makes(rule: Rule, shape, ranks):
    stack = make_stack(*shape, ranks)
    assert natural_rank(rule, "delta", ranks, shape) == rule.function(stack, **rule.values).rank


def bank() -> Bank:
    return Bank(
        adapter({m: factors(24, 20, r, 10 * r + i) for i, m in enumerate("mn")}, n) for n, r in (("a", 4), ("b", 6))
    )


@EVERY
def test_no_column_is_zero(rule: Rule, tmp_path):
    b, w = bank(), Weights({"a": 0.7, "b": -0.4})
    want = {"tsv_m": {0.1: 2, 0.5: 5, 1.0: 10}.get(rule.values.get("keep"), 0)}.get(
        rule.name, min(rule.values.get("directions") or 10, 10)
    )
    plan = make_plan(b, w, rule, rank="full")
    assert plan.top == want and not any(group.cut for group in plan.groups)
    merged = merge(b, w, rule, rank="full", out=tmp_path / "m")
    assert merged.adapter.max_rank == want and merged.adapter.config.rank == want
    bare = merge_factors([b["a"], b["b"]], [0.7, -0.4], rule, rank="full")
    for m, f in merged.adapter.items():
        assert bool((f.A.norm(dim=1) > 0).all()) and bool((f.B.norm(dim=0) > 0).all())
        assert bare[m].rank == want and relative(bare[m].dense(), f.dense()) < 1e-6


@pytest.mark.parametrize("rule", [IsoC(directions=3), IsoCts(directions=3), TsvM(keep=0.4)], ids=str)
def test_a_rank_above_it_cuts_nothing(rule: Rule):
    """Nothing is lost, and nothing is padded up to the rank that was asked for."""
    b, w = bank(), Weights({"a": 0.7, "b": -0.4})
    whole = merge(b, w, rule, rank="full").adapter
    for rank in (5, "max"):
        merged = merge(b, w, rule, rank=rank)
        assert merged.report.cut == 0.0 and merged.adapter.max_rank == whole.max_rank < 5
        assert all(torch.equal(f.B, whole[m].B) for m, f in merged.adapter.items())
    low = merge(b, w, rule, rank=2)
    assert low.adapter.max_rank == 2 and low.report.cut > 0
