"""The engine: batches, bare factors, devices, dtypes and overflow."""

from __future__ import annotations

import itertools
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
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.merging import RULES, get_plugin, get_rule, make_plan, merge, merge_factors, stacking
from loralloy.merging.entries import Entries
from loralloy.weights import Weights

# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "space"), EVERYWHERE, ids=lambda x: x)
def test_batching_changes_nothing(rule, space, monkeypatch):
    b = alike() if space == "factors" else bank()
    variants = [get_rule(rule)]
    if "trim" in variants[0].parameters:
        variants.append(variants[0](trim="all"))
    for bound in variants:
        results = []
        for budget in (1, 40_000, 1 << 40):
            monkeypatch.setattr(stacking, "_BUDGET", {"cpu": budget})
            results.append(merge(b, Weights({"a": 0.8, "c": -0.3, "b": 0.6}), bound, space))
        for other in results[1:]:
            for m, want in delta(results[0].adapter).items():
                assert relative(delta(other.adapter)[m], want) < 1e-5
            assert other.report.error == pytest.approx(results[0].report.error, abs=1e-6)


def test_batches_of_a_group_are_even(monkeypatch):
    """As few as the budget allows, in order, of one size but for what does not divide."""
    plan = make_plan(
        Bank([adapter({f"m{i}": factors(9, 8, 3, i) for i in range(10)}, "a")]), Weights({"a": 1.0}), "ties"
    )
    settings = stacking.Settings(
        plan.rule, plan.space, None, None, torch.float32, torch.device("cpu"), "none"
    )  # fmt: skip
    seen = set()
    for budget in range(1, 40_000, 100):
        monkeypatch.setattr(stacking, "_BUDGET", {"cpu": budget})
        sizes = [len(range(10)[part]) for part in stacking.chunks(plan.groups[0], settings)]
        assert sum(sizes) == 10 and max(sizes) == math.ceil(10 / len(sizes)) and sizes == sorted(sizes, reverse=True)
        seen.add(tuple(sizes))
    assert {(10,), (5, 5), (4, 4, 2), (1,) * 10} <= seen


@pytest.mark.parametrize(("rule", "space"), EVERYWHERE, ids=lambda x: x)
def test_adapters_are_left_as_they_were(rule, space):
    """A module that no other is like enters as it is stored, not as a copy."""
    b = alike() if space == "factors" else bank()
    bound = get_rule(rule)
    variants = [bound, *[bound(density=d) for d in (0.0, 1.0) if "density" in bound.parameters]]
    if "vote" in bound.parameters:
        variants += [bound(vote="weighted", density=1.0), bound(normaliser="weights", density=1.0)]
    before = {(n, m): (f.A.clone(), f.B.clone()) for n in b for m, f in b[n].items()}
    for variant in variants:
        merge_factors([dict(b[n]) for n in b], [0.8, -0.6, 0.3], variant, space)
        for (n, m), (a_, b_) in before.items():
            assert torch.equal(b[n][m].A, a_) and torch.equal(b[n][m].B, b_), (str(variant), n, m)


def test_an_election_overwrites_what_is_spare_and_nothing_else():
    """The same bytes either way; entries of another dtype than the computation's are never written to."""
    g = torch.Generator().manual_seed(0)
    given = itertools.product((1, 2, 4), ("total", "frequency"), ("count", "weights"), ("unweighted", "weighted"))
    for adapters, majority, normaliser, vote in given:
        for dtype in (torch.float32, torch.float16):
            values = [torch.randn(3, 50, generator=g).mul(2).round().to(dtype) for _ in range(adapters)]
            weights = torch.randn(adapters, 3, generator=g, dtype=torch.float64)
            keys = torch.zeros(adapters, 3, dtype=torch.int64)
            entries = Entries(values, weights, weights, keys, None, 0, torch.float32)
            kept = [x.clone() for x in values]
            want = entries.disjoint(kept, majority, normaliser, vote)  # type: ignore[arg-type]
            assert all(torch.equal(x, y) for x, y in zip(values, kept, strict=True))
            got = entries.disjoint(kept, majority, normaliser, vote, spare=True)  # type: ignore[arg-type]
            assert torch.equal(got.view(torch.int32), want.view(torch.int32))
            if dtype == torch.float16:
                assert all(torch.equal(x, y) for x, y in zip(values, kept, strict=True))


