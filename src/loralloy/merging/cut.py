"""Cuts to a rank, batched: exact in r-space for low-rank results, subspace iteration for dense ones.

Fast path for dW = B A of rank R: with B = Q R_b (Cholesky of the Gram matrix, float64), the eigenvectors V of the small
K = R_b (A A^T) R_b^T give the left singular vectors Q V of dW, so dW_k = (Q V_k)(V_k^T R_b A): two Gram matrices, one
Cholesky, one R x R eigenproblem and two products; Q itself is never formed. Where the columns of B are too nearly
dependent for that (near-duplicate adapters, ranks above the width), the module falls back to Householder QR.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LoralloyError
from ..factors import LoraFactors, truncate, widest
from .cholesky import DEPENDENT, gram_root, orthonormal
from .stack import LowRank, gram

_BATCH = 8  # eigh on a GPU takes matrices one by one; from here on block powers are faster
_STAGES, _ROUNDS, _SETTLED, _ABOVE, _ROUNDED = 64, 2, 1e-8, 1e-5, 1e-14
_STEADY, _FIRST, _SQUARINGS = 4e-3, 2, 7  # a smallest pivot that lets the power grow, and how far
_ROWS = 512
_RESIDUAL = 1e-4  # of the energy: below it the loss is measured on the residual itself


@dataclass(frozen=True)
class Cut:
    """A cut of L results: what is left, and squared Frobenius norms before it and of what it lost, float64 [L].

    `fallbacks` counts modules that the fast path gave up on.
    """

    result: LowRank
    total: Tensor
    lost: Tensor
    fallbacks: int = 0


def cut(f: LowRank, rank: int) -> Cut:
    """The best rank-`rank` approximation of each dW (Eckart-Young)."""
    k = min(rank, f.rank, f.B.shape[1], f.A.shape[2])
    dtype = f.A.dtype
    r_b, inverse, good = gram_root(f.B)
    core = r_b @ gram(f.A.mT) @ r_b.mT
    core = (core + core.mT) / 2
    total = _finite(core.diagonal(dim1=-2, dim2=-1).sum(-1))
    values, vectors = top_eigen(core, k)
    lost = (total - values.sum(-1)).clamp(min=0)
    balance = values.clamp(min=0).sqrt().sqrt()[:, None]  # sqrt(sigma) to each side
    safe = torch.where(balance > 0, balance, 1.0)
    wide = core.dtype
    b = (f.B.to(wide) @ (inverse @ vectors * balance)).to(dtype)
    a = ((vectors / safe).mT @ r_b @ f.A.to(wide)).to(dtype)
    bad = ~(good & torch.isfinite(lost))
    failed = bad.nonzero().flatten().tolist()
    for module in failed:
        exact, said = truncate(LoraFactors(f.A[module].to(wide), f.B[module].to(wide)), k)
        a[module], b[module] = exact.a.to(dtype), exact.b.to(dtype)
        total[module] = torch.linalg.matrix_norm(_core_norm(f, module)) ** 2
        lost[module] = total[module] * said**2
    return Cut(LowRank(a, b), total, lost, len(failed))


def _finite(total: Tensor) -> Tensor:
    """Raises LoralloyError where squared norms are not finite: eigensolvers would fail with less to say."""
    if not bool(torch.isfinite(total).all()):
        raise LoralloyError("dW overflows fp32 in the computation; its weights or factors are too large")
    return total


def spectrum(f: LowRank) -> Tensor:
    """Squared singular values of each dW, descending, float64 [L, min(R, out, in)]."""
    r_b, _, good = gram_root(f.B)
    core = r_b @ gram(f.A.mT) @ r_b.mT
    _finite(core.diagonal(dim1=-2, dim2=-1).sum(-1))
    found = torch.linalg.eigvalsh((core + core.mT) / 2).flip(-1).clamp(min=0)
    for module in (~good).nonzero().flatten().tolist():
        values = torch.linalg.svdvals(_core_norm(f, module)) ** 2
        found[module] = torch.nn.functional.pad(values, (0, found.shape[1] - values.numel()))
    return found[:, : min(f.rank, f.B.shape[1], f.A.shape[2])]


def _core_norm(f: LowRank, module: int) -> Tensor:
    """R_b R_a^T by QR, float64: it has the norm and the singular values of dW."""
    wide = gram(f.B[module : module + 1, :1]).dtype
    r_b = torch.linalg.qr(f.B[module].to(wide), mode="r").R
    r_a = torch.linalg.qr(f.A[module].to(wide).T, mode="r").R
    return r_b @ r_a.T


# -- eigenvectors ------------------------------------------------------------------------------------------------------


def top_eigen(k_matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues [L, k] (descending) and eigenvectors [L, n, k] of symmetric positive [L, n, n].

    On a GPU, for many matrices: block powers, whose values are Rayleigh quotients of a basis of the right subspace.
    Signs are fixed (the largest entry of each vector is positive), so that equal input gives equal bytes.
    """
    n = k_matrix.shape[-1]
    if k_matrix.device.type == "cuda" and k_matrix.shape[0] >= _BATCH and k < n:
        values, vectors = _block_powers(k_matrix, k)
    else:
        values, vectors = torch.linalg.eigh(k_matrix)
        values, vectors = values[:, -k:].flip(-1), vectors[:, :, -k:].flip(-1)
    top = vectors.abs().argmax(1, keepdim=True)
    sign = torch.where(vectors.gather(1, top) < 0, -1.0, 1.0).to(vectors.dtype)
    return values.clamp(min=0), vectors * sign


