"""Singular subspaces of a stack in r-space: what the spectral rules and the aligned spaces are made of.

With orthonormal Q_b of all [B_1 ... B_T] and Q_a of all [A_1; ...; A_T]^T every dW_i is Q_b (X_i Y_i^T) Q_a^T, and a rule that
only knows singular vectors and values works on the small X_i, Y_i: O((out + in) R^2 + R^3) for R = sum_i r_i, dW is never
formed. Small matrices are float64.

Two relative limits say what a direction is (eps of the dtype that is computed in: float32, or float64 for float64 adapters):
ZERO, eps^0.8 (3e-6; 3e-13): a singular value below it is rounding, its direction is left out everywhere.
RAISED, eps^(2/3) (2e-5; 4e-11): where a rule raises weak directions to the strength of others (an orthogonalisation, a flat
spectrum), one below it is left out: rounding the input (eps) can have turned it by eps^(1/3), 0.005 rad in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..factors import widest
from .cholesky import gram_root
from .stack import LowRank, Stack

_DEPENDENT = 1e-10  # columns of unit length: a direction in which they have less is left out of the basis


def zero(dtype: torch.dtype) -> float:
    """ZERO, as above."""
    return float(torch.finfo(dtype).eps ** 0.8)


def raised(dtype: torch.dtype) -> float:
    """RAISED, as above."""
    return float(torch.finfo(dtype).eps ** (2 / 3))


@dataclass(frozen=True)
class Span:
    """Columns x = Q @ r with Q = x @ inverse orthonormal (or zero, where the columns are dependent); Q is not kept.

    Attributes:
        x: [L, n, R], as given.
        r, inverse: [L, R, R], float64.
        careful: how many modules were too dependent for Cholesky and took Householder QR.
    """

    x: Tensor
    r: Tensor
    inverse: Tensor
    careful: int

    def lift(self, small: Tensor) -> Tensor:
        """Q @ small for small [L, R, k]: [L, n, k], float64."""
        return self.x.to(small.dtype) @ (self.inverse @ small)


def span(x: Tensor) -> Span:
    """An orthonormal basis of x's columns: by Cholesky of the Gram matrix, or by QR of modules for which that loses digits.

    float64 columns always take QR: a Gram matrix would halve their digits.
    """
    modules, n, width = x.shape
    if x.dtype == torch.float64 or width > n:
        return Span(x, *_careful(x), modules)
    r, inverse, good = gram_root(x)
    bad = (~good).nonzero().flatten()
    if len(bad):
        r, inverse = r.clone(), inverse.clone()
        r[bad], inverse[bad] = _careful(x[bad])
    return Span(x, r, inverse, len(bad))


def _careful(x: Tensor) -> tuple[Tensor, Tensor]:
    """r and inverse by Householder QR and an SVD of R; directions that depend on others get zeros."""
    wide = x.to(widest(x.device))
    size = torch.linalg.vector_norm(wide, dim=1)
    unit = torch.where(size > 0, size, 1.0)
    small = torch.linalg.qr(wide / unit[:, None], mode="r").R
    _, s, vh = torch.linalg.svd(small, full_matrices=False)
    live = (s > _DEPENDENT * s[:, :1]) & (s > 0)
    r = torch.where(live, s, 0.0)[:, :, None] * vh * size[:, None]  # a column of zeros stays one
    inverse = vh.mT * torch.where(live, 1 / torch.where(live, s, 1.0), 0.0)[:, None] / unit[:, :, None]
    missing = x.shape[2] - s.shape[1]  # ranks above the width
    return torch.nn.functional.pad(r, (0, 0, 0, missing)), torch.nn.functional.pad(inverse, (0, missing))


@dataclass(frozen=True)
class Triplets:
    """Singular triplets of every dW_i (alpha / r included, weights not) between common bases.

    dW_i = Q_left u_i diag(s_i) v_i^T Q_right^T, whatever gauge its factors were stored in.

    Attributes:
        left, right: the bases of all B and of all A^T.
        u, v: T tensors [L, R, r_i], orthonormal columns; float64.
        s: T tensors [L, r_i], descending; 0 below ZERO of the largest, and below eps of what B_i and A_i add up to.
    """

    left: Span
    right: Span
    u: list[Tensor]
    s: list[Tensor]
    v: list[Tensor]


def triplets(stack: Stack) -> Triplets:
    """The singular triplets of a stack's dW_i."""
    parts = stack.absorbed()
    left = span(torch.cat([p.B for p in parts], 2))
    right = span(torch.cat([p.A for p in parts], 1).mT)
    us, ss, vs = [], [], []
    for x, y in zip(left.r.split(list(stack.ranks), 2), right.r.split(list(stack.ranks), 2), strict=True):
        q_x, r_x = torch.linalg.qr(x)
        q_y, r_y = torch.linalg.qr(y)
        u, s, vh = torch.linalg.svd(r_x @ r_y.mT)
        terms = (torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1)).sum(1, keepdim=True)
        floor = torch.maximum(zero(stack.dtype) * s[:, :1], torch.finfo(stack.dtype).eps * terms)  # terms that cancel
        us.append(q_x @ u)
        ss.append(torch.where(s > floor, s, 0.0))
        vs.append(q_y @ vh.mT)
    return Triplets(left, right, us, ss, vs)


