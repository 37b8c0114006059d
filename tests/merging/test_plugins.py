"""Pico and SVC against plain dense references in float64, written from the papers' formulas one module at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import generator, relative
from torch import Tensor

from loralloy.errors import LoralloyError
from loralloy.merging import pico, svc
from loralloy.merging.stack import LowRank, Stack

DIGITS = {torch.float64: 1e-9, torch.float32: 2e-4}


def make(
    ranks: tuple[int, ...] = (3, 2, 4),
    modules: int = 2,
    out: int = 12,
    inside: int = 9,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    weights: tuple[float, ...] | None = None,
    overlap: float = 0.5,
) -> Stack:
    """Random adapters whose B (and A) share a part, so that directions overlap; scalings differ."""
    g = generator(seed)
    top = max(ranks)
    shared_b = torch.randn(modules, out, top, generator=g)
    shared_a = torch.randn(modules, top, inside, generator=g)
    a, b = [], []
    for r in ranks:
        b.append(overlap * shared_b[:, :, :r] + torch.randn(modules, out, r, generator=g))
        a.append(overlap * shared_a[:, :r] + torch.randn(modules, r, inside, generator=g))
    scaling = 0.5 + torch.rand(len(ranks), modules, generator=g)
    w = torch.tensor(weights or (1.0,) * len(ranks), dtype=torch.float64)[:, None].expand(-1, modules)
    keys = torch.zeros(len(ranks), modules, dtype=torch.int64)
    return Stack(
        tuple(x.to(dtype) for x in a), tuple(x.to(dtype) for x in b), scaling.double(), w.contiguous(), keys
    )  # fmt: skip


def parts(stack: Stack, module: int) -> list[Tensor]:
    """dW_t of one module, float64."""
    return [
        float(s[module]) * b[module].double() @ a[module].double()
        for a, b, s in zip(stack.A, stack.B, stack.scaling, strict=True)
    ]


def dense(result: LowRank | Tensor) -> Tensor:
    return (result if isinstance(result, Tensor) else LowRank(result.A.double(), result.B.double()).dense()).double()


def regauged(stack: Stack, orthogonal: bool, seed: int = 5) -> Stack:
    """The same dW from other factors, (G A, B G^-1)."""
    g = generator(seed)
    a, b = [], []
    for x, y in zip(stack.A, stack.B, strict=True):
        r = x.shape[1]
        m = torch.randn(r, r, generator=g, dtype=torch.float64) + 2 * torch.eye(r, dtype=torch.float64)
        m = torch.linalg.qr(m).Q if orthogonal else m
        a.append((m @ x.double()).to(x.dtype))
        b.append((y.double() @ torch.linalg.inv(m)).to(y.dtype))
    return stack.with_factors(a, b)


def picked(stack: Stack, order: list[int]) -> Stack:
    return Stack(
        tuple(stack.A[i] for i in order), tuple(stack.B[i] for i in order),
        stack.scaling[order], stack.weights[order], stack.keys[order],
    )  # fmt: skip


STACKS = st.builds(
    make,
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    modules=st.integers(1, 3),
    out=st.integers(1, 14),
    inside=st.integers(1, 14),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    overlap=st.sampled_from([0.0, 0.5, 3.0]),
)
WEIGHTS = st.lists(st.sampled_from([1.0, 0.25, 0.5, -0.5, 2.0, 0.0]), min_size=4, max_size=4)


def weighted(stack: Stack, values: list[float]) -> Stack:
    """The stack under other weights, shifted by one from module to module, so that who takes part differs."""
    rows = [[values[(t + m) % 4] for m in range(stack.modules)] for t in range(stack.adapters)]
    return dataclasses.replace(stack, weights=torch.tensor(rows, dtype=torch.float64))


# -- pico --------------------------------------------------------------------------------------------------------------


def pico_reference(stack: Stack, module: int, spectrum: str = "B") -> list[Tensor]:
    """dW'_t of one module: sections 4.1 of the paper, by the full SVD."""
    whole, w = parts(stack, module), stack.weights[:, module]
    here = [t for t in range(stack.adapters) if w[t] != 0]
    if not here:
        return whole
    counted = [stack.scaling[t, module] * stack.B[t][module].double() if spectrum == "B" else whole[t] for t in here]
    u, sigma, _ = torch.linalg.svd(torch.cat(counted, 1), full_matrices=False)
    energy = sigma**2
    share = energy / energy.sum() if energy.sum() > 0 else energy
    alpha = 1 / (1 + (len(here) - 1) * share)
    operator = torch.eye(u.shape[0], dtype=torch.float64) + u @ torch.diag(alpha - 1) @ u.T
    return [operator @ x for x in whole]


