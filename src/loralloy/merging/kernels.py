"""Triton kernels for entrywise rules on CUDA: one pass over the adapters where torch's operations take dozens.

The same numbers as :mod:`.entries` and :mod:`.select`, which every other device takes (and CUDA without Triton): the choice is
made in :mod:`.spaces`, and `benchmarks/merging.py cuda` compares the two to the bit. Triton comes with torch's CUDA builds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .select import Limits

_TILE = 2048
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@cache
def available() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def fits(values: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the kernels take these entries: on CUDA, of one 16- or 32-bit dtype, computed in float32."""
    first = values[0]
    return (
        first.is_cuda
        and dtype == torch.float32
        and first.dtype in _FLOATS
        and all(x.dtype == first.dtype for x in values)
        and available()
    )


def largest16(values: Sequence[Tensor], k: int) -> Limits:
    """Limits [T, L] that keep the k largest magnitudes of each 16-bit tensor [L, n]: three histograms of the bit patterns.

    Magnitudes of bf16 and fp16 order as their 15 lower bits do; each pass settles five of them, the highest first.
    """
    from . import _triton

    rows, n = values[0].shape
    table = _table(values)
    bits = torch.zeros(len(values), rows, dtype=torch.int32, device=table.device)
    above = equal = torch.zeros_like(bits)
    for shift in (10, 5, 0):
        counts = _triton.histogram(table, bits, len(values), rows, n, shift)
        from_top = counts.flip(-1).cumsum(-1, dtype=torch.int32) + above[..., None]
        at = (from_top < k).sum(-1, keepdim=True)  # bins from the top that do not reach k
        before = torch.where(at > 0, from_top.gather(-1, (at - 1).clamp(min=0)), above[..., None])
        above = before[..., 0]
        equal = counts.gather(-1, 31 - at)[..., 0]
        bits = ((bits << 5) | (31 - at[..., 0])).to(torch.int32)
    return Limits(bits.to(torch.int16).view(values[0].dtype), k - above, equal)


def merge(
    values: Sequence[Tensor],
    weights: Tensor,
    shares: Tensor,
    keys: Tensor,
    start: int,
    limits: Limits | None,
    parameters: dict[str, Any],
) -> Tensor:
    """An entrywise rule on T tensors [L, n]: float32 [L, n].

    What it does follows from the rule's parameters: `majority` elects signs (else entries are added), `limits` trims, `seed`
    drops at random. `limits` are those of all adapters, [T, L]; None keeps everything.
    """
    from . import _triton

    adapters, (rows, n) = len(values), values[0].shape
    device, tiles = values[0].device, -(-n // _TILE)
    table = _table(values)
    bars = quotas = offsets = table  # not read where they do not matter
    equals = False
    if limits is not None:
        bars = limits.magnitude.float().contiguous()
        # whether equals are split is not asked: the answer would wait for the device
        equals = limits.quota is not None
        if limits.quota is not None:
            quotas = limits.quota.to(torch.int32).contiguous()
            counts = _triton.count(table, bars, adapters, rows, n, tiles, _TILE, values[0].dtype)
            offsets = (counts.cumsum(-1, dtype=torch.int32) - counts).contiguous()
    density = float(parameters.get("density", 1.0)) if "seed" in parameters else 1.0
    out = torch.empty(rows, n, dtype=torch.float32, device=device)
    _triton.combine(
        out, table, weights.float().contiguous(), shares.abs().float().contiguous(), bars, offsets, quotas,
        keys.contiguous(), n, rows, tiles, start, density, math.floor(density * 2**32) - 2**31, adapters, values[0].dtype,
        trim=limits is not None, equals=equals, drop=density < 1,
        vote={"total": 1, "frequency": 2}.get(parameters.get("majority", ""), 0),
        weighted=parameters.get("vote") == "weighted", count=parameters.get("normaliser", "count") == "count", tile=_TILE,
    )  # fmt: skip
    return out


def _table(values: Sequence[Tensor]) -> Tensor:
    """The tensors' addresses, on their device; they must be contiguous."""
    if not all(x.is_contiguous() for x in values):
        raise ValueError("entries must be contiguous")
    return torch.tensor([x.data_ptr() for x in values], dtype=torch.int64).to(values[0].device, non_blocking=True)