def _block_powers(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Subspace iteration with powers of the matrix, orthonormalised by Cholesky; eigh for what has not settled.

    What counts is the energy that the subspace holds: components whose eigenvalues straddle the cut closely may mix, which
    costs little. Squaring the matrix makes one orthonormalisation go twice as far; how often it is squared follows the
    smallest pivot, which says how near the columns came to being dependent. A module has settled when _ROUNDS more steps
    at the highest power change the energy by less than _SETTLED of it, and than _ABOVE of what is lost.
    """
    n = matrix.shape[-1]
    total = matrix.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=torch.finfo(matrix.dtype).tiny)
    unit = matrix / total[:, None, None]
    start = torch.randn(n, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(matrix)
    basis, pivot = orthonormal(unit @ start)
    alive = pivot > DEPENDENT
    powers, at, top = [unit], _FIRST, _SQUARINGS
    for _ in range(_FIRST):
        powers.append(_squared(powers[-1]))
    held, settled = _held(unit, basis), torch.zeros_like(alive)
    for _ in range(_STAGES // _ROUNDS):
        least = torch.ones_like(total)
        for _ in range(_ROUNDS):
            moved, pivot = orthonormal(powers[at] @ basis)
            sound = pivot > DEPENDENT
            basis = torch.where(sound[:, None, None], moved, basis)  # else it stays, and the next power is lower
            least = torch.minimum(least, torch.where(alive, pivot, 1.0))
        now = _held(unit, basis)
        # of what is held and of what is lost (1 is all); and only if it did move
        bound = torch.minimum(_SETTLED * now, _ABOVE * (1 - now)).clamp(min=_ROUNDED)
        settled = ((now - held).abs() <= bound) & (least > DEPENDENT)
        held = now
        weakest, done = torch.stack(
            [least.min(), (settled | ~alive).all().to(least.dtype)]
        ).tolist()  # one wait for the device
        if done and at == top:  # lower powers move so little that standing still says nothing
            break
        if weakest <= DEPENDENT:
            if at == 0:
                alive &= least > DEPENDENT
            at = top = max(0, at - 1)
        elif weakest > _STEADY and at < top:
            at += 1
            if at == len(powers):
                powers.append(_squared(powers[-1]))
    basis, _ = orthonormal(basis)
    values = ((unit @ basis) * basis).sum(1)
    order = values.argsort(-1, descending=True)
    values, vectors = values.gather(1, order), basis.gather(2, order[:, None].expand(-1, n, -1))
    for module in (~(settled & alive)).nonzero().flatten().tolist():
        exact_values, exact = torch.linalg.eigh(unit[module])
        values[module], vectors[module] = exact_values[-k:].flip(-1), exact[:, -k:].flip(-1)
    return values * total[:, None], vectors


def _squared(matrix: Tensor) -> Tensor:
    """matrix^2 at a trace of 1, so that powers neither over- nor underflow."""
    square = matrix @ matrix
    return square / square.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-300)[:, None, None]


def _held(matrix: Tensor, basis: Tensor) -> Tensor:
    """The energy that a basis holds, [L]."""
    return ((matrix @ basis) * basis).sum((1, 2))


# -- dense results -----------------------------------------------------------------------------------------------------


def cut_dense(d: Tensor, rank: int, passes: int = 6) -> Cut:
    """The best rank-`rank` approximation of d [L, out, in]: exact where a side is small, else by subspace iteration.

    Subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) with a fixed start and half as many vectors
    again as the rank; `total` and `lost` are those of the approximation it found, exactly.
    """
    out, inside = d.shape[1:]
    small = min(out, inside)
    k = min(rank, small)
    total = _energy(d)
    _finite(total)
    if k == small:
        return Cut(whole(d), total, torch.zeros_like(total))
    width = min(small, k + max(16, k // 2))
    start = torch.randn(inside, width, generator=torch.Generator().manual_seed(0)).to(d)
    basis = _basis(d @ start)
    for _ in range(passes):
        basis = _basis(d @ _basis(d.mT @ basis))
    right = basis.mT @ d  # [L, width, in]
    values, vectors = top_eigen(gram(right.mT), k)
    lost = (total - values.sum(-1)).clamp(min=0)
    root = values.sqrt().sqrt()[:, None].to(d.dtype)
    vectors = vectors.to(d.dtype)
    b = basis @ (vectors * root)
    a = (vectors / torch.where(root > 0, root, 1.0)).mT @ right
    for module in (
        (lost < _RESIDUAL * total).nonzero().flatten().tolist()
    ):  # a difference of roundings: measured instead
        lost[module] = _energy(d[module : module + 1], LowRank(a[module : module + 1], b[module : module + 1]))[0]
    return Cut(LowRank(a, b), total, lost)


def _energy(d: Tensor, less: LowRank | None = None) -> Tensor:
    """||d - less||_F^2 of each matrix [L, out, in], float64, in blocks of rows so that no second matrix stands in memory."""
    found = torch.zeros(d.shape[0], dtype=widest(d.device), device=d.device)
    for rows in torch.arange(d.shape[1]).split(_ROWS):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        block = d[:, part] if less is None else d[:, part] - less.B[:, part] @ less.A
        found += torch.linalg.vector_norm(block, dim=(1, 2), dtype=found.dtype) ** 2
    return found


def whole(d: Tensor) -> LowRank:
    """Factors of full rank: d itself on one side, the identity on the other."""
    modules, out, inside = d.shape
    eye = torch.eye(min(out, inside), dtype=d.dtype, device=d.device).expand(modules, -1, -1)
    return LowRank(eye, d) if inside <= out else LowRank(d, eye)


def _basis(x: Tensor) -> Tensor:
    """An orthonormal basis of x's columns, [L, n, k]."""
    if x.device.type != "cuda":
        return torch.linalg.qr(x).Q
    basis, pivot = orthonormal(x.double())
    if not bool((pivot > DEPENDENT).all()):
        return torch.linalg.qr(x).Q
    return basis.to(x.dtype)


def dense_spectrum(d: Tensor) -> Tensor:
    """Squared singular values of each matrix, descending, float64 [L, min(out, in)]."""
    g = gram(d) if d.shape[2] <= d.shape[1] else gram(d.mT)
    _finite(g.diagonal(dim1=-2, dim2=-1).sum(-1))
    return torch.linalg.eigvalsh(g).flip(-1).clamp(min=0)
