"""Pico against a plain dense reference in float64, written from the paper's formulas one module at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_scenes import DIGITS, STACKS, WEIGHTS, dense, make, parts, picked, regauged, weighted
from tests.helpers import generator, relative
from torch import Tensor

from loralloy.errors import LoralloyError
from loralloy.merging import pico, svc
from loralloy.merging.stack import LowRank, Stack


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
    seen = plugin.function(stack, **plugin.values)
    assert plugin.finish is not None
    return plugin.finish(seen.weighted_sum(), stack, **plugin.values)


@settings(max_examples=60, deadline=None)
@given(stack=STACKS, values=WEIGHTS, spectrum=st.sampled_from(["B", "dW"]))
def test_pico_calibrates_as_the_formula_says(stack: Stack, values: list[float], spectrum: str) -> None:
    stack = weighted(stack, values)
    seen = pico.pico(stack, spectrum=spectrum)
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
    seen = plugin.function(stack, **plugin.values)
    from_dense = pico.finish(seen.weighted_sum().dense(), stack, **plugin.values)
    for module in range(stack.modules):
        want = pico_merged_reference(stack, module, target)
        assert relative(got[module], want) < DIGITS[stack.dtype]
        assert relative(dense(from_dense)[module], want) < DIGITS[stack.dtype]


def test_pico_without_restoring_lies_between_a_tth_and_the_whole() -> None:
    stack = make()
    seen = pico.pico(stack, restore=False)
    for module in range(stack.modules):
        for was, now in zip(parts(stack, module), parts(seen, module), strict=True):
            assert was.norm() / stack.adapters < now.norm() < was.norm()
    merged = seen.weighted_sum()
    assert pico.finish(merged, stack, restore=False) is merged


@pytest.mark.parametrize("target", ["mean", "weights", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pico_leaves_one_adapter_as_it_is(target: str, dtype: torch.dtype) -> None:
    stack = make((4,), weights=(0.3,), dtype=dtype)
    seen = pico.pico(stack, target=target)
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
    seen = pico.pico(stack)
    for was, now in zip(stack.B, seen.B, strict=True):  # every s_j is 1 / (T r)
        assert relative(now, was / (1 + 2 / 6)) < 1e-12
    got, plain = dense(pico_merge(stack)), dense(stack.weighted_sum())
    for module in range(3):
        mean = sum(float(x.norm()) for x in parts(stack, module)) / 3
        assert relative(got[module], plain[module] * mean / plain[module].norm()) < 1e-12


def test_pico_brings_one_direction_of_all_adapters_to_a_tth_and_back() -> None:
    stack = make((1, 1, 1))
    stack = stack.with_factors((stack.A[0],) * 3, (stack.B[0],) * 3, torch.ones_like(stack.scaling))
    seen = pico.pico(stack)
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
    seen = pico.pico(stack)
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


# -- as parts ----------------------------------------------------------------------------------------------------------


def test_plugins_say_when_they_run_and_what_they_take() -> None:
    assert pico.PLUGIN.when == "before" and svc.PLUGIN.when == "after"
    assert str(pico.PLUGIN) == "pico(restore=True, target=mean, spectrum=B)"
    assert svc.PLUGIN(alpha=1).values == {"alpha": 1.0}
    with pytest.raises(LoralloyError, match=r"alpha -0\.5 of svc is not valid; give a number of at least 0"):
        svc.PLUGIN(alpha=-0.5)
    with pytest.raises(LoralloyError, match="target 'median' of pico is not valid"):
        pico.PLUGIN(target="median")
