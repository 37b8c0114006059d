"""Measured errors, against dense float64 differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from helpers import adapter, delta, dense_sum, factors, generator, relative
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.factors import LoraFactors
from loralloy.merging import MEASURES, Measure, MergeReport, ModuleError, merge
from loralloy.merging.measure import measure
from loralloy.merging.stack import LowRank, Stack
from loralloy.weights import Weights

FLOOR = 1e-7  # of the parts: squares keep 16 digits in float64, so norms keep 8
SHAPES = [((64, 48), (4, 4)), ((30, 130), (16, 3, 8)), ((40, 40), (40, 60)), ((5, 300), (2,) * 6), ((1, 7), (3, 1))]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def stack(
    shape: tuple[int, int], ranks: Sequence[int], weights: Sequence[float] | None = None, modules: int = 3
) -> Stack:
    """Random factors; weights, unless given, of both signs and different by module."""
    out, inside = shape
    a = tuple(random(modules, r, inside, seed=i) for i, r in enumerate(ranks))
    b = tuple(random(modules, out, r, seed=50 + i) for i, r in enumerate(ranks))
    scaling = torch.linspace(0.3, 2, len(ranks), dtype=torch.float64)[:, None].expand(-1, modules)
    w = random(len(ranks), modules, seed=99).double()
    if weights is not None:
        w = torch.tensor(weights, dtype=torch.float64)[:, None].expand(-1, modules)
        scaling = torch.ones_like(scaling)
    return Stack(a, b, scaling, w, torch.zeros(len(ranks), modules, dtype=torch.int64))


def exact_sum(s: Stack) -> Tensor:
    """The oracle, [L, out, in] float64."""
    c = s.weights * s.scaling
    return sum((x[:, None, None] * (b.double() @ a.double()) for a, b, x in zip(s.A, s.B, c, strict=True)))  # type: ignore[return-value]


def dense(f: LowRank) -> Tensor:
    return f.B.double() @ f.A.double()


def measured(s: Stack, result: LowRank, stored: LowRank, how: Measure) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of the exact sum, of result - exact and of stored - exact; the result's own norm is checked on the way."""
    *errors, size = measure(s, result, stored, how)
    if how == "exact":
        parts = norms(result.B) * norms(result.A)
        assert bool(((size - norms(dense(result))).abs() <= FLOOR * parts).all())
    return tuple(errors)