@pytest.mark.parametrize(("rule", "space"), EVERYWHERE, ids=lambda x: x)
def test_merge_factors_is_the_merge(rule, space):
    b = alike() if space == "factors" else bank()
    bound = get_rule(rule)
    if "seed" in bound.parameters:
        bound = bound(density=1.0)  # masks are keyed by content in one, by place in the other
    w = {"a": 0.8, "b": -0.6, "c": 0.0}
    want = merge(b, Weights(w), bound, space, measure="none").adapter
    got = merge_factors([dict(b[n]) for n in w], list(w.values()), bound, space)
    assert set(got) == set(want)
    assert all(relative(f.dense(), want[m].dense()) < 1e-6 and f.scaling == 1.0 for m, f in got.items())
    low = merge_factors([dict(b[n]) for n in w], list(w.values()), bound, space, rank=2, dtype=torch.float16)
    assert {f.rank for f in low.values()} == {2} and {f.A.dtype for f in low.values()} == {torch.float16}
    with pytest.raises(LoralloyError, match="2 adapters but 1 weights"):
        merge_factors([b["a"], b["b"]], [1.0], bound, space)


def test_bare_factors_that_do_not_fit_are_refused():
    f = factors(6, 10, 4)
    for other in (factors(6, 11, 4), factors(7, 10, 4), LoraFactors(f.A, f.B, 1.0, "embedding")):
        with pytest.raises(LoralloyError, match=r"module 'm' is linear \[6, 10\] in one adapter but .* in another"):
            merge_factors([{"m": f}, {"m": other}], [1.0, 1.0], RULES["linear"])


# -- devices and dtypes ------------------------------------------------------------------------------------------------


def test_devices():
    for device in (
        "gpu",
        "cuda:nine",
        "",
        "meta",
        *([] if torch.cuda.is_available() else ["cuda", torch.device("cuda:1")]),
    ):
        with pytest.raises(LoralloyError, match=r"device '.*' cannot be used \(.*\); give cpu, or cuda"):
            merge(bank(), WEIGHTS, device=device)
    same = merge(bank(), WEIGHTS, device=torch.device("cpu")).adapter
    assert all(torch.equal(f.B, same[m].B) for m, f in merge(bank(), WEIGHTS).adapter.items())


@pytest.mark.parametrize("rule", ["linear", "svd", "ties"])
def test_dtypes(rule):
    want = delta(merge(bank(), WEIGHTS, rule).adapter)
    for dtype, within in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-7), (torch.float64, 1e-6)):
        merged = merge(bank(), WEIGHTS, rule, dtype=dtype)
        assert {f.A.dtype for f in merged.adapter.values()} == {f.B.dtype for f in merged.adapter.values()} == {dtype}
        assert max(relative(x, want[m]) for m, x in delta(merged.adapter).items()) < within
    halves = merge(bank(torch.float16), WEIGHTS, rule)
    assert halves.adapter.dtype == torch.float16 and halves.report.dtype == "fp16"
    mixed = Bank([bank(torch.float16)["a"], bank(torch.bfloat16)["b"]])
    assert merge(mixed, Weights({"a": 1.0, "b": 1.0}), rule).adapter.dtype == torch.float32
    sure = merge(bank(torch.float64), WEIGHTS, rule)
    assert sure.adapter.dtype == torch.float64 and max(relative(delta(sure.adapter)[m], want[m]) for m in want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool, torch.complex64], ids=str)
def test_dtypes_that_hold_no_factors_are_refused(dtype):
    with pytest.raises(LoralloyError, match=f"{dtype} cannot be merged to; store the result as fp16, bf16 or fp32"):
        merge(bank(), WEIGHTS, dtype=dtype)


def test_overflow_names_the_module_of_the_batch():
    """Ten modules in one batch; the eighth alone is too large for fp16."""
    b = Bank(adapter({f"m{i}": factors(9, 8, 3, i + 10 * s) for i in range(10)}, n) for s, n in enumerate("ab"))
    w = Weights({"a": {"*": 1.0, "m7": 1e12}, "b": 0.5})
    assert [len(g.modules) for g in make_plan(b, w).groups] == [10]
    for rule in ("linear", "svd", "ties"):
        with pytest.raises(LoralloyError, match=r"^module 'm7' of a, b: . overflows fp16; store it as bf16 or fp32"):
            merge(b, w, rule, dtype=torch.float16)
        assert merge(b, w, rule, dtype=torch.bfloat16).report.error < (1.5 if rule == "ties" else 1)


