"""Entries: what entrywise rules see. T adapters' numbers at the same places, whatever the space they come from.

`dW` (delta), `A` or `B` (factors), aligned right factors (knots) or cores (core): a rule such as TIES is one function of
Entries, and a space decides what its entries are (see :mod:`.spaces`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .select import Limits

Trim: TypeAlias = Literal["tensor", "all"]
Majority: TypeAlias = Literal["total", "frequency"]
Normaliser: TypeAlias = Literal["count", "weights"]
Vote: TypeAlias = Literal["unweighted", "weighted"]


@dataclass(frozen=True)
class Entries:
    """One block of entries of L modules in T adapters.

    Attributes:
        values: T tensors [L, n].
        weights: [T, L], what each adapter's entries are multiplied with.
        shares: [T, L], the same without the LoRA scaling: what a normaliser divides by.
        keys: [T, L] int64, seeds of random masks.
        limits: T trimming limits, where the rule trims.
        start: index of the first entry in its tensor.
        dtype: what is computed in.
    """

    values: Sequence[Tensor]
    weights: Tensor
    shares: Tensor
    keys: Tensor
    limits: Sequence[Limits] | None
    start: int
    dtype: torch.dtype

    def trimmed(self) -> list[Tensor]:
        """The entries with the smallest magnitudes set to 0, by the limits that the rule's density and scope gave."""
        assert self.limits is not None
        return [limit.keep(x) for x, limit in zip(self.values, self.limits, strict=True)]

    def dropped(self, density: float, seed: int) -> list[Tensor]:
        """Each entry kept with probability `density` and divided by it, else 0 (DARE; Yu et al. 2024, section 3.1)."""
        if density >= 1:
            return list(self.values)
        if density <= 0:
            return [torch.zeros_like(x) for x in self.values]
        result = []
        for x, keys in zip(self.values, self.keys, strict=True):
            kept = random_mask(keys, self.start, x.shape[1], density, seed)
            result.append(x.to(self.dtype) * kept / density)  # in this order: what is dropped cannot overflow
        return result

    def summed(self, values: Sequence[Tensor] | None = None) -> Tensor:
        """sum_i w_i x_i, [L, n]."""
        values = self.values if values is None else values
        weights = self.weights.to(self.dtype)
        wide: Tensor | None = None  # one buffer for all adapters: fresh memory costs more than the sum
        total: Tensor | None = None
        for x, w in zip(values, weights, strict=True):
            if x.dtype != self.dtype:
                wide = x.to(self.dtype) if wide is None else wide.copy_(x)
                x = wide
            total = x * w[:, None] if total is None else total.addcmul_(x, w[:, None])
        assert total is not None
        return total

    def disjoint(
        self,
        values: Sequence[Tensor],
        majority: Majority,
        normaliser: Normaliser,
        vote: Vote,
        spare: bool = False,
    ) -> Tensor:
        """Elect a sign for each entry and average the entries that have it (TIES; Yadav et al. 2023, steps 2 and 3).

        The elected sign is + where the vote is 0, as in PEFT. An entry where no adapter agrees is 0. With `spare`, nobody
        needs `values` afterwards, and they may be overwritten.
        """
        counted = normaliser == "count"
        weights = self.weights.to(self.dtype)[:, :, None]
        shares = weights if counted else self.shares.abs().to(self.dtype)[:, :, None]
        if vote == "weighted":
            values, weights = [x * w for x, w in zip(values, weights, strict=True)], torch.ones_like(weights)
            spare = True
        spare = spare and all(x.dtype == self.dtype for x in values)
        ballots = values if majority == "total" else [x.sign() for x in values]
        poll = ballots[0].to(self.dtype) + (ballots[1] if len(ballots) > 1 else 0.0)
        for x in ballots[2:]:
            poll += x
        # the sign bit: a sum is -0 only where every entry is 0, and there nothing is elected
        sign = torch.copysign(poll.new_ones(()), poll, out=poll)
        total = agreeing = mine = torch.empty(0)
        for i, (x, w, share) in enumerate(zip(values, weights, shares, strict=True)):
            # fresh memory costs more than the product
            mine = x.mul_(sign) if spare else torch.mul(x, sign, out=mine if i else None)
            mine.relu_()  # |x| where it has the elected sign, else 0
            total = total.addcmul_(mine, w) if i else mine * w
            mine.sign_()
            if counted:
                agreeing = agreeing.add_(mine) if i else mine if spare else mine.clone()
            else:
                agreeing = agreeing.addcmul_(mine, share) if i else mine * share
        if counted:
            agreeing.clamp_(min=1.0)
        else:
            agreeing.add_(torch.eq(agreeing, 0.0, out=mine))
        return total.mul_(sign).div_(agreeing)


def random_mask(keys: Tensor, start: int, n: int, density: float, seed: int) -> Tensor:
    """Which of entries start..start+n are kept, [L, n]: each with probability `density`, the same on every device.

    A counter hash rather than a generator: an entry's fate depends on (seed, adapter, module, index) alone, not on the
    order, the batching or the device. The mixer is lowbias32 (C. Wellons, "Prospecting for hash functions", 2018,
    public domain), applied to the index and again after each half of the key.
    """
    first = (start + 2**31) % 2**32 - 2**31  # an embedding may have more than 2^31 entries; sums wrap
    index = torch.arange(n, dtype=torch.int32, device=keys.device) + first
    keys = seeded(keys, seed)
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)  # a conversion to int32 wraps
    bits = _mix(_mix(index)[None] ^ low[:, None]) ^ high[:, None]
    bits = _mix(bits)
    limit = math.floor(density * 2**32) - 2**31
    return bits < limit if limit < 2**31 else torch.ones_like(bits, dtype=torch.bool)


def seeded(keys: Tensor, seed: int) -> Tensor:
    """Keys [...] int64 of another seed."""
    if not seed:
        return keys
    return keys ^ ((seed * 0x9E3779B97F4A7C15 + (1 << 63)) % (1 << 64) - (1 << 63))


def _mix(x: Tensor) -> Tensor:
    """lowbias32 on int32 [..., n], in place; products wrap, shifts are made logical by a mask."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x
