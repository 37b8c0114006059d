"""Together: the bases of many modules under one table of coefficients, in few operations.

A step of learning is bound by the number of small operations, several hundred modules times what each does. So a table is
picked from once for all modules, and in factors space A(w) and B(w) are made for all modules of a shape at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .basis import Basis, State
from .terms import CombineMany, Roots, Terms, wide_of


class Pick(torch.autograd.Function):
    """table.flatten()[index], whose gradient is the same at every run: an entry's are added in order, never by atomics.

    table [rows, n]; index [k]; back [rows * n, most], the positions in `index` that each entry is at, k where there is none.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.back, ctx.shape = back, table.shape
        return table.reshape(-1)[index]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        padded = torch.nn.functional.pad(grads[0], (0, 1))
        return padded[ctx.back].sum(1).view(ctx.shape), None, None


@dataclass(frozen=True)
class _Group:
    """Modules whose A(w), and whose B(w), are made at once: their positions, and the terms of all, [m, t, ...]."""

    at: tuple[int, ...]
    A: Tensor
    B: Tensor


class Together:
    """Bases of modules on one device, whose terms are of one dtype.

    Attributes:
        bases: as given, except that the terms of modules that are made at once lie in one tensor (no memory beside them).

    Args:
        bases: of m modules; the list is emptied, so that no terms are held twice.
        adapters: n, of the table's columns.
        beside: of m modules, whether their factors act beside the base where gradients flow.
    """

    def __init__(self, bases: list[Basis], adapters: int, beside: Sequence[bool]) -> None:
        self.bases = bases[:]
        bases.clear()
        alike: dict[object, list[int]] = {}
        for j, (basis, yes) in enumerate(zip(self.bases, beside, strict=True)):
            if yes and basis.kind == "low_rank_factors" and all(t.how == "sum" for t in basis.terms):
                alike.setdefault(tuple(t.values.shape for t in basis.terms), []).append(j)
        self._groups = [self._group(at) for at in alike.values()]
        grouped = [j for group in self._groups for j in group.at]
        together = set(grouped)
        rest = [j for j in range(len(self.bases)) if j not in together]
        self._order = grouped + rest
        lengths = [len(self.bases[j].picks) for j in self._order]
        self._sizes = [sum(lengths[: len(grouped)]), *lengths[len(grouped) :]]
        owners = torch.cat([self.bases[j].picks for j in self._order]).cpu()
        rows = torch.tensor(self._order).repeat_interleave(torch.tensor(lengths))
        index = rows * adapters + owners
        device = self.bases[0].who.device
        self._index, self._back = index.to(device), _inverse(index, len(self.bases) * adapters).to(device)

    def _group(self, at: list[int]) -> _Group:
        """The terms of these modules in one tensor each side, which the bases look into from now on."""
        sides = []
        for side in (0, 1):
            first = self.bases[at[0]].terms[side].values
            whole = first.new_empty((len(at), *first.shape))
            for place, j in zip(whole, at, strict=True):
                terms: list[Terms] = list(self.bases[j].terms)
                place.copy_(terms[side].values)
                terms[side] = replace(terms[side], values=place)
                self.bases[j] = replace(self.bases[j], terms=tuple(terms))
            sides.append(whole)
        return _Group(tuple(at), *sides)

    def states(self, table: Tensor, rounded: bool = False) -> list[State]:
        """What each module computes with (see `Basis.sum`) under the table [m, n]; gradients flow from it to the table.

        In float32 (float64 for such terms); factors that are made at once are `rounded` to the terms' dtype where asked for.
        """
        inside, *others = self._pick(table).split(self._sizes)
        made: list[State] = []
        if self._groups:
            shapes = [group.A.shape[:2] for group in self._groups]
            signed, root = (x.split([m * t for m, t in shapes]) for x in Roots.apply(inside))
            for group, s, r, shape in zip(self._groups, signed, root, shapes, strict=True):
                a, b = CombineMany.apply(s.view(shape), group.A), CombineMany.apply(r.view(shape), group.B)
                if rounded:
                    a, b = a.to(group.A.dtype), b.to(group.B.dtype)
                made += zip(a.unbind(0), b.unbind(0), strict=True)
        placed = dict(zip(self._order, made + others, strict=True))
        return [placed[j] for j in range(len(placed))]

    def _pick(self, table: Tensor) -> Tensor:
        first = self.bases[0]
        terms = first.terms[0].values if first.A is None else first.A
        return Pick.apply(table.to(terms.device, wide_of(terms)), self._index, self._back)  # type: ignore[no-any-return]


def _inverse(index: Tensor, size: int) -> Tensor:
    """[size, most]: the positions at which `index` is each of 0 .. size - 1, in order; len(index) fills the rows up."""
    counts = torch.bincount(index, minlength=size)
    back = torch.full((size, max(int(counts.max()), 1)), len(index))
    order = torch.argsort(index, stable=True)
    starts = counts.cumsum(0) - counts
    within = torch.arange(len(index)) - starts.repeat_interleave(counts)
    back[index[order], within] = order
    return back
