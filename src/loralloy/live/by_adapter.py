"""One adapter a row: the rows of each adapter side by side, so that its factors meet its own rows alone.

Where row b uses adapter i(b) and no other (named, or merged before), the product of all rows with all n stacked adapters is
for n - 1 parts of n multiplied by zero. Here the rows are put into n x m places, m the most rows that one adapter has, and

    y_b += w_b B_(i(b)) A_(i(b)) x_b

takes two batched products over the adapters. The factors are views of the stack: nothing is copied when rows change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Measured on a CPU in float32, for one token of 2 to 32 rows through SmolLM2-135M's modules: beyond, it is no faster.
ADAPTERS, COLUMNS = 4, 64  # at least, in the stack
PLACES = 3  # a row, at most


class Places(NamedTuple):
    """Rows in places, m for each of n adapters: order [n * m] int64, the row in each (any where there is none, with c = 0),
    and c [n, m, 1], its coefficient. Rows of the plain base have none."""

    order: Tensor
    c: Tensor


class ByAdapter(NamedTuple):
    """What p modules of one input compute with, their rows in places.

    order: [n * m]. all_: [p * n * m], and c: [p * n, m, 1], the same for each module. a: A^T [p * n, in, r].
    out: by module, B^T [n, r, out].
    """

    order: Tensor
    all_: Tensor
    c: Tensor
    a: Tensor
    out: tuple[Tensor, ...]

    @classmethod
    def of(cls, places: Places, a: Tensor, out: Sequence[Tensor]) -> ByAdapter:
        """From stacked A [p * n * r, in] and, by module, B^T [n * r, out]."""
        (order, c), n, p = places, len(places.c), len(out)
        outs = tuple(b.view(n, -1, b.shape[-1]) for b in out)
        return cls(order, order.repeat(p), c.repeat(p, 1, 1), a.view(p * n, -1, a.shape[-1]).mT, outs)

    def inner(self, x: Tensor, position: int | None) -> Tensor:
        """(A x) c by place, for x [rows, 1, in]: [p * n, m, r], or [n, m, r] of the module at `position`."""
        order, c, a = self.all_, self.c, self.a
        if position is not None:
            n = len(self.out[0])
            order, c, a = self.order, c[:n], a[position * n : (position + 1) * n]
        inner = torch.bmm(x.to(a.dtype).index_select(0, order).view(c.shape[0], c.shape[1], -1), a)
        return inner * c if inner.requires_grad else inner.mul_(c)

    def more(self, inner: Tensor, position: int) -> Tensor:
        """What to add by place, [n * m, out], to the output of the module at `position`."""
        out = self.out[position]
        n = len(out)
        if len(inner) != n:
            inner = inner[position * n : (position + 1) * n]
        return torch.bmm(inner, out).flatten(0, 1)


def placed(table: Tensor, ranks: Sequence[int], dtype: torch.dtype, device: torch.device) -> Places | None:
    """Places for rows whose weights are `table` [rows, n], of stacked adapters with these ranks; None where it does not pay.

    That is: on a GPU, which hardly feels the width of a stack, and in 16 bit (a CPU multiplies whole tiles); with a row of
    two adapters, adapters of different ranks, few of them, and most rows on one of many.
    """
    n = len(ranks)
    if device.type != "cpu" or dtype != torch.float32 or n < ADAPTERS or sum(ranks) < COLUMNS or len(set(ranks)) > 1:
        return None
    used = table != 0
    if bool((used.sum(1) > 1).any()):
        return None
    m = int(used.sum(0).max())
    if not 0 < n * m <= PLACES * len(table):
        return None
    row, adapter = used.nonzero(as_tuple=True)
    place = adapter * m + used.cumsum(0)[row, adapter] - 1
    order, c = torch.zeros(n * m, dtype=torch.int64), torch.zeros(n * m, dtype=table.dtype)
    order[place], c[place] = row, table[row, adapter]
    return Places(order, c.view(n, m, 1).to(dtype))
