"""Iso-CTS of adapters that cancel, in float32: another order of the adapters, the same dW."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers import generator, relative
from loralloy.merging.iso_cts import RULE as ISO_CTS
from loralloy.merging.stack import Stack


def near_copies(weights, difference, ranks=2, falls=4.4, seed=165, dtype=torch.float32):
    """Adapters that share A and differ in B by `difference`, with singular values that fall by `falls` powers of ten."""
    g = generator(seed)
    b, a = torch.randn(1, 128, ranks, generator=g), torch.randn(1, ranks, 96, generator=g)
    falling = torch.logspace(0, -falls, ranks)
    each = [(b + difference * torch.randn(b.shape, generator=g)) * falling for _ in weights]
    ones, n = torch.ones(len(weights), 1, dtype=torch.float64), len(weights)
    w = torch.tensor(weights, dtype=torch.float64)[:, None]
    return Stack((a.to(dtype),) * n, tuple(x.to(dtype) for x in each), ones, w, torch.arange(n)[:, None])


def ordered(stack, order):
    picked = [tuple(side[i] for i in order) for side in (stack.A, stack.B)]
    return Stack(*picked, stack.scaling[list(order)], stack.weights[list(order)], stack.keys[list(order)])


@pytest.mark.parametrize("common", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("difference", [1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("weights", [(1.0, -0.5), (0.7, -0.4, 2.0), (1.0, -0.9, -0.2)])
def test_order_does_not_matter_where_adapters_cancel(weights, difference, common):
    stack = near_copies(weights, difference)
    rule = ISO_CTS(common=common)
    want = rule.function(stack, **rule.values).dense()
    assert float(want.norm()) > 0
    for order in itertools.permutations(range(len(weights))):
        got = rule.function(ordered(stack, order), **rule.values)
        assert relative(got.dense(), want) < 1e-5
        # the reason: no pair of directions is much larger than their sum
        pairs = torch.linalg.vector_norm(got.A, dim=2) * torch.linalg.vector_norm(got.B, dim=1)
        assert float(pairs.square().sum().sqrt()) < 20 * float(want.norm())


def test_modules_that_cancel_leave_the_others_alone():
    two = near_copies((1.0, -0.5), 1e-5)
    plain = Stack(
        two.A, (two.B[0], torch.randn(two.B[1].shape, generator=generator(1))), two.scaling, two.weights, two.keys
    )
    both = Stack(
        tuple(torch.cat([x, y]) for x, y in zip(two.A, plain.A, strict=True)),
        tuple(torch.cat([x, y]) for x, y in zip(two.B, plain.B, strict=True)),
        *(torch.cat([x, y], 1) for x, y in ((two.scaling, plain.scaling), (two.weights, plain.weights))),
        torch.cat([two.keys, plain.keys], 1),
    )  # fmt: skip
    rule = ISO_CTS(common=0.3)
    got = rule.function(both, **rule.values).dense()
    for i, alone in enumerate((two, plain)):
        assert relative(got[i], rule.function(alone, **rule.values).dense()[0]) < 1e-5