def pico_merged_reference(stack: Stack, module: int, target: str = "mean") -> Tensor:
    """Linear merge of the calibrated adapters, rescaled: section 4.2."""
    w, whole = stack.weights[:, module], parts(stack, module)
    calibrated = pico_reference(stack, module)
    if target == "each":
        calibrated = [c * x.norm() / c.norm() if c.norm() > 0 else c for c, x in zip(calibrated, whole, strict=True)]
    merged = sum((float(v) * x for v, x in zip(w, calibrated, strict=True)), torch.zeros_like(whole[0]))
    here = [t for t in range(stack.adapters) if w[t] != 0]
    if target == "each" or len(here) < 2:
        return merged
    wanted = sum((abs(float(w[t])) if target == "weights" else 1 / len(here)) * float(whole[t].norm()) for t in here)
    return merged * wanted / merged.norm()


def pico_merge(stack: Stack, **values: object) -> LowRank:
    plugin = pico.PLUGIN(**values)
    seen, factor = plugin.function(stack, **plugin.values)
    assert torch.equal(factor, torch.ones_like(factor))
    assert plugin.finish is not None
    return plugin.finish(seen.weighted_sum(), stack, **plugin.values)


@settings(max_examples=60, deadline=None)
@given(stack=STACKS, values=WEIGHTS, spectrum=st.sampled_from(["B", "dW"]))
def test_pico_calibrates_as_the_formula_says(stack: Stack, values: list[float], spectrum: str) -> None:
    stack = weighted(stack, values)
    seen, _ = pico.pico(stack, spectrum=spectrum)
    for module in range(stack.modules):
        for t, want in enumerate(pico_reference(stack, module, spectrum)):
            if stack.weights[t, module] != 0:
                assert relative(parts(seen, module)[t], want) < DIGITS[stack.dtype] / 10
    for mine, theirs in zip(seen.A, stack.A, strict=True):
        assert torch.equal(mine, theirs)


@settings(max_examples=40, deadline=None)
@given(stack=STACKS, values=WEIGHTS.filter(lambda v: min(v) >= 0), target=st.sampled_from(["mean", "weights", "each"]))
def test_pico_restores_the_norm_that_was_asked_for(stack: Stack, values: list[float], target: str) -> None:
    stack = weighted(stack, values)
    got = dense(pico_merge(stack, target=target))
    plugin = pico.PLUGIN(target=target)
    seen, _ = plugin.function(stack, **plugin.values)
    from_dense = pico.finish(seen.weighted_sum().dense(), stack, **plugin.values)
    for module in range(stack.modules):
        want = pico_merged_reference(stack, module, target)
        assert relative(got[module], want) < DIGITS[stack.dtype]
        assert relative(dense(from_dense)[module], want) < DIGITS[stack.dtype]


def test_pico_without_restoring_lies_between_a_tth_and_the_whole() -> None:
    stack = make()
    seen, _ = pico.pico(stack, restore=False)
    for module in range(stack.modules):
        for was, now in zip(parts(stack, module), parts(seen, module), strict=True):
            assert was.norm() / stack.adapters < now.norm() < was.norm()
    merged = seen.weighted_sum()
    assert pico.finish(merged, stack, restore=False) is merged


