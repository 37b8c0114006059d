"""Exact selection: the k largest magnitudes of a tensor, the lowest index first among equals.

top-k as PEFT uses it leaves open which of equal magnitudes are kept; in 16-bit adapters that is many of them. Here it is
the first ones, so equal input gives equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

Blocks = Callable[[], Iterator[Tensor]]  # yields one tensor in blocks [L, n_b], in order of index
_SMALL = 1 << 22  # entries of a row that one call selects from at once
_SAMPLE = 1 << 18


class Limits:
    """Which entries of one adapter's tensors survive trimming: those above a magnitude, and the first `quota` equal to it.

    Attributes:
        magnitude: [L], float.
        quota: [L] int64, how many of the entries that equal it are kept; None keeps all of them.
        equal: [L] int64, how many there are; None as well.
    """

    def __init__(
        self,
        magnitude: Tensor,
        quota: Tensor | None = None,
        equal: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.magnitude, self.quota, self.equal = magnitude, quota, equal
        self._left = quota
        self._mask = mask  # of a tensor in one block, 1 where it is kept, from when its magnitudes were at hand

    @cached_property
    def everything(self) -> bool:
        """Whether all entries that equal the magnitude are kept."""
        return self.quota is None or self.equal is None or torch.equal(self.quota, self.equal)

    def keep(self, x: Tensor) -> Tensor:
        """A block x [L, n] with all but the survivors 0. Blocks must come in order: equals are counted down."""
        if self._mask is not None and self._mask.shape == x.shape:
            mask, self._mask = self._mask, None  # used up
            return mask.mul_(x)
        size, bar = x.abs(), self.magnitude[:, None].to(x.dtype)
        if self.everything:
            # a mask of floats: on a CPU several times faster than one of bools with `where`
            return torch.ge(size, bar, out=size).mul_(x)
        assert self._left is not None
        same = size == bar
        nth = same.cumsum(1, dtype=torch.int32)
        kept = (size > bar) | (same & (nth <= self._left[:, None]))
        self._left = (self._left - nth[:, -1]).clamp_(min=0)
        return kept * x

    def rewind(self) -> Limits:
        """Ready for the first block again."""
        self._left = self.quota
        return self


def largest(blocks: Blocks, size: int, k: int, single: bool) -> Limits:
    """The limits that keep the k largest magnitudes of each row of a tensor [L, size] given in blocks."""
    if 0 < k < size and (not single or size > _SMALL):
        return _bracketed(blocks, size, k)
    first = next(blocks())
    if 0 < k < size:
        return _select(first, k)
    # everything, or nothing
    return Limits(torch.full_like(first[:, 0], 0.0 if k >= size else torch.inf))


def _select(x: Tensor, k: int) -> Limits:
    """From entries [L, n] in memory."""
    n, size = x.shape[1], x.abs()
    if x.device.type == "cpu" and size.dtype in (torch.float32, torch.float64):
        # magnitudes order as their bit patterns do, and numpy's introselect of integers runs on vectors; in place: one
        # buffer for the partition, the magnitudes and the mask stays in a core's cache
        size.view(torch.int32 if size.dtype == torch.float32 else torch.int64).numpy().partition(n - k, axis=1)
        bar = size[:, n - k].clone()
        torch.abs(x, out=size)
    elif x.device.type == "cuda":
        bar = size.sort(1, descending=True).values[:, k - 1]
    else:
        bar = size.kthvalue(n - k + 1, dim=1).values
    mask = torch.ge(size, bar[:, None], out=size if x.device.type == "cpu" else torch.empty_like(size))
    reach = mask.sum(1, dtype=torch.float32)  # exact below 2^24
    if x.device.type == "cpu":
        if bool((reach == k).all()):
            return Limits(bar, mask=mask)
        size = torch.abs(x, out=size)
    equal = (size == bar[:, None]).sum(1)
    return Limits(bar, k - reach.long() + equal, equal)


def _bracketed(blocks: Blocks, size: int, k: int) -> Limits:
    """By a sample that brackets the limit, then an exact selection among what lies inside the bracket (2 passes)."""
    step = max(1, size // _SAMPLE)
    while math.gcd(step, size) > 1:  # a step that divides a matrix's width would see some of its columns alone
        step += 1
    sample = torch.cat([x[:, ::step].abs() for x in blocks()], 1).sort(1, descending=True).values
    m = sample.shape[1]
    middle, margin = k / size * m, 6 * (m * (k / size) * (1 - k / size)) ** 0.5 + 8
    high_at, low_at = int(middle - margin), int(middle + margin)
    high = sample[:, high_at] if high_at >= 0 else torch.full_like(sample[:, 0], torch.inf)
    low = sample[:, low_at] if low_at < m else torch.zeros_like(sample[:, 0])
    limits = _inside(blocks, k, low, high)
    # a sample can mislead (entries that repeat with its step): the whole range always holds the answer
    return limits or _inside(blocks, k, torch.zeros_like(low), torch.full_like(high, torch.inf))  # type: ignore[return-value]


def _inside(blocks: Blocks, k: int, low: Tensor, high: Tensor) -> Limits | None:
    """Exact limits if each row's k-th largest lies in [low, high], else None."""
    above = torch.zeros(low.numel(), dtype=torch.int64, device=low.device)
    level = torch.zeros_like(above)  # of a bracket of one number (zeros, above all) entries are counted, not collected
    point = low == high
    inside: list[tuple[Tensor, list[int]]] = []
    for x in blocks():
        size = x.abs()
        above += torch.count_nonzero(size > high[:, None], 1)
        within = (size <= high[:, None]) & (size >= low[:, None])
        counts = torch.count_nonzero(within, 1)
        level += counts * point
        within &= ~point[:, None]
        inside.append((size[within], (counts * ~point).tolist()))
    split = [values.split(counts) for values, counts in inside]
    candidates = [torch.cat(parts) for parts in zip(*split, strict=True)]
    need = k - above
    held = torch.tensor([c.numel() for c in candidates], device=low.device) + level
    if not bool(((need > 0) & (need <= held)).all()):
        return None
    # padded to one width: the padding is below every magnitude
    ordered = torch.nn.utils.rnn.pad_sequence([*candidates, low[:1]], True, -1.0)[:-1].sort(1, descending=True).values
    bar = torch.where(point, low, ordered.gather(1, (need[:, None] - 1).clamp(max=ordered.shape[1] - 1))[:, 0])
    equal = torch.where(point, level, (ordered == bar[:, None]).sum(1))
    return Limits(bar, need - torch.where(point, 0, (ordered > bar[:, None]).sum(1)), equal)