def norms(x: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(x.double())


# -- exact -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "ranks"), SHAPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
def test_exact_is_exact(shape, ranks, size):
    """An error of a known size: to 1e-6 of itself, down to what Gram matrices can see."""
    s = stack(shape, ranks)
    total = s.weighted_sum()
    noise = random(*total.A.shape, seed=7).double()
    moved = LowRank(total.A.double() * (1 + size * noise), total.B.double())
    want = exact_sum(s)
    exact, before, after = measured(s, moved, moved, "exact")
    assert exact.dtype == before.dtype == torch.float64 and exact.shape == (3,)
    assert torch.allclose(exact, norms(want), rtol=1e-6)
    error = norms(dense(moved) - want)
    assert bool(((before - error).abs() <= 1e-6 * error + FLOOR * norms(want)).all()), (before, error)
    assert torch.equal(before, after)
    if size >= 1e-4:
        assert torch.allclose(before, error, rtol=1e-5)  # no floor in sight


@pytest.mark.parametrize(("shape", "ranks"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cast_is_measured_apart(shape, ranks, dtype):
    s = stack(shape, ranks)
    result = s.weighted_sum()
    stored = LowRank(result.A.to(dtype), result.B.to(dtype))
    _, before, after = measured(s, result, stored, "exact")
    want = exact_sum(s)
    size = norms(want)
    assert bool(((before - norms(dense(result) - want)).abs() <= FLOOR * size).all())
    assert torch.allclose(after, norms(dense(stored) - want), rtol=1e-6)
    assert bool((after > 100 * before).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
def test_weights_that_cancel(apart, dtype):
    """w and -w on nearly equal adapters: what is left is as small as 1e-8 of the parts, and is measured all the same."""
    s = stack((40, 30), (6, 6), [0.75, -0.75])
    s = s.with_factors([s.A[0], s.A[0] + apart * random(3, 6, 30, seed=8)], [s.B[0], s.B[0]])
    result = s.weighted_sum()
    stored = LowRank(result.A.to(dtype), result.B.to(dtype))
    want = exact_sum(s)
    size, parts = norms(want), norms(s.B[0].double() @ s.A[0].double())
    exact, before, after = measured(s, result, stored, "exact")
    assert torch.allclose(exact, size, rtol=1e-6)
    floor = FLOOR if apart > 1e-6 else 1e-9  # where little is left, QRs take over from Gram matrices
    assert bool(((before - norms(dense(result) - want)).abs() <= floor * parts).all())
    gap = norms(dense(stored) - want)
    if dtype == torch.float16:
        assert torch.allclose(after, gap, rtol=1e-4)
    assert bool((before <= after + FLOOR * parts).all())


@pytest.mark.parametrize(
    "weights", [(1.0, -1.0), (0.5, -0.5), (0.1, -0.1), (1 / 3, -1 / 3), (1e8, -1e8), (1e-8, -1e-8)]
)
def test_equal_adapters_of_opposite_weight_are_nothing_and_no_error(weights):
    s = stack((40, 30), (6, 6), weights)
    s = s.with_factors([s.A[0], s.A[0].clone()], [s.B[0], s.B[0].clone()])
    result = s.weighted_sum()
    exact, before, after = measured(s, result, result, "exact")
    assert float(exact.max()) == float(before.max()) == float(after.max()) == 0.0


def test_three_that_cancel_in_one_module_only():
    s = stack((40, 30), (6, 6, 6), [0.3, 0.7, -1.0])
    a, b = [x.clone() for x in s.A], [x.clone() for x in s.B]
    for i in (1, 2):
        a[i][1], b[i][1] = a[0][1], b[0][1]
    s = s.with_factors(a, b)
    result = s.weighted_sum()
    exact, before, _ = measured(s, result, result, "exact")
    want = norms(exact_sum(s))
    assert float(exact[1]) == float(before[1]) == 0.0
    assert torch.allclose(exact[[0, 2]], want[[0, 2]], rtol=1e-6) and float(want[[0, 2]].min()) > 1


def test_zero_parts_and_a_zero_result():
    s = stack((40, 30), (6, 6))
    silent = s.with_factors(s.A, [torch.zeros_like(b) for b in s.B])
    nothing = silent.weighted_sum()
    for how in ("exact", "estimate"):
        assert all(float(x.abs().max()) == 0 for x in measured(silent, nothing, nothing, how))
        exact, before, after = measured(s, nothing, nothing, how)  # all of it is missing
        assert torch.allclose(before, exact) and torch.equal(before, after) and float(exact.min()) > 1


# -- estimated, or not at all ------------------------------------------------------------------------------------------


def test_the_estimate_is_unbiased_within_its_spread():
    squares, relatives, totals = [], [], []
    for i, (out, inside, ranks) in enumerate(
        [
            (40, 33, (4, 4)),
            (64, 71, (8, 2, 8)),
            (30, 101, (16,)),
            (90, 50, (4,) * 4),
            (20, 257, (3, 3)),
            (77, 143, (9,)),
        ]
    ):
        s = stack((out, inside), ranks, modules=40)
        total = s.weighted_sum()
        moved = LowRank(total.A + 0.1 * random(*total.A.shape, seed=60 + i), total.B)
        stored = LowRank(moved.A.half(), moved.B.half())
        sure, guess = measured(s, moved, stored, "exact"), measured(s, moved, stored, "estimate")
        for a, b in zip(sure, guess, strict=True):
            squares.append((b / a).square())
            relatives.append(b / a - 1)
            totals.append(float(b.norm() / a.norm()) - 1)
    ratio, spread = torch.cat(squares), torch.cat(relatives)
    assert abs(float(ratio.mean()) - 1) < 0.05  # 720 modules, but one set of probes for each shape
    assert float(spread.square().mean().sqrt()) < 0.15 and float(spread.abs().max()) < 0.5
    assert max(map(abs, totals)) < 0.1  # "about 10 % of its value", over the modules of a merge


def parents() -> Bank:
    ranks = {"a": 4, "b": 7}
    parts = {n: {m: factors(30, 24, r, i + 10 * r) for i, m in enumerate("pqr")} for n, r in ranks.items()}
    return Bank([adapter(p, n) for n, p in parts.items()])


WEIGHTS = Weights({"a": 0.8, "b": -0.5})


@pytest.mark.parametrize("to_disk", [False, True])
def test_what_was_not_measured_is_not_claimed(tmp_path, to_disk):
    if to_disk:
        merged = merge(parents(), WEIGHTS, "svd", rank=3, measure="none", out=tmp_path / "m")
    else:
        merged = merge(parents(), WEIGHTS, "svd", rank=3, measure="none")
        merged.adapter.save(tmp_path / "m")
    report = merged.report
    assert math.isnan(report.error) and math.isnan(report.error_before_cast) and report.measured == "none"
    said = Adapter.load(tmp_path / "m").provenance["merge"]["error"]
    assert said == {"before_cast": None, "stored": None, "cut": None, "measured": "none"}
    assert "NaN" not in (tmp_path / "m" / "adapter_model.safetensors").read_bytes()[:4000].decode(errors="ignore")
    assert "nan" not in (tmp_path / "m" / "README.md").read_text().lower()
    same = merge(parents(), WEIGHTS, "svd", rank=3)
    assert all(torch.equal(merged.adapter[m].A, same.adapter[m].A) for m in "pqr")


def test_an_estimate_says_that_it_is_one(tmp_path):
    merged = merge(parents(), WEIGHTS, "svd", rank=3, measure="estimate", out=tmp_path / "m")
    sure = merge(parents(), WEIGHTS, "svd", rank=3).report
    said = merged.adapter.provenance["merge"]["error"]
    assert said["measured"] == "estimate" and merged.report.measured == "estimate"
    assert merged.report.error == pytest.approx(sure.error, rel=0.2) and merged.report.error != sure.error
    assert set(MEASURES) == {"exact", "estimate", "none"}


# -- reports -----------------------------------------------------------------------------------------------------------


def test_totals_are_over_all_modules_and_not_means_of_ratios():
    modules = {
        "big": ModuleError(exact=100.0, before_cast=1.0, stored=2.0, full=50.0, cut=5.0),
        "small": ModuleError(exact=1.0, before_cast=0.5, stored=0.5, full=1.0, cut=1.0),
    }
    report = MergeReport("svd", "delta", "4", "fp16", modules)
    assert report.error_before_cast == pytest.approx(math.sqrt(1.25) / math.sqrt(10001))
    assert report.error == pytest.approx(math.sqrt(4.25) / math.sqrt(10001))
    assert report.cut == pytest.approx(math.sqrt(26) / math.sqrt(2501))
    assert report.worst(1) == [("small", 0.5)] and [n for n, _ in report.worst()] == ["small", "big"]
    nothing = MergeReport("svd", "delta", "4", "fp16", {"m": ModuleError(0.0, 0.0, 0.0, 0.0, 0.0)})
    assert nothing.error == nothing.error_before_cast == nothing.cut == 0.0
    lost = MergeReport("svd", "delta", "4", "fp16", {"m": ModuleError(0.0, 0.0, 1.0, 0.0, 0.0)})
    assert lost.error == math.inf and lost.worst() == [("m", 1.0)]


@pytest.mark.parametrize(
    ("rule", "space"), [("svd", "delta"), ("ties", "delta"), ("ties", "knots"), ("dare_ties", "core")]
)
def test_the_report_against_dense_results(rule, space):
    """Totals, and the cut's own loss: against the rule's result, not against the weighted sum."""
    b = parents()
    whole = delta(merge(b, WEIGHTS, rule, space, rank="full").adapter)
    merged = merge(b, WEIGHTS, rule, space, rank=3, dtype=torch.float16)
    got = delta(merged.adapter)
    exact = {m: dense_sum([b[n][m] for n in "ab"], [WEIGHTS.of(n) for n in "ab"]) for m in "pqr"}
    size = math.sqrt(sum(float(x.norm()) ** 2 for x in exact.values()))
    gap = math.sqrt(sum(float((got[m] - x).norm()) ** 2 for m, x in exact.items()))
    assert merged.report.error == pytest.approx(gap / size, rel=1e-6)
    full = math.sqrt(sum(float(x.norm()) ** 2 for x in whole.values()))
    tails = [float(torch.linalg.svdvals(x)[3:].norm()) for x in whole.values()]
    assert merged.report.cut == pytest.approx(math.sqrt(sum(t * t for t in tails)) / full, rel=2e-3)
    for m, said in merged.report.modules.items():
        assert said.full == pytest.approx(float(whole[m].norm()), rel=1e-5)
        assert said.exact == pytest.approx(float(exact[m].norm()), rel=1e-6)
    assert merge(b, WEIGHTS, rule, space, rank="full").report.cut == 0.0


def test_scaling_counts():
    """alpha / r is part of dW: the same factors under two scalings are far apart."""
    f = factors(20, 16, 4, 1)
    b = Bank([adapter({"m": f}, "a"), adapter({"m": LoraFactors(f.A, f.B, 4 * f.scaling)}, "b")])
    merged = merge(b, Weights({"a": 1.0, "b": -0.25}))
    assert merged.report.error == 0.0 and relative(delta(merged.adapter)["m"], torch.zeros(20, 16)) < 1e-6
    assert merge(b, Weights({"a": 1.0, "b": 1.0})).report.modules["m"].exact == pytest.approx(
        5 * float(f.dense().norm()), rel=1e-6
    )
