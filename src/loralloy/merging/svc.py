"""svc: after any rule, bring singular values that shared directions have inflated back to the adapters' own scale."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..factors import widest
from .cholesky import gram_root
from .cut import cut_dense, top_eigen
from .rule import Param, Plugin
from .stack import LowRank, Stack, gram

ALPHA = Param(
    "the least that a projection coefficient counts as: 1 only shrinks, less also lifts directions that the merge made "
    "weak; 0 stands for 1/K with K adapters, the paper's",
    0,
)
_WHOLE = 512  # the smaller side up to which every direction of a dense result is found
_NOTHING = 256  # roundings: an adapter this small in a direction, against its norm, has nothing there


def svc(
    result: LowRank | Tensor, stack: Stack, rank: int | None = None, *, alpha: Annotated[float, ALPHA] = 0.0
) -> LowRank | Tensor:
    """dW = U S V^T; a^r = u_r^T dW, a_i^r = u_r^T dW_i; s_i^r = <a^r, a_i^r> / ||a_i^r||^2;

    gamma_r = K / sum_i max(alpha, s_i^r); sigma_r becomes gamma_r sigma_r.

    Li et al. 2026, "When Shared Knowledge Hurts" (arXiv 2602.05536), equations 4 and 8, algorithm 1. K counts the
    adapters that have the module and a weight other than 0; with one, nothing is changed. dW_i is the adapter's own
    update, without its weight: weights show in dW alone. An adapter of negative weight is compared with -dW_i. An adapter
    that has nothing in a direction, up to rounding, has s_i^r = 0 there, so it counts as alpha, as in the authors' code
    (github.com/lyymuwu/SVC), whose script takes alpha = 1/K, but 1 after TSV-M.

    Low-rank results are calibrated in all of their directions, through the QR of B. So are dense results up to 512 wide
    and those that are not cut; of larger ones, only the first 2 * rank directions are found, calibrated and kept.
    Where singular values are equal, as iso_c makes them, their directions are not unique, and neither is the result.

    Args:
        result: what the rule made, low-rank or dW [L, out, in].
        stack: the adapters, before any plug-in.
        rank: what the result will be cut to; None for no cut.
    """
    if isinstance(result, Tensor):
        u, found_all = _dense_directions(result, rank)
        response = u.mT @ result
        gamma = _factors(u, response, stack, alpha)[:, None].to(u)
        if found_all:
            return (u * gamma) @ response
    else:
        wide = widest(result.A.device)
        wider = LowRank(result.A.to(wide), result.B.to(wide))
        u = _directions(wider, exact=result.A.dtype == wide)
        response = (u.mT @ wider.B) @ wider.A
        gamma = _factors(u, response, stack, alpha)[:, None].to(u)
    dtype = result.dtype if isinstance(result, Tensor) else result.A.dtype
    sigma = response.norm(dim=2)[:, None]  # half of each new singular value goes to each side
    root = (gamma * sigma).sqrt()
    a = response * (gamma / torch.where(root > 0, root, 1.0)).mT
    return LowRank(a.to(dtype), (u * root).to(dtype))


def _directions(f: LowRank, exact: bool) -> Tensor:
    """Left singular vectors of each dW, [L, out, q], q = min(rank, out, in); `exact` to all of the dtype's digits."""
    q = min(f.rank, f.B.shape[1], f.A.shape[2])
    if exact:  # Gram matrices would halve them
        return _careful(f)[:, :, :q]
    r_b, inverse, good = gram_root(f.B)
    core = r_b @ gram(f.A.mT) @ r_b.mT
    _, vectors = top_eigen((core + core.mT) / 2, q)
    u = f.B @ (inverse @ vectors)
    bad = (~good).nonzero().flatten()
    if len(bad):
        u[bad] = _careful(LowRank(f.A[bad], f.B[bad]))[:, :, :q]
    return u


def _careful(f: LowRank) -> Tensor:
    """The same by Householder QR of both factors, whatever their condition."""
    q_b, r_b = torch.linalg.qr(f.B)
    r_a = torch.linalg.qr(f.A.mT, mode="r").R
    return q_b @ torch.linalg.svd(r_b @ r_a.mT, full_matrices=False).U


def _dense_directions(d: Tensor, rank: int | None) -> tuple[Tensor, bool]:
    """Left singular vectors of d [L, out, in], [L, out, q], and whether they are all of them."""
    small = min(d.shape[1:])
    if rank is None or small <= _WHOLE or 2 * rank >= small:
        return torch.linalg.svd(d, full_matrices=False).U, True
    b = cut_dense(d, 2 * rank).result.B  # orthogonal columns
    size = b.norm(dim=1, keepdim=True)
    return b / torch.where(size > 0, size, 1.0), False


def _factors(u: Tensor, response: Tensor, stack: Stack, alpha: float) -> Tensor:
    """gamma [L, q] for directions u [L, out, q] with the merged responses u^T dW [L, q, in]."""
    signs = stack.weights.sign().to(u)
    count = signs.abs().sum(0)  # [L]
    floor = (torch.full_like(count, alpha) if alpha else 1 / count.clamp(min=1))[:, None]
    nothing = (_NOTHING * torch.finfo(stack.dtype).eps) ** 2
    total = torch.zeros_like(response[:, :, 0])
    scaled = [b.to(u) * s[:, None, None] for b, s in zip(stack.B, stack.scaling.to(u), strict=True)]
    inputs = [a.to(u) for a in stack.A]
    lefts = torch.split(u.mT @ torch.cat(scaled, 2), list(stack.ranks), 2)  # a_i^r = left @ A_i
    wider = torch.finfo(u.dtype).eps < torch.finfo(stack.dtype).eps
    if wider:  # inner products in r-space: Gram matrices have digits to spare
        inner = torch.split(response @ torch.cat(inputs, 1).mT, list(stack.ranks), 2)
    for i, (left, a, sign) in enumerate(zip(lefts, inputs, signs, strict=True)):
        if wider:
            size, both = ((left @ (a @ a.mT)) * left).sum(2), (inner[i] * left).sum(2)
        else:
            own = left @ a
            size, both = own.square().sum(2), (response * own).sum(2)
        whole = (gram(scaled[i]) * gram(a.mT)).sum((1, 2)).to(u)
        there = size > nothing * whole[:, None]
        along = torch.where(there, both / torch.where(there, size, 1.0), 0.0) * sign[:, None]
        total += torch.maximum(along, floor) * sign.abs()[:, None]
    return torch.where(count[:, None] > 1, count[:, None] / torch.where(total > 0, total, 1.0), 1.0)


PLUGIN = Plugin(
    "svc",
    svc,
    "rescale singular values that the adapters' shared directions have inflated",
    "a plain sum of adapters that overlap; adds little after tsv_m",
    "Li et al. 2026 (arXiv 2602.05536)",
    when="after",
)
