"""tsv_m: every adapter's singular directions, made orthogonal to those of the others, added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch

from .rule import Param, Rule
from .stack import LowRank, Stack
from .subspace import lifted, polar, triplets, weighted


def tsv_m(
    stack: Stack,
    *,
    keep: Annotated[
        float,
        Param("fraction of each adapter's singular directions that is kept, the strongest (at least one)", 0, 1, True),
    ] = 1.0,
) -> LowRank:
    """dW = U_p diag(s) V_p^T, with dW_i ~ U_i diag(s_i) V_i^T its strongest directions and U = [U_1 ... U_T], V likewise.

    U_p = P Q^T of the SVD U = P S Q^T is the nearest matrix with orthonormal columns (orthogonal Procrustes); s holds the
    w_i s_i of all. Gargiulo et al., "Task Singular Vectors", CVPR 2025 (arXiv 2412.00081), section 4.2 (TSV-Merge).

    Unlike the paper's code: weights (w_i scales s_i, its sign too) and alpha / r; `keep` of an adapter's own r directions
    where the code takes min(out, in) / T of dW's, which for LoRA are mostly null vectors that then bend the others; columns
    that are dependent share what is common to them, where the code completes them with arbitrary ones. A function of
    singular subspaces: computed in the lossless core it is the same dW, so "core" and "delta" agree.
    Adapters that are nearly equal, but not to rounding, get their differences raised to full strength: that is the method.
    """
    t = triplets(stack)
    counts = _counts(stack.ranks, keep)
    strengths = weighted(stack, t.s)
    live = [s != 0 for s in strengths]
    u, v = (
        torch.cat([torch.where(on[:, None], x, 0.0)[:, :, :k] for x, on, k in zip(side, live, counts, strict=True)], 2)
        for side in (t.u, t.v)
    )
    s = torch.cat([x[:, :k] for x, k in zip(strengths, counts, strict=True)], 1)
    return lifted(t, polar(u, stack.dtype), s, polar(v, stack.dtype), stack.dtype)


def _counts(ranks: Sequence[int], keep: float) -> list[int]:
    """How many directions of each adapter are kept."""
    return [max(1, math.floor(keep * r + 1e-9)) for r in ranks]


RULE = Rule(
    "tsv_m",
    tsv_m,
    "make the adapters' singular directions orthogonal to each other, add",
    "many adapters of different tasks whose directions overlap; adapters that are not near-copies of each other",
    "Gargiulo et al. 2025 (arXiv 2412.00081)",
    acts_on="stack",
    spaces=("delta", "core"),
    width=lambda ranks, shape, keep: sum(_counts(ranks, keep)),
)
