"""The factors of all adapters at a module, stacked, and the hook that adds their weighted output to the base's.

For a batch of b rows whose weights spread to coefficients c [b, R], R the sum of the ranks,

    y += ((x A_cat^T) * c) B_cat^T,

one product, one multiplication in place and one product that adds to the base's output in place (BLAS's beta = 1): three
kernels a module, whatever the number of compositions in the batch. Modules that read the same input (q, k, v; gate, up) share
the first two, so a Llama layer takes 15 kernels where one adapter in PEFT takes 28.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _global_forward_hooks
from torch.nn.utils.rnn import pad_sequence

from ..errors import LoralloyError
from ..factors import LoraFactors
from ..weights import Weights
from .gated import Gated

_SIBLINGS = (
    {"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}, {"q", "k", "v"}, {"wq", "wk", "wv"},
    {"gate_proj", "up_proj"}, {"w1", "w3"},
)  # fmt: skip


def scaled(f: LoraFactors, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A [r, in, ...] and B [out, r, ...] with the scaling in them, as they are stacked.

    The root of the scaling goes to each side, so that 16-bit factors neither over- nor underflow.
    """
    root, wide = abs(f.scaling) ** 0.5, torch.promote_types(dtype, torch.float32)
    a, b = f.A.to(wide) * (root if f.scaling >= 0 else -root), f.B.to(wide) * root
    return a.to(device, dtype), b.to(device, dtype)