@pytest.mark.parametrize("rule", ["linear", "ties", "svd", "iso_c"])
@pytest.mark.parametrize("space", ["delta", "factors"])
def test_what_overflows_float32_is_not_told_to_be_stored_as_such(rule, space):
    """Stored as fp16 or bf16, in memory, measured or not, and from bare factors."""
    b = Bank([adapter({"m": factors(9, 8, 3, 1)}, "a"), adapter({"m": factors(9, 8, 3, 2)}, "b")])
    if space not in get_rule(rule).spaces:
        return
    w = {"a": 1e80, "b": 1.0}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for run in (
            lambda d=dtype: merge(b, Weights(w), rule, space, dtype=d),
            lambda d=dtype: merge(b, Weights(w), rule, space, dtype=d, measure="none"),
            lambda d=dtype: merge_factors([b["a"], b["b"]], list(w.values()), rule, space, dtype=d),
        ):
            with pytest.raises(LoralloyError, match=r"^module 'm' of .*(overflows fp32|not finite)") as caught:
                run()
            assert "store it as" not in str(caught.value)


def test_bare_factors_are_answered_in_words():
    """A name is a rule, as for `merge`; what cannot be merged is said in one sentence."""
    some = [{"m": factors(6, 10, 4, 1)}, {"m": factors(6, 10, 4, 2)}]
    named = merge_factors(some, [1.0, 0.5], "ties", before="pico", after="svc")["m"]
    want = merge_factors(some, [1.0, 0.5], get_rule("ties"), before=get_plugin("pico"), after=get_plugin("svc"))["m"]
    assert torch.equal(named.A, want.A) and torch.equal(named.B, want.B)
    bad = {
        "rule 'glue' is not known": {"rule": "glue"},
        "is not a rule": {"rule": get_plugin("svc")},
        "'svc' goes after the rule; pass it as --after": {"before": get_plugin("svc")},
        "'pico' goes before the rule; pass it as --before": {"after": "pico"},
        "is not a plug-in": {"before": get_rule("ties")},
        "rank 0 is not valid": {"rank": 0},
        "rank 'all' is not valid": {"rank": "all"},
    }
    for says, more in bad.items():
        with pytest.raises(LoralloyError, match=says):
            merge_factors(some, [1.0, 0.5], **{"rule": "linear", **more})
    for nothing, says in (([], "no adapters given"), ([{}, {}], "none of the adapters has a module")):
        with pytest.raises(LoralloyError, match=says):
            merge_factors(nothing, [1.0] * len(nothing), "linear")


def test_weights_beyond_float32_are_an_error():
    b = Bank([adapter({"m": factors(9, 8, 3, 1)}, "a"), adapter({"m": factors(9, 8, 3, 2)}, "b")])
    for rule in ("linear", "cat", "svd", "ties"):
        with pytest.raises(LoralloyError, match=r"^module 'm' of a, b: .*overflows fp32"):
            merge(b, Weights({"a": 1e80, "b": 1.0}), rule)


def test_adapters_in_memory_and_on_disk_merge_alike(tmp_path):
    b = bank()
    for n, a in b.items():
        a.save(tmp_path / n)
    disk = Bank(Adapter.load(tmp_path / n) for n in b)
    for rule in ("ties", "dare_ties", "svd"):
        one, two = (merge(x, WEIGHTS, rule).adapter for x in (b, disk))
        assert list(one) != [] and all(torch.equal(one[m].A, two[m].A) and torch.equal(one[m].B, two[m].B) for m in one)


def test_modules_of_two_dtypes_are_stored_as_float32():
    mixed = adapter({"m": factors(9, 8, 3, 1, dtype=torch.float16), "n": factors(9, 8, 3, 2)}, "a")
    assert merge(Bank([mixed]), Weights({"a": 1.0})).adapter.dtype == torch.float32


def test_global_trimming_where_modules_have_different_directions():
    """In KnOTS's space one module's B is zero for both adapters; equals at the limit are shared out piece by piece."""
    parts = [{m: factors(9, 8, 2, 10 * i + j) for j, m in enumerate("abc")} for i in (1, 2)]
    for part in parts:
        part["c"] = LoraFactors(part["c"].A, torch.zeros_like(part["c"].B), 0.5)
    b = Bank([adapter(part, str(i)) for i, part in enumerate(parts)])
    for rule in (get_rule("ties"), get_rule("magnitude_prune")):
        merged = merge(b, Weights.uniform(b.names), rule(trim="all", density=0.95), "knots")
        assert math.isfinite(merged.report.error) and float(merged.adapter["a"].dense().norm()) > 0
