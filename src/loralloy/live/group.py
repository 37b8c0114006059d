"""Modules that read one input (q, k, v; gate, up), what they compute with, and how a batch's weights are spread to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..weights import Weights
from .by_adapter import ByAdapter, Places, placed

if TYPE_CHECKING:
    from .stacked import Stacked

_SIBLINGS = (
    {"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}, {"q", "k", "v"}, {"wq", "wk", "wv"},
    {"gate_proj", "up_proj"}, {"w1", "w3"},
)  # fmt: skip


class Slot(NamedTuple):
    """A module's columns in its group's inner product, and B^T [R, out] for them."""

    start: int
    end: int
    out: Tensor


class Setting(NamedTuple):
    """What a group of modules computes with: c [rows or 1, columns], A [columns, in, ...] and each module's slot.

    `by_adapter`: what a step of rows with one adapter each takes instead; None where they have not.
    """

    rows: int
    c: Tensor
    A: Tensor
    slots: tuple[Slot, ...]
    by_adapter: ByAdapter | None


class Made(NamedTuple):
    """Coefficients of a group, and what of its stack they are of: all columns, or the used ones."""

    rows: int
    c: Tensor
    columns: tuple[int, ...] | None
    places: Places | None


def _pays(device: torch.device, all_: int, used: int) -> bool:
    """Whether to copy the used columns out of the stack when they are set: a GPU hardly feels the width of what it skips."""
    return used * 2 <= all_ if device.type == "cpu" else all_ > 1024 and used * 4 <= all_


class Group:
    """Modules that read one input: their first product is made once for all of them."""

    def __init__(self, parts: Sequence[Stacked]) -> None:
        self.parts = list(parts)
        self.A = parts[0].A if len(parts) == 1 else torch.cat([p.A for p in parts])
        at, slots = 0, []
        for i, part in enumerate(parts):
            end = at + len(part.columns)
            part.group, part.position, part.A = self, i, self.A[at:end]
            out = part.B.flatten(1).T
            if out.device.type == "cpu" and part.kind == "linear":
                # R rows one after the other: on a CPU, for a few rows of x, up to twice as fast as R columns
                out = out.contiguous()
                part.B = out.T
            slots.append(Slot(at, end, out))
            at = end
        self.slots = tuple(slots)
        self.layout = tuple(p.layout for p in parts), self.A.dtype, self.A.device
        self.shared = len(parts) > 1  # until they are seen to read different inputs
        self._x: Tensor | None = None
        self._version, self._left, self._inner = 0, 0, self.A
        self._setting: Setting | None = None
        self._picked: tuple[tuple[int, ...], Tensor, tuple[Slot, ...]] | None = None

    @property
    def setting(self) -> Setting | None:
        """None: the plain base."""
        return self._setting

    @setting.setter
    def setting(self, setting: Setting | None) -> None:
        self._setting, self._x = setting, None

    def coefficients(self, tables: Sequence[Tensor]) -> Made | None:
        """What tables [rows, adapters], one a module, on the CPU, make of the stack; None when all are zero.

        `c` has one row when all agree, and only the used columns where leaving the rest out pays (else None is given for
        them).
        """
        c = torch.cat([t[:, p.columns] for t, p in zip(tables, self.parts, strict=True)], 1)
        rows = len(c)
        if rows > 1 and bool((c == c[:1]).all()):
            c = c[:1]
        some = (c != 0).any(0)
        used = int(some.sum())
        if not used:
            return None
        columns = None
        if _pays(self.A.device, len(some), used):
            columns = tuple(some.nonzero()[:, 0].tolist())
            c = c[:, some]
        places = self._places(tables, columns is None) if len(c) > 1 and self.parts[0].kind == "linear" else None
        return Made(rows, c.to(self.A.dtype).to(self.A.device), columns, places)

    def _places(self, tables: Sequence[Tensor], all_: bool) -> Places | None:
        """Places for the rows where all modules have the same adapters and weights."""
        (table, *others), layout = tables, self.parts[0].layout
        if any(p.layout != layout for p in self.parts) or not all(torch.equal(t, table) for t in others):
            return None
        stacked = [(i, rank) for i, rank in layout if all_ or bool(table[:, i].any())]
        at, ranks = [i for i, _ in stacked], [rank for _, rank in stacked]
        return placed(table[:, at], ranks, self.A.dtype, self.A.device)

    def set(self, made: Made | None) -> None:
        """Set what :meth:`coefficients` gave (of this group or of one with the same layout)."""
        if made is None:
            self.setting = None
            return
        a, slots = (self.A, self.slots) if made.columns is None else self._pick(made.columns)
        by_adapter = ByAdapter.of(made.places, a, [slot.out for slot in slots]) if made.places else None
        self.setting = Setting(made.rows, made.c, a, slots, by_adapter)

    def _pick(self, columns: tuple[int, ...]) -> tuple[Tensor, tuple[Slot, ...]]:
        if self._picked is None or self._picked[0] != columns:
            at, slots = 0, []
            for slot in self.slots:
                mine = [i - slot.start for i in columns if slot.start <= i < slot.end]
                slots.append(Slot(at, at + len(mine), slot.out[mine]))
                at += len(mine)
            self._picked = columns, self.A[list(columns)], tuple(slots)
        return self._picked[1:]

    def inner(self, x: Tensor, position: int, setting: Setting, by_adapter: ByAdapter | None) -> Tensor:
        """(x A^T) * c: [b, ..., columns], or by place, of all modules, or of the one at `position` where the input is not
        shared."""
        if self._x is not None:
            if x is self._x and x._version == self._version:
                self._left -= 1
                if not self._left:
                    self._x = None
                return self._inner
            self._x, self.shared = None, False
        share = self.shared and not x.is_inference()  # whose changes are not counted
        only = None if share or len(self.parts) == 1 else position
        inner = by_adapter.inner(x, only) if by_adapter is not None else self._of_all(x, only, setting)
        if share:
            self._x, self._version, self._left, self._inner = x, x._version, len(self.parts) - 1, inner
        return inner

    def _of_all(self, x: Tensor, position: int | None, setting: Setting) -> Tensor:
        a, c = setting.A, setting.c
        if position is not None:
            start, end, _ = setting.slots[position]
            a, c = a[start:end], c[:, start:end]
        inner = F.linear(x.to(a.dtype), a)
        c = c[:, None] if inner.ndim == 3 else c.reshape(c.shape[0], *([1] * (inner.ndim - 2)), c.shape[1])
        return inner * c if inner.requires_grad else inner.mul_(c)


def grouped(parts: Mapping[str, Stacked]) -> list[Group]:
    """Put modules into groups: those beside each other that are known to read one input, the others alone."""
    found: dict[tuple[Any, ...], list[Stacked]] = {}
    for name, part in parts.items():
        parent, _, leaf = name.rpartition(".")
        family = next((i for i, names in enumerate(_SIBLINGS) if leaf in names), None)
        key: tuple[Any, ...] = (name,)
        if family is not None and part.kind == "linear":
            key = parent, family, part.A.shape[1:], part.A.dtype, part.A.device
        found.setdefault(key, []).append(part)
    return [Group(members) for members in found.values()]


def spread(groups: Iterable[Group], names: Sequence[str], rows: Sequence[Weights]) -> None:
    """Set each group's coefficients to these rows' weights of the adapters `names`, in the order of the stacks."""
    table = torch.tensor([[row.of(n) for n in names] for row in rows], dtype=torch.float64)
    at = {n: i for i, n in enumerate(names)}
    by_module = [
        (r, at[n], value)
        for r, row in enumerate(rows)
        for n, value in row.coefficients.items()
        if isinstance(value, Mapping) and n in at
    ]
    if by_module:  # one column a module, of what takes the place of the table's: each mapping is read once
        groups = list(groups)
        modules = [part.name for group in groups for part in group.parts]
        read = {id(v): [v.get(m, v.get("*", 0.0)) for m in modules] for _, _, v in by_module}
        own = iter(torch.tensor([read[id(v)] for _, _, v in by_module], dtype=torch.float64).unbind(1))
        places = tuple(torch.tensor([place[k] for place in by_module]) for k in (0, 1))
    known: dict[Any, Any] = {}  # a copy to the device waits for it: once, not once a module
    for group in groups:
        if by_module:
            group.set(group.coefficients([table.index_put(places, next(own)) for _ in group.parts]))
            continue
        if group.layout not in known:
            known[group.layout] = group.coefficients([table] * len(group.parts))
        group.set(known[group.layout])