@pytest.mark.parametrize("target", ["mean", "weights", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pico_leaves_one_adapter_as_it_is(target: str, dtype: torch.dtype) -> None:
    stack = make((4,), weights=(0.3,), dtype=dtype)
    seen, _ = pico.pico(stack, target=target)
    assert torch.equal(seen.B[0], stack.B[0])
    merged = stack.weighted_sum()
    finished = pico.finish(merged, stack, target=target)
    assert torch.equal(finished.A, merged.A) and torch.equal(finished.B, merged.B)


def test_pico_takes_an_adapter_of_weight_zero_as_absent() -> None:
    stack = make((3, 2, 4), weights=(0.5, 0.0, 0.5))
    assert relative(dense(pico_merge(stack)), dense(pico_merge(picked(stack, [0, 2])))) < 1e-12
    alone = make((3, 2), modules=2)
    alone.weights[1, 1] = 0.0  # the second module has one adapter only
    got, plain = dense(pico_merge(alone)), dense(alone.weighted_sum())
    assert relative(got[1], plain[1]) < 1e-14 and relative(got[0], plain[0]) > 1e-2


def test_pico_on_orthogonal_adapters_of_one_size_changes_nothing_but_the_norm() -> None:
    q = torch.linalg.qr(torch.randn(3, 12, 6, dtype=torch.float64, generator=generator(1))).Q
    stack = make((2, 2, 2), modules=3)
    stack = stack.with_factors(stack.A, q.split(2, 2), torch.full_like(stack.scaling, 0.7))
    seen, _ = pico.pico(stack)
    for was, now in zip(stack.B, seen.B, strict=True):  # every s_j is 1 / (T r)
        assert relative(now, was / (1 + 2 / 6)) < 1e-12
    got, plain = dense(pico_merge(stack)), dense(stack.weighted_sum())
    for module in range(3):
        mean = sum(float(x.norm()) for x in parts(stack, module)) / 3
        assert relative(got[module], plain[module] * mean / plain[module].norm()) < 1e-12


def test_pico_brings_one_direction_of_all_adapters_to_a_tth_and_back() -> None:
    stack = make((1, 1, 1))
    stack = stack.with_factors((stack.A[0],) * 3, (stack.B[0],) * 3, torch.ones_like(stack.scaling))
    seen, _ = pico.pico(stack)
    assert relative(seen.B[1], stack.B[1] / 3) < 1e-14
    assert relative(dense(pico_merge(stack)), dense(LowRank(stack.A[0], stack.B[0]))) < 1e-14


def test_pico_counts_the_scaling_as_part_of_b() -> None:
    stack = make((3, 2, 4))
    held = stack.with_factors(
        stack.A,
        [b * s[:, None, None] for b, s in zip(stack.B, stack.scaling, strict=True)],
        torch.ones_like(stack.scaling),
    )
    assert relative(dense(pico_merge(stack)), dense(pico_merge(held))) < 1e-12
    seen, _ = pico.pico(stack)
    assert torch.equal(seen.scaling, stack.scaling)  # factors space takes its root on each side


@pytest.mark.parametrize("spectrum", ["B", "dW"])
def test_pico_keeps_the_gauge_it_says_it_keeps(spectrum: str) -> None:
    stack = make((3, 2, 4))
    base = dense(pico_merge(stack, spectrum=spectrum))
    assert relative(dense(pico_merge(regauged(stack, True), spectrum=spectrum)), base) < 1e-12
    skew = relative(dense(pico_merge(regauged(stack, False), spectrum=spectrum)), base)
    assert skew < 1e-11 if spectrum == "dW" else skew > 1e-3
    assert relative(dense(pico_merge(picked(stack, [2, 0, 1]), spectrum=spectrum)), base) < 1e-12


def test_pico_scales_with_the_weights_only_where_it_should() -> None:
    stack = make(weights=(0.5, 0.3, 0.2))
    twice = dataclasses.replace(stack, weights=2 * stack.weights)
    assert relative(dense(pico_merge(twice)), dense(pico_merge(stack))) < 1e-12
    assert relative(dense(pico_merge(twice, target="weights")), 2 * dense(pico_merge(stack, target="weights"))) < 1e-12
    third = dataclasses.replace(stack, weights=torch.full_like(stack.weights, 1 / 3))
    assert relative(dense(pico_merge(third, target="weights")), dense(pico_merge(third))) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pico_bears_near_duplicates_zeros_and_cancelling_adapters(dtype: torch.dtype) -> None:
    stack = make((4, 4), modules=3, dtype=dtype)
    near = stack.B[0] * (1 + 1e-6 * torch.randn(stack.B[0].shape, generator=generator(2)).to(dtype))
    near[1] = 0  # a module where one adapter is untrained
    first = stack.B[0].clone()
    first[2], near[2] = 0, 0  # and one where both are
    alike = stack.with_factors((stack.A[0],) * 2, (first, near), torch.ones_like(stack.scaling))
    for spectrum in ("B", "dW"):
        got = dense(pico_merge(alike, spectrum=spectrum))
        assert bool(torch.isfinite(got).all()) and float(got[2].abs().max()) == 0
        want = [sum(pico_reference(alike, m, spectrum)) for m in range(2)]
        for m in range(2):
            mean = sum(float(x.norm()) for x in parts(alike, m)) / 2
            assert relative(got[m], want[m] * mean / want[m].norm()) < DIGITS[dtype] / 10
    same = alike.with_factors((stack.A[0],) * 2, (stack.B[0],) * 2)
    against = dataclasses.replace(same, weights=torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 3))
    assert dense(pico_merge(against)).norm() < 1e-5 * dense(LowRank(stack.A[0], stack.B[0])).norm()
    assert bool(torch.isfinite(dense(pico_merge(dataclasses.replace(alike, weights=0 * alike.weights)))).all())


# -- svc ---------------------------------------------------------------------------------------------------------------


def svc_reference(stack: Stack, module: int, merged: Tensor, alpha: float, keep: int | None = None) -> Tensor:
    """Algorithm 1 of the paper on one dense dW, with the first `keep` directions only."""
    w, whole = stack.weights[:, module], parts(stack, module)
    here = [t for t in range(stack.adapters) if w[t] != 0]
    u, sigma, vh = torch.linalg.svd(merged.double(), full_matrices=False)
    k = len(here)
    alpha = alpha or 1 / max(k, 1)
    calibrated = torch.zeros_like(merged, dtype=torch.float64)
    for r in range(keep or len(sigma)):
        total = 0.0
        for t in here:
            own, both = u[:, r] @ whole[t], u[:, r] @ merged.double()
            small = own.norm() <= 256 * torch.finfo(stack.dtype).eps * whole[t].norm()
            sign = 1 if w[t] > 0 else -1
            total += max(alpha, 0.0 if small else sign * float(both @ own / own.norm() ** 2))
        gamma = k / total if k > 1 else 1.0
        calibrated += gamma * sigma[r] * torch.outer(u[:, r], vh[r])
    return calibrated


@settings(max_examples=60, deadline=None)
@given(stack=STACKS, values=WEIGHTS, alpha=st.sampled_from([0.0, 0.1, 1.0]))
def test_svc_is_the_papers_algorithm(stack: Stack, values: list[float], alpha: float) -> None:
    stack = weighted(stack, values)
    stack = stack.with_factors([a.double() for a in stack.A], [b.double() for b in stack.B])
    merged = stack.weighted_sum()
    low, full = svc.svc(merged, stack, None, alpha=alpha), svc.svc(merged.dense(), stack, None, alpha=alpha)
    assert isinstance(low, LowRank) and isinstance(full, Tensor)
    assert low.rank == min(merged.rank, *stack.shape)
    for module in range(stack.modules):
        before = merged.dense()[module]
        want = svc_reference(stack, module, before, alpha)
        size = max(float(want.norm()), float(before.norm()))
        assert float((dense(low)[module] - want).norm()) <= 1e-7 * size
        assert float((full[module] - want).norm()) <= 1e-7 * size


@pytest.mark.parametrize("seed", range(5))
def test_svc_in_float32_follows_float64(seed: int) -> None:
    stack = make((3, 2, 4), modules=3, seed=seed, dtype=torch.float32, weights=(0.5, 0.3, 0.4))
    wide = stack.with_factors([a.double() for a in stack.A], [b.double() for b in stack.B])
    want = dense(svc.svc(wide.weighted_sum(), wide, 4))
    assert relative(dense(svc.svc(stack.weighted_sum(), stack, 4)), want) < DIGITS[torch.float32]
    assert relative(dense(svc.svc(stack.weighted_sum().dense(), stack, 4)), want) < DIGITS[torch.float32]


@settings(max_examples=30, deadline=None)
@given(stack=STACKS, values=WEIGHTS)
def test_svc_with_alpha_one_only_shrinks(stack: Stack, values: list[float]) -> None:
    stack = weighted(stack, values)
    merged = stack.weighted_sum()
    was = torch.linalg.svdvals(dense(merged))
    now = torch.linalg.svdvals(dense(svc.svc(merged, stack, None, alpha=1.0)))
    assert bool((now <= was + 1e-5 * was.max()).all())


def apart(adapters: int, weights: tuple[float, ...], dtype: torch.dtype = torch.float64, side: int = 64) -> Stack:
    """Adapters of rank 3 that share neither input nor output directions, but for the rounding to `dtype`."""
    stack = make((3,) * adapters, out=side, inside=side, weights=weights)
    g = generator(1)
    left, right = (torch.linalg.qr(torch.randn(2, side, 3 * adapters, generator=g).double()).Q for _ in range(2))
    a = [torch.randn(2, 3, 3, generator=g).double() @ q.mT for q in right.split(3, 2)]
    return stack.with_factors([x.to(dtype) for x in a], [x.to(dtype) for x in left.split(3, 2)])


def test_svc_with_alpha_below_one_lifts_what_the_weights_made_weak() -> None:
    stack = apart(3, (1 / 3, 1 / 3, 1 / 3))  # s is 1/3 for a direction's owner, and the others count as alpha
    plain = dense(stack.weighted_sum())
    assert relative(dense(svc.svc(stack.weighted_sum(), stack, None)), 3 * plain) < 1e-12
    assert relative(dense(svc.svc(stack.weighted_sum(), stack, None, alpha=1.0)), plain) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_svc_does_not_take_rounding_for_a_direction(dtype: torch.dtype, alpha: float) -> None:
    stack = apart(2, (1.0, 1.0), dtype)
    for result in (stack.weighted_sum(), stack.weighted_sum().dense()):
        got = dense(svc.svc(result, stack, 6, alpha=alpha))
        want = 2 / (1 + (alpha or 0.5)) * dense(result)
        assert relative(got, want) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("weight", [0.3, 1.0, 2.5])
def test_svc_leaves_a_single_adapter_as_it_is(weight: float) -> None:
    stack = make((4,), weights=(weight,))
    assert relative(dense(svc.svc(stack.weighted_sum(), stack, None, alpha=0.1)), dense(stack.weighted_sum())) < 1e-13
    two = make((3, 4), weights=(0.0, weight))
    assert relative(dense(svc.svc(two.weighted_sum(), two, None, alpha=0.1)), dense(two.weighted_sum())) < 1e-13


def test_svc_counts_a_shared_adapter_once() -> None:
    stack = make((3, 3, 3))
    same = stack.with_factors((stack.A[0],) * 3, (stack.B[0],) * 3, stack.scaling[:1].expand(3, -1))
    want = torch.stack([parts(same, m)[0] for m in range(2)])
    assert relative(dense(svc.svc(same.weighted_sum(), same, None)), want) < 1e-12
    against = dataclasses.replace(same, weights=-same.weights)
    assert relative(dense(svc.svc(against.weighted_sum(), against, None)), -want) < 1e-12


def test_svc_takes_an_adapter_of_weight_zero_as_absent() -> None:
    stack = make((3, 2, 4), weights=(0.5, 0.0, 0.7))
    fewer = picked(stack, [0, 2])
    merged = fewer.weighted_sum()
    assert relative(dense(svc.svc(merged, stack, None)), dense(svc.svc(merged, fewer, None))) < 1e-12


def test_svc_does_not_depend_on_gauge_order_or_batch() -> None:
    stack = make((3, 2, 4), modules=3, weights=(0.5, 0.3, 0.4))
    base = dense(svc.svc(stack.weighted_sum(), stack, None))
    for other in (regauged(stack, False), picked(stack, [2, 0, 1])):
        assert relative(dense(svc.svc(other.weighted_sum(), other, None)), base) < 1e-9
    for module in range(3):
        one = stack.only(slice(module, module + 1))
        assert relative(dense(svc.svc(one.weighted_sum(), one, None))[0], base[module]) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svc_bears_near_duplicates_and_zeros(dtype: torch.dtype) -> None:
    stack = make((4, 4), modules=4, dtype=dtype)
    near = stack.B[0] * (1 + 1e-7 * torch.randn(stack.B[0].shape, generator=generator(2)).to(dtype))
    first = stack.B[0].clone()
    near[1] = 0  # one adapter untrained
    first[2], near[2] = 0, 0  # both
    near[3] = stack.B[1][3]  # nothing of the kind
    ones = torch.ones_like(stack.scaling)
    alike = stack.with_factors((stack.A[0], stack.A[0]), (first, near), ones)
    for result in (alike.weighted_sum(), alike.weighted_sum().dense()):
        got = dense(svc.svc(result, alike, None))
        assert bool(torch.isfinite(got).all()) and float(got[2].norm()) == 0
        one = dense(LowRank(alike.A[0], alike.B[0]))
        assert relative(got[0], one[0]) < 1e-5  # the pair counts once
        assert relative(got[1], one[1] * 2 / 1.5) < 1e-5  # K / (1 + alpha): an untrained adapter counts as alpha
        assert relative(got[3], svc_reference(alike, 3, dense(result)[3], 0.0)) < DIGITS[dtype]
    nobody = dataclasses.replace(alike, weights=0 * alike.weights)
    assert bool(torch.isfinite(dense(svc.svc(nobody.weighted_sum(), nobody, None))).all())


def test_svc_in_float64_loses_no_digits_to_near_dependence() -> None:
    stack = make((4, 4), out=40, inside=30)
    near = stack.B[0] + 1e-4 * stack.B[1]
    alike = stack.with_factors(stack.A, (stack.B[0], near))
    merged = alike.weighted_sum()
    got = dense(svc.svc(merged, alike, None))
    for module in range(2):
        assert relative(got[module], svc_reference(alike, module, dense(merged)[module], 0.0, keep=8)) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svc_scales_with_the_adapters(dtype: torch.dtype) -> None:
    stack = make((3, 2, 4), dtype=dtype, weights=(0.5, 0.3, 0.4))
    tiny = stack.with_factors(stack.A, stack.B, 1e-7 * stack.scaling)
    got = dense(svc.svc(tiny.weighted_sum(), tiny, None))
    assert relative(1e7 * got, dense(svc.svc(stack.weighted_sum(), stack, None))) < DIGITS[dtype]


def test_svc_in_float64_bears_an_awkward_gauge() -> None:
    stack = make((2, 2), weights=(0.5, 0.4))
    skew = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-7]], dtype=torch.float64)
    odd = stack.with_factors([skew @ a for a in stack.A], [b @ torch.linalg.inv(skew) for b in stack.B])
    merged = stack.weighted_sum()
    assert relative(dense(svc.svc(merged, odd, None)), dense(svc.svc(merged, stack, None))) < 1e-7