class GlobalLimits:
    """Limits over all modules of an adapter together (the TIES paper trims the whole task vector).

    Two passes over the entries: float32 magnitudes order as their bits do, so a histogram of the upper 16 bits finds the
    bin of the k-th largest and one of the lower 16 bits, within that bin, the number itself. Where only some of the entries
    that equal it survive, a third pass counts them by tensor: it is the first ones in the order of modules, whatever the
    batches.
    """

    def __init__(self, adapters: int, density: float, device: torch.device) -> None:
        self.density = density
        self._coarse = torch.zeros(adapters, 1 << 15, dtype=torch.int64, device=device)
        self._fine = torch.zeros(adapters, 1 << 16, dtype=torch.int64, device=device)
        self._limits: list[tuple[Tensor, int, int]] = []
        self._batch: tuple[str, ...] = ()
        self._equal: dict[tuple[int, tuple[str, ...]], list[Tensor]] = {}
        self._left: dict[tuple[int, tuple[str, ...]], list[Tensor]] = {}

    def passes(self) -> Iterator[Callable[[int, Tensor], None]]:
        """What each pass calls with (adapter, block [L, n]), for all blocks in the order of the merge, batch after batch."""
        yield self._count
        self._settle()
        yield self._refine
        self._finish()
        if any(quota != equal for _, quota, equal in self._limits):
            yield self._locate
            self._share()

    def begin(self, modules: Sequence[str]) -> None:
        """The blocks that follow are of these modules."""
        self._batch = tuple(modules)

    def keeper(self, adapter: int, modules: Sequence[str]) -> Limits:
        """One adapter's limits for one batch, whose blocks come in the order of the passes."""
        return _GlobalKeeper(self._limits[adapter][0], self._left.get((adapter, tuple(modules))))

    @staticmethod
    def _bits(x: Tensor) -> Tensor:
        return x.float().abs().contiguous().view(torch.int32).flatten()

    def _count(self, adapter: int, x: Tensor) -> None:
        self._coarse[adapter] += torch.bincount(self._bits(x) >> 16, minlength=1 << 15)

    def _settle(self) -> None:
        """Which bin holds each adapter's k-th largest."""
        totals = self._coarse.sum(1)
        self._k = [int(self.density * n) for n in totals.tolist()]
        from_top = self._coarse.flip(1).cumsum(1)
        self._bin, self._over = [], []
        for row, k in zip(from_top, self._k, strict=True):
            at = int(torch.searchsorted(row, k)) if k else 0  # bins from the top that reach k
            self._bin.append((1 << 15) - 1 - at)
            self._over.append(int(row[at - 1]) if at else 0)

    def _refine(self, adapter: int, x: Tensor) -> None:
        bits = self._bits(x)
        inside = bits[(bits >> 16) == self._bin[adapter]] & 0xFFFF
        self._fine[adapter] += torch.bincount(inside, minlength=1 << 16)

    def _finish(self) -> None:
        for row, k, over, top, total in zip(
            self._fine, self._k, self._over, self._bin, self._coarse.sum(1).tolist(), strict=True
        ):
            if k >= total:
                self._limits.append((torch.tensor(0.0), 0, 0))
                continue
            if k == 0:
                self._limits.append((torch.tensor(torch.inf), 0, 0))
                continue
            from_top = row.flip(0).cumsum(0)
            at = int(torch.searchsorted(from_top, k - over))
            low = (1 << 16) - 1 - at
            before = int(from_top[at - 1]) if at else 0
            bar = torch.tensor([(top << 16) | low], dtype=torch.int32).view(torch.float32)[0]
            self._limits.append((bar, k - over - before, int(row[low])))

    def _locate(self, adapter: int, x: Tensor) -> None:
        bar, quota, equal = self._limits[adapter]
        if quota != equal:
            found = (x.float().abs() == bar.to(x.device)).sum(1)
            self._equal.setdefault((adapter, self._batch), []).append(found)

    def _share(self) -> None:
        """How many of each block's equals survive: the quota less those before them, module by module."""
        before = [0] * len(self._limits)
        for (adapter, batch), found in self._equal.items():
            left = self._limits[adapter][1] - before[adapter]
            if len({counts.numel() for counts in found}) == 1:
                counts = torch.stack(found, 1)  # [L, blocks]
                until = counts.flatten().cumsum(0).reshape(counts.shape)
                self._left[adapter, batch] = list((left - until + counts).unbind(1))
                before[adapter] += int(until[-1, -1])
                continue
            mine = self._left[adapter, batch] = []  # pieces of some of the modules (knots): block after block
            for counts in found:
                until = counts.cumsum(0)
                mine.append(left - until + counts)
                left -= int(until[-1])
                before[adapter] += int(until[-1])


class _GlobalKeeper(Limits):
    """A limit for the blocks of one batch; `left` says how many of the equals in each survive, [L] a block; None all."""

    def __init__(self, bar: Tensor, left: list[Tensor] | None) -> None:
        super().__init__(bar)
        self._blocks = None if left is None else iter(left)

    def keep(self, x: Tensor) -> Tensor:
        size, bar = x.float().abs(), self.magnitude.to(x.device)
        if self._blocks is None:
            return torch.where(size >= bar, x, 0)
        same = size == bar
        return torch.where((size > bar) | (same & (same.cumsum(1) <= next(self._blocks)[:, None])), x, 0)

    def rewind(self) -> Limits:
        return self  # its blocks go on through the pieces of a batch


def limits_of(parts: Sequence[Blocks], size: int, density: float, single: bool) -> list[Limits]:
    """One adapter after the other, the limits of a tensor each; k = int(density * size), as PEFT counts."""
    return [largest(blocks, size, int(density * size), single) for blocks in parts]
