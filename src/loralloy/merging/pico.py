"""pico: before any rule, turn down output directions that the adapters share; after it, give the result its size back."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import torch
from torch import Tensor

from ..factors import widest
from .rule import Param, Plugin
from .stack import LowRank, Stack, gram

Target: TypeAlias = Literal["mean", "weights", "each"]
Counted: TypeAlias = Literal["B", "dW"]

RESTORE = Param("rescale after the merge, so that calibration does not make the update weaker")
TARGET = Param(
    "what the norm is restored to: the mean of the adapters' norms whatever their weights (mean, the paper's), the sum of "
    "|weight| * norm (weights, the same at weights 1/T), or each adapter to its own norm before the merge (each, as the "
    "authors' tool for folders does)"
)
SPECTRUM = Param(
    "what says how much a direction is shared: the stacked B (the paper's; depends on how dW is split into B and A) or the "
    "stacked dW (does not)"
)
_NOTHING = 1e-5  # of the parts: a merged update this small is what rounding left of a cancellation


def pico(
    stack: Stack,
    *,
    restore: Annotated[bool, RESTORE] = True,
    target: Annotated[Target, TARGET] = "mean",
    spectrum: Annotated[Counted, SPECTRUM] = "B",
) -> Stack:
    """[B_1 ... B_T] = U S V^T, s_j = sigma_j^2 / sum_k sigma_k^2, alpha_j = 1 / (1 + (T - 1) s_j);

    B'_t = (I + U diag(alpha - 1) U^T) B_t, A_t as it is; merge; dW = gamma dW', gamma = mean_t ||dW_t||_F / ||dW'||_F.

    Tang and Yang 2026, "Crowded in B-Space" (arXiv 2604.16826), sections 4.1 and 4.2; by module, alpha / r in B. dW' is
    the merged update of the calibrated adapters, before any cut to a rank. T counts the adapters that have the module and
    a weight other than 0. With one, nothing is changed. Weights play no part in the calibration, and with target=mean
    only their ratios count, for the restored norm is theirs no more: target=weights keeps it.

    The operator is (I + (T - 1) C C^T / ||C||_F^2)^-1 with C = [B_1 ... B_T], so that B' = B (I + c H G)^-1 with
    G = B^T B and H the squared scalings: no SVD, a solve of T r equations whose condition is at most T.
    """
    _, count = _present(stack)
    widths = list(stack.ranks)
    b_all = torch.cat([b.to(stack.dtype) for b in stack.B], 2)
    g = gram(b_all)
    h_g = _counted(stack, g, spectrum)
    total = h_g.diagonal(dim1=-2, dim2=-1).sum(-1)
    c = torch.where(total > 0, (count - 1) / torch.where(total > 0, total, 1.0), 0.0)
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    m = torch.linalg.solve(eye + c[:, None, None] * h_g, eye.expand_as(g))
    calibrated = list(torch.split(b_all @ m.to(stack.dtype), widths, 2))
    if restore and target == "each":
        was = _norms(stack, _diagonal(g, widths))
        now = _norms(stack, _diagonal(m.mT @ g @ m, widths))
        factor = torch.where(now > 0, was / torch.where(now > 0, now, 1.0), 1.0).to(stack.dtype)
        calibrated = [b * f[:, None, None] for b, f in zip(calibrated, factor, strict=True)]
    return stack.with_factors(stack.A, calibrated)


def finish(
    result: LowRank | Tensor, stack: Stack, *, restore: bool = True, target: Target = "mean", spectrum: Counted = "B"
) -> LowRank | Tensor:
    """The merged update at its restored norm; `stack` is the original one, the other arguments those of :func:`pico`.

    A module is left as it is where one adapter alone takes part and where the merged update is nothing but the rounding
    of adapters that cancel.
    """
    if not restore or target == "each":
        return result
    present, count = _present(stack)
    norms = _norms(stack, [gram(b) for b in stack.B])
    parts = (stack.weights.abs().to(norms) * norms).sum(0)
    wanted = parts if target == "weights" else (norms * present).sum(0) / count
    size = _size(result).to(norms)
    gamma = torch.where((count > 1) & (size > _NOTHING * parts), wanted / torch.where(size > 0, size, 1.0), 1.0)
    if isinstance(result, Tensor):
        return result * gamma.to(result.dtype)[:, None, None]
    root = gamma.sqrt().to(result.A.dtype)[:, None, None]
    return LowRank(result.A * root, result.B * root)


def _present(stack: Stack) -> tuple[Tensor, Tensor]:
    """Which adapters take part, [T, L], and how many, [L], at least 1."""
    wide = widest(stack.device)
    present = (stack.weights != 0).to(wide)
    return present, present.sum(0).clamp(min=1)


def _counted(stack: Stack, g: Tensor, spectrum: Counted) -> Tensor:
    """H G, [L, R, R]: H is block-diagonal, s_t^2 I (B) or s_t^2 A_t A_t^T (dW), and 0 for adapters of weight 0."""
    present, _ = _present(stack)
    squared = (stack.scaling.to(g) ** 2 * present)[:, :, None, None]
    rows = torch.split(g, list(stack.ranks), 1)
    if spectrum == "dW":
        rows = tuple(gram(a.mT) @ row for a, row in zip(stack.A, rows, strict=True))
    return torch.cat([s * row for s, row in zip(squared, rows, strict=True)], 1)


def _diagonal(g: Tensor, widths: list[int]) -> list[Tensor]:
    """The T blocks [L, r_t, r_t] on the diagonal."""
    rows = torch.split(g, widths, 1)
    return [torch.split(row, widths, 2)[t] for t, row in enumerate(rows)]


def _norms(stack: Stack, b_grams: list[Tensor]) -> Tensor:
    """||dW_t||_F from B_t^T B_t and A_t A_t^T, [T, L]."""
    squares = [(g * gram(a.mT)).sum((1, 2)).clamp(min=0) for g, a in zip(b_grams, stack.A, strict=True)]
    return torch.stack(squares).sqrt() * stack.scaling.abs().to(squares[0])


def _size(result: LowRank | Tensor) -> Tensor:
    """||dW||_F of each result, [L]."""
    if isinstance(result, Tensor):  # by rows first: no copy of dW in float64
        return result.norm(dim=2).to(widest(result.device)).norm(dim=1)
    return (gram(result.B) * gram(result.A.mT)).sum((1, 2)).clamp(min=0).sqrt()


PLUGIN = Plugin(
    "pico",
    pico,
    "turn down output directions that the adapters share, then restore the update's norm",
    "many adapters of different tasks that write into the same few output directions",
    "Tang and Yang 2026 (arXiv 2604.16826)",
    when="before",
    finish=finish,
)