def weighted(stack: Stack, s: Sequence[Tensor]) -> list[Tensor]:
    """w_i s_i: the strengths of the triplets of w_i dW_i, with the weight's sign; T tensors [L, r_i]."""
    return [w.to(x.dtype)[:, None] * x for w, x in zip(stack.weights, s, strict=True)]


@dataclass(frozen=True)
class Summed:
    """The singular value decomposition of sum_i w_i dW_i between the bases of some triplets.

    Attributes:
        u, v: [L, R, n], n = min(R, out, in); float64.
        s: [L, n], descending.
        live: [L, n], which are directions that can be raised (above RAISED of the largest, and not what is left of
            adapters that cancel).
    """

    u: Tensor
    s: Tensor
    v: Tensor
    live: Tensor


def summed(stack: Stack, t: Triplets) -> Summed:
    """sum_i w_i dW_i."""
    strengths = weighted(stack, t.s)
    total = torch.cat([u * s[:, None] for u, s in zip(t.u, strengths, strict=True)], 2) @ torch.cat(t.v, 2).mT
    n = min(total.shape[1], *stack.shape)
    u, s, v = svd(total, stack.dtype)
    parts = torch.stack([torch.linalg.vector_norm(x, dim=1) for x in strengths]).amax(0)[:, None]
    live = (s > raised(stack.dtype) * s[:, :1]) & (s > zero(stack.dtype) * parts)
    return Summed(u[:, :, :n], s[:, :n], v[:, :, :n], live[:, :n])


def polar(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix with orthonormal columns that is nearest to x [L, m, n] (orthogonal Procrustes), P Q^T of x = P S Q^T.

    Directions that x lacks (below RAISED of the largest) stay out, so that equal columns share one direction and zero
    columns stay zero.
    """
    p, s, q = svd(x, dtype)
    return (p * (s > raised(dtype) * s[:, :1])[:, None]) @ q.mT


def svd(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V of float64 x [L, m, n], m >= n, for a computation in `dtype`; in float32, s and U are 0 below ZERO.

    For float32 from the eigenvectors of x^T x, 2 to 5 times faster: in float64 they tell s down to 1e-8 of the largest, and
    a direction at RAISED is right to 1e-6.
    """
    if dtype == torch.float64:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return u, s, vh.mT
    values, v = torch.linalg.eigh(x.mT @ x)
    s, v = values.clamp(min=0).sqrt().flip(-1), v.flip(-1)
    live = s > zero(dtype) * s[:, :1]
    return x @ v * torch.where(live, 1 / torch.where(live, s, 1.0), 0.0)[:, None], torch.where(live, s, 0.0), v


def lifted(t: Triplets, u: Tensor, s: Tensor, v: Tensor, dtype: torch.dtype) -> LowRank:
    """Q_left u diag(s) v^T Q_right^T as factors, the root of |s| on each side.

    Signs are fixed (the largest entry of each column of B is positive), so that equal input gives equal bytes.
    """
    root = s.abs().sqrt()[:, None]
    b = t.left.lift(u * root)
    a = t.right.lift(v * (root * torch.where(s < 0, -1.0, 1.0)[:, None]))
    sign = signs(b)
    return LowRank((a * sign).mT.to(dtype).contiguous(), (b * sign).to(dtype))


def signs(columns: Tensor) -> Tensor:
    """[L, 1, k]: -1 where a column's largest entry is negative, else 1."""
    top = columns.abs().argmax(1, keepdim=True)
    return torch.where(columns.gather(1, top) < 0, -1.0, 1.0).to(columns.dtype)