def place(target: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype and device that factors of this module of the base have to have."""
    weight = target.weight
    assert isinstance(weight, Tensor)  # check_fit has seen to it
    # a packed weight's dtype says nothing; its layer takes inputs of any, and PEFT too keeps factors in float32 beside it
    return weight.dtype if weight.dtype.is_floating_point else torch.float32, weight.device


class Slot(NamedTuple):
    """A module's columns in its group's inner product, and B^T [R, out] for them."""

    start: int
    end: int
    out: Tensor


class Setting(NamedTuple):
    """What a group of modules computes with: c [rows or 1, columns], A [columns, in, ...] and each module's slot."""

    rows: int
    c: Tensor
    A: Tensor
    slots: tuple[Slot, ...]


class Stacked:
    """The stacked factors of one module of the base, and the hook that adds their weighted output.

    `parts`: by adapter, what :func:`scaled` gives; `names`: all adapters, in the order of the weights. A module belongs to a
    :class:`Group`, which holds what is set (:func:`grouped`).
    """

    group: Group
    position: int  # in it

    def __init__(self, name: str, kind: str, parts: Mapping[str, tuple[Tensor, Tensor]], names: Sequence[str]) -> None:
        self.name, self.kind = name, kind
        self.gated: Gated | None = None  # while set, a gate decides and not the weights
        self.stack(parts, names)

    def stack(self, parts: Mapping[str, tuple[Tensor, Tensor]], names: Sequence[str]) -> None:
        """Take these adapters' factors (at least one's) in place of what was there; it has to be grouped anew."""
        self.A = torch.cat([a for a, _ in parts.values()], 0)  # [R, in, ...]
        self.B = torch.cat([b for _, b in parts.values()], 1)  # [out, R, ...]
        index = {n: i for i, n in enumerate(names)}
        layout = [(index[n], len(a)) for n, (a, _) in parts.items()]
        # column of A_cat -> index of its adapter, so that a row's weights spread to its R coefficients by one gather
        self.columns = [i for i, rank in layout for _ in range(rank)]
        self.owner = torch.tensor(self.columns, device=self.A.device)
        self.layout = tuple(layout)  # modules of one layout have the same coefficients
        self._by_adapter: tuple[Tensor, Tensor] | None = None

    def stacked(self, n: int) -> tuple[Tensor, Tensor]:
        """The factors by adapter, padded to one rank: A [n, r, in] and B^T [n, r, out]; zero where one has no such module."""
        if self._by_adapter is None:
            mine = [self.owner == i for i in range(n)]
            a, b = (pad_sequence([t[m] for m in mine], batch_first=True) for t in (self.A, self.B.T))
            self._by_adapter = a, b
        return self._by_adapter

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.gated is not None:
            return output + self.gated.output(self, args[0]).to(output.dtype)
        setting = self.group.setting
        if setting is None:
            return None
        x = args[0]
        if setting.rows not in (1, x.shape[0]):
            raise LoralloyError(
                f"weights are set for {setting.rows} rows but the batch has {x.shape[0]}; give one weight a row, or one for all"
            )
        if self.kind != "linear":
            return self._other(module, x, output, setting)
        start, end, out = setting.slots[self.position]
        inner = self.group.inner(x, self.position, setting)  # [b, ..., columns]
        if inner.shape[-1] != end - start:
            inner = inner[..., start:end]
        if (
            self._first_sees(module)
            and output.dtype == inner.dtype
            and output.is_contiguous()
            and not (torch.is_grad_enabled() and (output.requires_grad or inner.requires_grad))
        ):
            output.view(-1, output.shape[-1]).addmm_(inner.flatten(0, -2), out)
            return output
        return output + (inner @ out).to(output.dtype)

    def _first_sees(self, module: nn.Module) -> bool:
        """Whether the module's output is new and in nobody's hands: it is made by nn.Linear's own forward (a subclass may give
        back its input, or what it keeps), and no other hook has seen it before this one."""
        return (
            type(module).forward is nn.Linear.forward
            and "forward" not in vars(module)
            and next(iter(module._forward_hooks.values()), None) == self.hook
            and not _global_forward_hooks
        )

    def _other(self, module: nn.Module, x: Tensor, output: Tensor, setting: Setting) -> Tensor:
        c, a = setting.c, setting.A
        if self.kind == "embedding":
            inner = a.T[x] * getattr(module, "embed_scale", 1.0)  # [b, l, R]; Gemma scales its embeddings
            inner = inner * c.reshape(c.shape[0], *([1] * (inner.ndim - 2)), c.shape[1])
            return output + (inner @ setting.slots[0].out).to(output.dtype)
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        inner = module._conv_forward(x.to(a.dtype), a, None)  # [b, R, ...]
        inner = inner * c.reshape(c.shape + (1,) * (inner.ndim - 2))
        return output + (inner.movedim(1, -1) @ setting.slots[0].out).movedim(-1, 1).to(output.dtype)  # B is 1x1


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

    def coefficients(self, tables: Sequence[Tensor]) -> tuple[int, Tensor, tuple[int, ...] | None] | None:
        """(rows, c, used columns) of tables [rows, adapters], one a module, on the CPU; None when all are zero.

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
        return rows, c.to(self.A.dtype).to(self.A.device), columns

    def set(self, made: tuple[int, Tensor, tuple[int, ...] | None] | None) -> None:
        """Set what :meth:`coefficients` gave (of this group or of one with the same layout)."""
        if made is None:
            self.setting = None
            return
        rows, c, columns = made
        a, slots = (self.A, self.slots) if columns is None else self._pick(columns)
        self.setting = Setting(rows, c, a, slots)

    def _pick(self, columns: tuple[int, ...]) -> tuple[Tensor, tuple[Slot, ...]]:
        if self._picked is None or self._picked[0] != columns:
            at, slots = 0, []
            for slot in self.slots:
                mine = [i - slot.start for i in columns if slot.start <= i < slot.end]
                slots.append(Slot(at, at + len(mine), slot.out[mine]))
                at += len(mine)
            self._picked = columns, self.A[list(columns)], tuple(slots)
        return self._picked[1:]

    def inner(self, x: Tensor, position: int, setting: Setting) -> Tensor:
        """(x A^T) * c: [b, ..., columns] of all modules, or of the one at `position` where the input is not shared."""
        if self._x is not None:
            if x is self._x and x._version == self._version:
                self._left -= 1
                if not self._left:
                    self._x = None
                return self._inner
            self._x, self.shared = None, False
        a, c = setting.A, setting.c
        share = self.shared and not x.is_inference()  # whose changes are not counted
        if len(self.parts) > 1 and not share:
            start, end, _ = setting.slots[position]
            a, c = a[start:end], c[:, start:end]
        inner = F.linear(x.to(a.dtype), a)
        c = c[:, None] if inner.ndim == 3 else c.reshape(c.shape[0], *([1] * (inner.ndim - 2)), c.shape[1])
        inner = inner * c if inner.requires_grad else inner.mul_(c)
        if share:
            self._x, self._version, self._left, self._inner = x, x._version, len(self.parts) - 1, inner
        return inner


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


def overflow(name: str, dtype: torch.dtype) -> LoralloyError:
    return LoralloyError(f"module {name!r}: the factors overflow the model's dtype {dtype}; load the model in float32")
