"""Orthogonal columns by Cholesky of the Gram matrix: two products and a triangular solve where QR takes Householder steps.

That squares the condition number; both say how near the columns came to being dependent, and callers then take QR.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .stack import gram

DEPENDENT = 1e-5  # smallest Cholesky pivot of the correlation matrix; its square root's error is then below 1e-6


def gram_root(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R with R^T R = B^T B, upper triangular [L, R, R]; R^-1; and which modules are sound [L].

    The Gram matrix is scaled to ones on its diagonal first; a column of zeros keeps a zero column in R.
    """
    g = gram(b)
    size = g.diagonal(dim1=-2, dim2=-1).sqrt()
    dead = size == 0
    unit = torch.where(dead, 1.0, size)
    g = g / (unit[:, :, None] * unit[:, None])
    g.diagonal(dim1=-2, dim2=-1).masked_fill_(dead, 1.0)
    low, info = torch.linalg.cholesky_ex(g)
    pivots = low.diagonal(dim1=-2, dim2=-1)
    good = (info == 0) & (pivots.min(-1).values > DEPENDENT)
    low = torch.where(good[:, None, None], low, torch.eye(low.shape[-1], dtype=low.dtype, device=low.device))
    eye = torch.diag_embed(1 / unit)
    inverse = torch.linalg.solve_triangular(
        low.mT, torch.eye(low.shape[-1], dtype=low.dtype, device=low.device), upper=True
    )
    return low.mT * size[:, None], eye @ inverse, good


def orthonormal(x: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of x's columns [L, n, k] by Cholesky of the Gram matrix, and its smallest scaled pivot [L].

    Pivots of 1 are orthogonal columns; where the smallest is not above DEPENDENT (0 if Cholesky failed), x comes back.
    """
    g = x.mT @ x
    low, info = torch.linalg.cholesky_ex(g)
    pivots = low.diagonal(dim1=-2, dim2=-1) / g.diagonal(dim1=-2, dim2=-1).sqrt()
    pivot = torch.where(info == 0, pivots.amin(-1), 0.0).nan_to_num_(0.0)
    eye = torch.eye(low.shape[-1], dtype=low.dtype, device=low.device)
    low = torch.where((pivot > DEPENDENT)[:, None, None], low, eye)
    return torch.linalg.solve_triangular(low.mT, x, upper=True, left=False), pivot
