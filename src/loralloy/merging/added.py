"""Entries that are only scaled and added (`linear` in factors space), on a CPU: a block of a module at a time.

A block of every adapter is read, added and rounded while it is in a core's cache, and no operation is large enough for torch
to share it among threads: the other cores are hashing the parents, and waiting for each other would cost more than the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import LoralloyError
from ..factors import compute_dtype
from .batches import UNKNOWN, Batch
from .linear import linear
from .plan import Group
from .stack import LowRank
from .stacking import Fetch, Settings

_BLOCK = 1 << 15  # entries; torch takes more than these to its threads


def adds(group: Group, settings: Settings) -> bool:
    """Whether a group's result is made here: `linear` on the factors, nothing around it, nothing measured, no small modules.

    A property of shapes and options alone, so that a merge gives the same bytes in memory and to disk.
    """
    plain = settings.before is None and settings.after is None and settings.measure == "none"
    small = min(f.numel() for f in (group.outlines[0].A, group.outlines[0].B)) < _BLOCK
    here = settings.space == "factors" and settings.rule.function is linear and settings.device.type == "cpu"
    return here and plain and not small and not group.cut


def added(groups: Sequence[Group], settings: Settings, fetch: Fetch, names: Sequence[str]) -> Iterator[Batch]:
    """The modules of groups that :func:`adds` takes, a batch each."""
    for group in groups:
        plain = group.outlines[0].kind != "conv"
        scaling, weights = (torch.tensor(rows, dtype=torch.float64) for rows in (group.scaling, group.weights))
        c = weights * scaling
        root = c.abs().sqrt()
        signed = root.copysign(c)
        for at, module in enumerate(group.modules):
            try:
                found = [fetch(i, module) for i in group.who]
            except LoralloyError as error:
                raise error.within(f"module {module!r} of {', '.join(names[i] for i in group.who)}") from None
            dtype = compute_dtype(*(t for f in found for t in (f.A, f.B)))
            a, low_a, high_a = _sum([f.A if plain else f.a for f in found], signed[:, at].to(dtype), settings.dtype)
            b, low_b, high_b = _sum([f.B if plain else f.b for f in found], root[:, at].to(dtype), settings.dtype)
            ends = torch.stack([low_a, high_a, low_b, high_b])
            yield Batch(group, [module], LowRank(a[None], b[None]), [UNKNOWN], ends)


def _sum(parts: Sequence[Tensor], weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """sum_i w_i x_i rounded to `dtype`, and its smallest and largest entry."""
    result = torch.empty(parts[0].shape, dtype=dtype)
    total = torch.empty(_BLOCK, dtype=weights.dtype)
    first, *rest = weights.split(1)
    ends = []
    for out, x, *others in zip(*(t.reshape(-1).split(_BLOCK) for t in (result, *parts)), strict=True):
        if len(out) < len(total):
            total = total[: len(out)]
        torch.mul(x, first, out=total)
        for y, w in zip(others, rest, strict=True):
            total.addcmul_(y, w)
        ends.append(torch.aminmax(out.copy_(total)))
    low, high = (torch.stack(side) for side in zip(*ends, strict=True))
    return result, low.amin(), high.amax()
