"""Dense float64 references, written from the papers' formulas on dW itself; and random stacks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import generator
from loralloy.merging.entries import random_mask
from loralloy.merging.stack import Stack

WEIGHTS = (-1.5, -0.5, 0.3, 1.0, 2.0)


def make_stack(
    out: int = 11,
    inside: int = 9,
    ranks: Sequence[int] = (3, 2),
    modules: int = 2,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Stack:
    """Gaussian factors; a scaling and a weight of its own for each adapter and module."""
    g = generator(seed)
    a = tuple(torch.randn(modules, r, inside, generator=g, dtype=torch.float64).to(dtype) for r in ranks)
    b = tuple(torch.randn(modules, out, r, generator=g, dtype=torch.float64).to(dtype) for r in ranks)
    scaling = 0.2 + 2 * torch.rand(len(ranks), modules, generator=g, dtype=torch.float64)
    chosen = torch.tensor(weights or [WEIGHTS[(seed + i) % 5] for i in range(len(ranks))], dtype=torch.float64)
    keys = torch.arange(len(ranks) * modules).reshape(len(ranks), modules) * 2**33 + 5 * seed + 1
    return Stack(a, b, scaling, chosen[:, None].repeat(1, modules), keys)


@st.composite
def stacks(draw: st.DrawFn) -> Stack:
    """1 to 4 adapters of unequal ranks, which may be larger than the width, in 1 to 3 modules."""
    ranks = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    weights = [draw(st.sampled_from(WEIGHTS)) for _ in ranks]
    out, inside, modules = (draw(st.integers(*limits)) for limits in ((2, 14), (2, 14), (1, 3)))
    return make_stack(out, inside, ranks, modules, weights, draw(st.integers(0, 10**6)))


def deltas(stack: Stack, module: int) -> list[Tensor]:
    """s_i B_i A_i of one module."""
    return [
        float(s[module]) * b[module].double() @ a[module].double()
        for a, b, s in zip(stack.A, stack.B, stack.scaling, strict=True)
    ]


def weights_of(stack: Stack, module: int) -> list[float]:
    return stack.weights[:, module].tolist()


# -- spectral rules ----------------------------------------------------------------------------------------------------


def svd(x: Tensor, limit: float = 1e-9) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets of x that are not null."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    n = int((s > limit * s[0]).sum())
    return u[:, :n], s[:n], vh[:n].T


def orthogonal(x: Tensor, limit: float = 1e-9) -> Tensor:
    """The nearest matrix with orthonormal columns, on the directions that x has."""
    u, _, v = svd(x, limit)
    return u @ v.T


def tsv_m(dws: Sequence[Tensor], weights: Sequence[float], counts: Sequence[int]) -> Tensor:
    """U = [U_1 .. U_T], V = [V_1 .. V_T] of the k strongest triplets of each dW_i; U_p diag(w s) V_p^T."""
    parts = [svd(d) for d in dws]
    u = torch.cat([u[:, :k] for (u, _, _), k in zip(parts, counts, strict=True)], 1)
    v = torch.cat([v[:, :k] for (_, _, v), k in zip(parts, counts, strict=True)], 1)
    s = torch.cat([w * s[:k] for (_, s, _), k, w in zip(parts, counts, weights, strict=True)])
    return orthogonal(u) @ torch.diag(s) @ orthogonal(v).T


def iso_c(dws: Sequence[Tensor], weights: Sequence[float], directions: int = 10**9) -> Tensor:
    """mean(s) U V^T of the weighted sum, over its directions."""
    u, s, v = svd(sum(w * d for w, d in zip(weights, dws, strict=True)))
    u, s, v = u[:, :directions], s[:directions], v[:, :directions]
    return s.mean() * u @ v.T


def iso_cts(dws: Sequence[Tensor], weights: Sequence[float], r: int, common: float = 0.8) -> Tensor:
    """k common and n directions of each adapter, as the paper's code splits r; orthonormal, at their mean strength."""
    tasks = len(dws)
    n = min(round((r - int(r * common + 1e-9)) / tasks), r // tasks)
    k = r - n * tasks
    u, s, v = (x[..., :k] for x in svd(sum(w * d for w, d in zip(weights, dws, strict=True))))
    us, ss, vs = [u], [s], [v]
    for w, d in zip(weights, dws, strict=True):
        rest = w * d - u @ (u.T @ (w * d))
        p, values, q = torch.linalg.svd(rest, full_matrices=False)
        live = min(n, int((values > 1e-9 * abs(w) * torch.linalg.matrix_norm(d, 2)).sum()))
        us.append(p[:, :live]), ss.append(values[:live]), vs.append(q[:live].T)
    return torch.cat(ss).mean() * orthogonal(torch.cat(us, 1)) @ orthogonal(torch.cat(vs, 1)).T


# -- entrywise rules on tensors ----------------------------------------------------------------------------------------


def largest(x: Tensor, density: float) -> Tensor:
    """x with all but its int(density * n) largest magnitudes 0."""
    k = int(density * x.numel())
    kept = torch.zeros(x.numel(), dtype=torch.bool)
    kept[x.abs().flatten().topk(k).indices] = True
    return torch.where(kept.reshape(x.shape), x, 0.0)


def prune(xs: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    return sum(w * largest(x, density) for w, x in zip(weights, xs, strict=True))  # type: ignore[return-value]


def ties(xs: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim, elect the sign of the sum, add w x of those that agree and divide by how many they are."""
    x = torch.stack([largest(x, density) for x in xs])
    agree = x * torch.where(x.sum(0) >= 0, 1.0, -1.0) > 0
    w = torch.tensor(list(weights), dtype=x.dtype)[:, None, None]
    return (w * x * agree).sum(0) / agree.sum(0).clamp(min=1)


def dare(xs: Sequence[Tensor], weights: Sequence[float], density: float, keys: Tensor) -> Tensor:
    """Drop with the masks of the given keys [T], rescale, add."""
    total = torch.zeros_like(xs[0])
    for x, w, key in zip(xs, weights, keys, strict=True):
        total += w * x * random_mask(key[None], 0, x.numel(), density, 0).reshape(x.shape) / density
    return total


# -- aligned spaces ----------------------------------------------------------------------------------------------------


def knots(dws: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """U and s V_i^T of [dW_1 | .. | dW_T] = U s [V_1; ..; V_T]^T, null directions left out.

    An adapter of zeros has zeros, where the decomposition has rounding, whose signs TIES would count.
    """
    u, s, v = svd(torch.cat(list(dws), 1), 1e-11)
    return u, [s[:, None] * part.T * bool(d.any()) for part, d in zip(v.split(dws[0].shape[1]), dws, strict=True)]


def core(dws: Sequence[Tensor], ranks: Sequence[int]) -> tuple[Tensor, list[Tensor], Tensor]:
    """U, M_i = U^T dW_i V, V: U the left singular vectors of [B_1 .. B_T] and V the right ones of [A_1; ..; A_T].

    The factors are B_i = U_i sqrt(s_i) and A_i = sqrt(s_i) V_i^T, zeros where an adapter's rank is above its dW's.
    """
    parts = [svd(d) if bool(d.any()) else (d[:, :0], d.new_zeros(0), d.T[:, :0]) for d in dws]
    missing = [r - s.numel() for (_, s, _), r in zip(parts, ranks, strict=True)]
    b, a = (
        torch.cat(
            [torch.nn.functional.pad(p[side] * p[1].sqrt(), (0, m)) for p, m in zip(parts, missing, strict=True)], 1
        )
        for side in (0, 2)
    )
    u = torch.linalg.svd(b, full_matrices=False).U
    v = torch.linalg.svd(a, full_matrices=False).U
    return u, [u.T @ d @ v for d in dws], v
