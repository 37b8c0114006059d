"""A live model over a bank that is larger than memory and changes while it runs.

Only the adapters that the rows in hand use are stacked (see :mod:`.composed`), with a few of those used before; others stay
in memory for a while, the rest on disk. A batch that asks for no adapter outside the stack costs
what a :class:`~.composed.LiveModel` of that stack costs, whatever the size of the bank.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..bank import fit_names
from ..base_ref import BaseRef
from ..errors import LoralloyError
from ..weights import Weights
from .fit import check_base, check_fit, check_saved_modules
from .group import Group, grouped, spread
from .names import ModelNames
from .stacked import Stacked, overflow, place, scaled

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..bank import Bank

Loaded = dict[str, tuple[Tensor, Tensor]]
Names = set[str]
# Sum of ranks that may stay stacked without being used. Restacking costs two launches a module; a wide stack costs
# arithmetic in every pass, of which a GPU has plenty while it decodes, and a CPU has not.
SPARE, SPARE_CPU = 512, 64


class PagedModel:
    """A base model into which adapters of a bank are paged as rows ask for them; outside adapters join by :meth:`add`.

    >>> paged = PagedModel(model, bank, resident=32)                     # doctest: +SKIP
    >>> paged.add(merged)                                                # doctest: +SKIP
    >>> paged.set([Weights({"a": 0.7, "b": 0.3}), Weights({"merged": 1.0})])       # doctest: +SKIP

    `set` and the model's passes belong to one thread; `add`, `remove` and `load` may be called from any.

    Args:
        model, bank, base, assume_same_base: as for :class:`~.composed.LiveModel`; every adapter is checked here, from its
            outline, and read when first used.
        resident: adapters that stay loaded, in the model's dtype on its device, beyond those in use.

    Raises LoralloyError as :class:`~.composed.LiveModel` does, and for a `resident` below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        base: BaseRef | None = None,
        assume_same_base: bool = False,
        resident: int = 32,
    ) -> None:
        if resident < 1:
            raise LoralloyError(f"resident is {resident}; at least one adapter has to stay loaded")
        if base is not None and not (assume_same_base or bank.assume_same_base):
            check_base(bank, base, model)
        self.model, self.resident, self._called = model, resident, ModelNames(model)
        self._targets = self._called.modules
        self._adapters: dict[str, Adapter] = {}
        self._kinds: dict[str, str] = {}
        self._ranks: dict[str, int] = {}
        self._removed: Names = set()  # and perhaps still stacked, under a name that another may take
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._lock = threading.RLock()
        self.parts: dict[str, Stacked] = {}
        """By module of the base: the stacked factors of the adapters in :attr:`stacked`."""
        self.stacked: list[str] = []
        self._groups: list[Group] = []
        self._handles: dict[str, Any] = {}
        for name, adapter in bank.items():
            self.add(adapter, name)
        check_saved_modules(model, bank)
        self._spare = SPARE_CPU if self.device.type == "cpu" else SPARE

    @property
    def names(self) -> list[str]:
        """Every adapter that weights may name."""
        return list(self._adapters)

    @property
    def loaded(self) -> list[str]:
        """The adapters in memory, the one used longest ago first."""
        return list(self._loaded)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def add(self, adapter: Adapter, name: str | None = None) -> None:
        """Let rows use an adapter, under `name` or its own; nothing is read yet.

        Raises LoralloyError for a name in use and an adapter that does not fit the model.
        """
        name = adapter.name if name is None else name
        if name in self._adapters:
            raise LoralloyError(f"there is an adapter {name!r} already; remove it first, or give another name")
        adapter = self._called.adapter(adapter)
        for module in adapter:
            if module not in self._targets:
                raise self._called.unknown(adapter, module, f"adapter {name!r}")
            try:
                check_fit(module, self._targets[module], adapter.outline(module))
            except LoralloyError as error:
                raise error.within(f"module {module!r} of adapter {name!r}") from None
            self._kinds[module] = adapter.outline(module).kind
        with self._lock:
            self._adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Forget an adapter; rows that are set keep it until the next `set`. Raises LoralloyError for an unknown name."""
        with self._lock:
            if name not in self._adapters:
                raise LoralloyError(f"there is no adapter {name!r} here; it has {', '.join(self._adapters)}")
            del self._adapters[name]
            self._loaded.pop(name, None)
            self._removed.add(name)

    def load(self, name: str) -> Loaded:
        """One adapter's factors, scaled, on the model's device; read now if they are not in memory.

        Raises LoralloyError for an adapter that is not there, factors that are not finite or overflow the model's dtype.
        """
        with self._lock:
            if name in self._loaded:
                self._loaded.move_to_end(name)
                return self._loaded[name]
            adapter = self._adapters.get(name)
        if adapter is None:
            raise LoralloyError(f"weights name adapter {name!r}, which is not in the bank")
        made: Loaded = {m: scaled(adapter[m], *place(self._targets[m])) for m in adapter}
        largest = [t.abs().amax() for pair in made.values() for t in pair if t.numel()]
        if largest and not bool(torch.isfinite(torch.stack([x.float() for x in largest])).all()):
            module = next(m for m, pair in made.items() if not all(bool(torch.isfinite(t).all()) for t in pair))
            raise overflow(module, made[module][0].dtype).within(f"adapter {name!r}")
        with self._lock:
            if self._adapters.get(name) is adapter:  # else it was removed while it was read
                self._loaded[name] = made
                self._ranks[name] = max((len(a) for a, _ in made.values()), default=0)
                self._loaded.move_to_end(name)
        return made

    def set(self, rows: Sequence[Weights] | None, beside: Iterable[Weights] = ()) -> None:
        """The next batches' rows, each with its composition; None for the plain base. A weight of 0 reads no adapter.

        `beside`: rows that are to be set next, whose adapters stay stacked.
        Raises LoralloyError for an adapter or a module that is not there.
        """
        if rows is None:
            for group in self._groups:
                group.setting = None
            return
        if not rows:
            raise LoralloyError("no weights given; give one composition a row")
        rows = [fit_names(row, self._adapters) for row in rows]
        for row in rows:
            self._check(row)
        used = _used(rows)
        with self._lock:
            stale = bool(self._removed & set(self.stacked))
            for name in sorted(used & self._loaded.keys()):
                self._loaded.move_to_end(name)
        wanted = used | _used(row for row in beside if row.coefficients.keys() <= self._adapters.keys())
        wide = self._rank(self.stacked) > max(2 * self._rank(wanted & set(self.stacked)), self._spare)
        if stale or wide or not used <= set(self.stacked):
            self._restack(wanted)
        if self.stacked:
            spread(self._groups, self.stacked, rows)

    def _check(self, row: Weights) -> None:
        for name, value in row.coefficients.items():
            adapter = self._adapters.get(name)
            if adapter is None:
                raise LoralloyError(f"weights name adapter {name!r}, which is not in the bank")
            if isinstance(value, Mapping):
                for module in value:  # a misspelt module would be a weight of 0 that nobody sees
                    if module != "*" and module not in adapter:
                        raise LoralloyError(
                            f"weights of adapter {name!r} name module {module!r}, which it does not have"
                        )

    def _restack(self, used: Names) -> None:
        """Stack the used adapters, and those used last as far as they are spare; let go of what is not resident."""
        factors = {name: self.load(name) for name in sorted(used)}
        with self._lock:
            self._removed.clear()
            for i, name in enumerate([n for n in reversed(self._loaded) if n not in used]):
                if len(used) + i >= self.resident:
                    del self._loaded[name]
                elif self._rank([*factors, name]) <= self._spare:
                    factors[name] = self._loaded[name]
        names = sorted(factors)
        modules = dict.fromkeys(m for n in names for m in factors[n])
        for module in [m for m in self.parts if m not in modules]:
            self._handles.pop(module).remove()
            del self.parts[module]
        for module in modules:
            mine = {n: factors[n][module] for n in names if module in factors[n]}
            if module in self.parts:
                self.parts[module].stack(mine, names)
            else:
                part = self.parts[module] = Stacked(module, self._kinds[module], mine, names)
                self._handles[module] = self._targets[module].register_forward_hook(part.hook)
        self._groups = grouped(self.parts)
        self.stacked = names

    def _rank(self, names: Iterable[str]) -> int:
        return sum(self._ranks.get(name, 0) for name in names)

    def close(self) -> None:
        """The model is the plain base again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self.parts.clear()
        self._groups, self.stacked = [], []


def _used(rows: Iterable[Weights]) -> Names:
    """The adapters with a weight that is not 0."""
    return {n for row in rows for n, value in row.coefficients.items() if _any(value)}


def _any(value: Any) -> bool:
    return any(value.values()) if isinstance(value, Mapping) else bool(value)
