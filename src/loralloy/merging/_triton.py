"""The kernels themselves (see :mod:`.kernels`). Imported only where Triton is there."""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_BINS, _BINS_TILE, _BINS_LOOPS = 32, 4096, 8


@triton.jit
def _histogram(
    out, table, chosen, n, rows, SHIFT: tl.constexpr, BINS: tl.constexpr, LOOPS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """out [T, L, 32] += histogram of five bits of each 15-bit magnitude, where the bits above them are `chosen`."""
    part, row, t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    base = tl.load(table + t).to(tl.pointer_type(tl.int16)) + row.to(tl.int64) * n
    pick = tl.load(chosen + t * rows + row)
    seen = tl.zeros([BINS], dtype=tl.int32)
    for i in range(LOOPS):
        at = (part * LOOPS + i) * TILE + tl.arange(0, TILE)
        size = tl.load(base + at, mask=at < n, other=0).to(tl.int32) & 0x7FFF
        here = (at < n) & ((size >> (SHIFT + 5)) == pick)
        seen += tl.histogram((size >> SHIFT) & (BINS - 1), BINS, mask=here)
    tl.atomic_add(out + (t * rows + row) * BINS + tl.arange(0, BINS), seen, mask=seen > 0)


def histogram(table: Tensor, chosen: Tensor, adapters: int, rows: int, n: int, shift: int) -> Tensor:
    """[T, L, 32] int32: of bits shift..shift+4 where the bits above are `chosen` [T, L] int32."""
    out = torch.zeros(adapters, rows, _BINS, dtype=torch.int32, device=table.device)
    grid = (triton.cdiv(n, _BINS_TILE * _BINS_LOOPS), rows, adapters)
    _histogram[grid](out, table, chosen, n, rows, shift, _BINS, _BINS_LOOPS, _BINS_TILE, num_warps=8)
    return out


@triton.jit
def _count(out, table, bars, n, rows, tiles, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """out [T, L, tiles]: entries of a tile whose magnitude equals the bar."""
    tile, row, t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    base = tl.load(table + t).to(tl.pointer_type(DTYPE)) + row.to(tl.int64) * n
    at = tile * TILE + tl.arange(0, TILE)
    x = tl.load(base + at, mask=at < n, other=0).to(tl.float32)
    same = (tl.abs(x) == tl.load(bars + t * rows + row)) & (at < n)
    tl.store(out + (t * rows + row).to(tl.int64) * tiles + tile, tl.sum(same.to(tl.int32), 0))


def count(
    table: Tensor, bars: Tensor, adapters: int, rows: int, n: int, tiles: int, tile: int, dtype: torch.dtype
) -> Tensor:
    """[T, L, tiles] int32."""
    out = torch.empty(adapters, rows, tiles, dtype=torch.int32, device=table.device)
    _count[(tiles, rows, adapters)](out, table, bars, n, rows, tiles, _TYPES[dtype], tile, num_warps=4)
    return out


@triton.jit
def _mix(x):
    """lowbias32, as entries._mix."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _combine(
    out, table, weights, shares, bars, offsets, quotas, keys, n, rows, tiles, start, density, limit,
    T: tl.constexpr, DTYPE: tl.constexpr, TRIM: tl.constexpr, EQUALS: tl.constexpr, DROP: tl.constexpr,
    VOTE: tl.constexpr, WEIGHTED: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1)
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < n
    place = row.to(tl.int64) * n + at
    zero = tl.zeros([TILE], dtype=tl.float32)
    total, up, down, ups, downs, poll = zero, zero, zero, zero, zero, zero
    for t in tl.static_range(T):
        x = tl.load(tl.load(table + t).to(tl.pointer_type(DTYPE)) + place, mask=inside, other=0).to(tl.float32)
        one = t * rows + row
        w = tl.load(weights + one)
        if TRIM:
            bar = tl.load(bars + one)
            size = tl.abs(x)
            if EQUALS:
                same = (size == bar) & inside
                nth = tl.cumsum(same.to(tl.int32), 0) + tl.load(offsets + one.to(tl.int64) * tiles + tile)
                x = tl.where((size > bar) | (same & (nth <= tl.load(quotas + one))), x, 0.0)
            else:
                x = tl.where(size >= bar, x, 0.0)
        if DROP:
            key = tl.load(keys + one)
            low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
            bits = _mix(_mix(_mix((at + start).to(tl.uint32)) ^ low) ^ high)
            x = tl.where(bits.to(tl.int32, bitcast=True) < limit, tl.math.div_rn(x, density), 0.0)
        if VOTE == 0:
            total += x * w
        else:
            if WEIGHTED:
                x = x * w
                w = 1.0
            if VOTE == 1:
                poll += x
            else:
                poll += tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)
            share = 1.0
            if not COUNT:
                share = tl.load(shares + one)
            up += tl.where(x > 0, x * w, 0.0)
            down += tl.where(x < 0, x * w, 0.0)
            ups += tl.where(x > 0, share, 0.0)
            downs += tl.where(x < 0, share, 0.0)
    if VOTE != 0:
        elected = poll >= 0
        total = tl.where(elected, up, down)
        agreeing = tl.where(elected, ups, downs)
        if COUNT:
            total = tl.math.div_rn(total, tl.maximum(agreeing, 1.0))
        else:
            total = tl.where(agreeing > 0, tl.math.div_rn(total, tl.where(agreeing > 0, agreeing, 1.0)), 0.0)
    tl.store(out + place, total, mask=inside)


def combine(
    out, table, weights, shares, bars, offsets, quotas, keys, n, rows, tiles, start, density, limit, adapters, dtype,
    *, trim, equals, drop, vote, weighted, count, tile,
) -> None:  # fmt: skip
    """See :func:`loralloy.merging.kernels.merge`."""
    _combine[(tiles, rows)](
        out, table, weights, shares, bars, offsets, quotas, keys, n, rows, tiles, start, density, limit,
        T=adapters, DTYPE=_TYPES[dtype], TRIM=trim, EQUALS=equals, DROP=drop, VOTE=vote, WEIGHTED=weighted, COUNT=count,
        TILE=tile, num_warps=4,
    )  # fmt: skip
