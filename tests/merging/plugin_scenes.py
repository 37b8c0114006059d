"""Stacks of adapters that share directions, for the plug-ins."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st
from tests.helpers import generator
from torch import Tensor

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
