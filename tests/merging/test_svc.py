"""SVC against a plain dense reference in float64, written from the paper's algorithm one module at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_scenes import DIGITS, STACKS, WEIGHTS, dense, make, parts, picked, regauged, weighted
from tests.helpers import generator, relative
from torch import Tensor

from loralloy.merging import svc
from loralloy.merging.stack import LowRank, Stack


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