def test_svc_on_a_large_dense_result_keeps_twice_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svc, "_WHOLE", 16)
    stack = make((3, 2, 4), modules=2, out=60, inside=50, weights=(0.5, 0.3, 0.4))
    low = stack.weighted_sum()
    exact = dense(svc.svc(low, stack, 5))
    all_there = svc.svc(low.dense(), stack, 5)  # rank 9 < 10
    assert isinstance(all_there, LowRank) and all_there.rank == 10
    assert relative(dense(all_there), exact) < 1e-6
    spread = low.dense() + 1e-3 * torch.randn(2, 60, 50, generator=generator(3), dtype=torch.float64)
    got = svc.svc(spread, stack, 3)
    assert isinstance(got, LowRank) and got.rank == 6
    empty = torch.stack([spread[0], torch.zeros_like(spread[1])])
    assert relative(dense(svc.svc(empty, stack, 3))[0], dense(got)[0]) < 1e-9
    assert float(dense(svc.svc(empty, stack, 3))[1].abs().max()) == 0
    for module in range(2):
        assert relative(dense(got)[module], svc_reference(stack, module, spread[module], 0.0, keep=6)) < 1e-6
    assert isinstance(svc.svc(spread, stack, None), Tensor)  # no cut: nothing is left out


def test_svc_works_on_a_result_that_is_not_a_sum() -> None:
    stack = make((3, 2, 4))
    odd = LowRank(torch.relu(stack.A[0]), stack.B[0] + 0.5 * stack.B[2][:, :, :3])
    got = dense(svc.svc(odd, stack, 3, alpha=0.1))
    for module in range(2):
        assert relative(got[module], svc_reference(stack, module, dense(odd)[module], 0.1)) < 1e-9


# -- as parts ----------------------------------------------------------------------------------------------------------


def test_plugins_say_when_they_run_and_what_they_take() -> None:
    assert pico.PLUGIN.when == "before" and svc.PLUGIN.when == "after"
    assert str(pico.PLUGIN) == "pico(restore=True, target=mean, spectrum=B)"
    assert svc.PLUGIN(alpha=1).values == {"alpha": 1.0}
    with pytest.raises(LoralloyError, match=r"alpha -0\.5 of svc is not valid; give a number of at least 0"):
        svc.PLUGIN(alpha=-0.5)
    with pytest.raises(LoralloyError, match="target 'median' of pico is not valid"):
        pico.PLUGIN(target="median")
