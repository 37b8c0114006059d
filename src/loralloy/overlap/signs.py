"""On how many entries of dW two adapters disagree in sign: the one measure that needs the entries themselves.

dW is formed a block of rows at a time and thrown away. For two rows of entries v, w the disagreements come from products of
small matrices, not from comparisons: sum sign(v) sign(w) = agreeing - disagreeing, and the magnitude on which they disagree is
(sum |v| |w| - sum v w) / 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 2**18  # entries held at a time, over all adapters: a block stays in cache


def _grams(w: Tensor, inner: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """opposed, entries, opposed mass and mass of rows of entries w [..., n, N], each [..., n, n] in float64."""
    if inner is None:
        inner = (w @ w.mT).double()
    sign = w.sign()
    agreeing = (sign @ sign.mT).double()  # below 2^24 terms, so exact in float32
    if bool((agreeing.diagonal(dim1=-2, dim2=-1) == w.shape[-1]).all()):
        entries = torch.full_like(agreeing, w.shape[-1])
    else:
        there = sign.abs_()
        entries = (there @ there.mT).double()
    size = w.abs()
    mass = (size @ size.mT).double()
    return (entries - agreeing) / 2, entries, (mass - inner) / 2, mass


def _block(parts: Sequence[tuple[Tensor, Tensor]], rows: Tensor | slice) -> Tensor:
    """The chosen rows of every dW, [rows, n, in]."""
    return torch.stack([b[rows] @ a for b, a in parts], 1)


def exact(parts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Sums over every entry, each [n, n], for parts (B [out, r], A [r, in]) of n adapters."""
    out, inside, n = parts[0][0].shape[0], parts[0][1].shape[1], len(parts)
    total = [torch.zeros(n, n, dtype=torch.float64) for _ in range(4)]
    step = max(1, BLOCK // (n * inside))
    block = parts[0][0].new_empty(n, min(step, out), inside)
    for start in range(0, out, step):
        rows = min(step, out - start)
        w = block[:, :rows] if rows < block.shape[1] else block
        for i, (b, a) in enumerate(parts):
            torch.mm(b[start : start + rows], a, out=w[i])
        for held, new in zip(total, _grams(w.reshape(n, -1)), strict=True):
            held += new
    return dict(zip(("opposed", "entries", "opposed_mass", "mass"), total, strict=True))


def sampled(parts: Sequence[tuple[Tensor, Tensor]], rows: int, seed: int) -> dict[str, Tensor]:
    """Estimates of the same sums from `rows` rows of dW drawn without replacement, with the variances of the estimates.

    Rows are the sampling units (entries of one row are not independent). With N rows, n drawn and s^2 the variance of the
    row sums, a total has the variance N^2 (1 - n/N) s^2 / n (Cochran, Sampling Techniques, ch. 2); the covariance of
    numerator and denominator is kept too, for the ratio.
    """
    out, n = parts[0][0].shape[0], len(parts)
    drawn = torch.randperm(out, generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    step = max(1, BLOCK // (n * parts[0][1].shape[1]))
    sums = [_grams(_block(parts, drawn[start : start + step])) for start in range(0, rows, step)]
    opposed, entries, opposed_mass, mass = (torch.cat(column) for column in zip(*sums, strict=True))
    scale = out / rows
    result = {
        "opposed": scale * opposed.sum(0), "entries": scale * entries.sum(0),
        "opposed_mass": scale * opposed_mass.sum(0), "mass": scale * mass.sum(0),
    }  # fmt: skip
    for name, x, y in (("count", opposed, entries), ("mass", opposed_mass, mass)):
        x, y = x - x.mean(0), y - y.mean(0)
        factor = out**2 * (1 - rows / out) / rows / max(1, rows - 1)
        for key, left, right in (("xx", x, x), ("xy", x, y), ("yy", y, y)):
            result[f"{name}_{key}"] = factor * (left * right).sum(0)
    return result
