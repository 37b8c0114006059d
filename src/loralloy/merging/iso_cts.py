"""iso_cts: common directions of the sum and each adapter's own, orthogonal, all of equal strength."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from .iso_c import DIRECTIONS, MEAN, Mean, width
from .rule import Param, Rule
from .stack import LowRank, Stack
from .subspace import lifted, polar, raised, summed, triplets, weighted, zero

_CANCELS = 0.1  # of the norm that the columns would have without it: a float32 keeps six digits there


def iso_cts(
    stack: Stack,
    *,
    common: Annotated[float, Param("fraction of the directions that is taken from the sum", 0, 1)] = 0.8,
    directions: Annotated[int, DIRECTIONS] = 0,
    mean: Annotated[Mean, MEAN] = "rank",
) -> LowRank:
    """dW = m U_p V_p^T over r directions: k of the sum, and n = (r - k) / T of each adapter from what the sum's lack.

    U_k, V_k: the k strongest directions of sum_i w_i dW_i; for each adapter the n strongest of (I - U_k U_k^T) w_i dW_i.
    U_p and V_p are these, side by side, made orthonormal (U_p = P Q^T of U = P S Q^T); m is the mean of all their singular
    values. Marczak et al., "No Task Left Behind", ICML 2025 (arXiv 2502.04959), section 4.2 (Iso-CTS).

    Splits as in the paper's code: k0 = floor(common r), n = round((r - k0) / T), k = r - n T (but n T <= r). Unlike the code,
    r is the sum of the ranks (at most min(out, in)) of the adapters that are not zero in the module, which are the T, where
    the code takes min(out, in): for LoRA that would be mostly null vectors. Directions that are null are left out, also of
    the mean (see `mean`). A function of singular subspaces: in the lossless core it is the same dW, so "core" and "delta"
    agree. The spectrum is flat: for a result of rank k set `directions=k`, as for `iso_c`.
    """
    t = triplets(stack)
    strengths = weighted(stack, t.s)
    here = torch.stack([s[:, 0] != 0 for s in strengths])  # [T, L]
    ranks = torch.tensor(stack.ranks, device=stack.device, dtype=strengths[0].dtype)
    r = (ranks[:, None] * here).sum(0).clamp(max=min(stack.shape))
    if directions:
        r = r.clamp(max=directions)
    tasks = here.sum(0).clamp(min=1).to(r.dtype)
    own = torch.minimum(((r - (common * r + 1e-9).floor()) / tasks).round(), (r / tasks).floor())
    shared = r - own * tasks

    total = summed(stack, t)
    on = total.live & _first(total.s.shape[1], shared)
    u_k = torch.where(on[:, None], total.u, 0.0)
    us, ss, vs = [u_k], [torch.where(on, total.s, 0.0)], [torch.where(on[:, None], total.v, 0.0)]
    for u, s, v in zip(t.u, strengths, t.v, strict=True):
        rest = (u - u_k @ (u_k.mT @ u)) * s[:, None]
        q, small = torch.linalg.qr(rest)  # of r_i columns: faster than an SVD of them
        p, values, vh = torch.linalg.svd(small)
        on = (values > raised(stack.dtype) * s[:, :1].abs()) & _first(s.shape[1], own)
        us.append(torch.where(on[:, None], q @ p, 0.0))
        ss.append(torch.where(on, values, 0.0))
        vs.append(torch.where(on[:, None], v @ vh.mT, 0.0))

    s = torch.cat(ss, 1)
    most = width(stack.ranks, stack.shape, directions=directions)  # r is at most this, and at most r are not zero
    first = (s == 0).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    u, v = (torch.cat(side, 2).gather(2, first[:, None].expand(-1, side[0].shape[1], -1)) for side in (us, vs))
    s = s.gather(1, first)
    live = s > 0
    over = live.sum(1).clamp(min=1) if mean == "rank" else torch.full_like(s[:, 0], min(stack.shape))
    level = torch.where(live, (s.sum(1) / over)[:, None], 0.0)
    return lifted(t, *_uncancelled(polar(u, stack.dtype), level, polar(v, stack.dtype), stack.dtype), stack.dtype)


def _uncancelled(u: Tensor, s: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """u diag(s) v^T [L, R, k], [L, k], [L, R, k]; where its columns cancel, as its own singular triplets."""
    size = ((u.mT @ u) * (v.mT @ v) * s[:, :, None] * s[:, None]).sum((1, 2))  # ||u diag(s) v^T||_F^2
    bad = (size < _CANCELS**2 * s.square().sum(1)).nonzero().flatten()
    if not len(bad):
        return u, s, v
    k = s.shape[1]
    p, values, qh = torch.linalg.svd((u[bad] * s[bad, None]) @ v[bad].mT)
    own = values > zero(dtype) * values[:, :1]
    u, s, v = u.clone(), s.clone(), v.clone()
    u[bad], s[bad], v[bad] = p[:, :, :k], torch.where(own, values, 0.0)[:, :k], qh.mT[:, :, :k]
    return u, s, v


def _first(n: int, count: Tensor) -> Tensor:
    """[L, n]: which of n columns are among the first `count` [L]."""
    return torch.arange(n, device=count.device) < count[:, None]


RULE = Rule(
    "iso_cts",
    iso_cts,
    "strong directions of the sum and each adapter's own beside them, all made equally strong",
    "as iso_c, where many different tasks would lose the directions that only they have",
    "Marczak et al. 2025 (arXiv 2502.04959)",
    acts_on="stack",
    spaces=("delta", "core"),
    default_rank="full",
    width=width,
)
