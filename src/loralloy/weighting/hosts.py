"""Where an adapter can be balanced: its modules that write to the residual stream, and what they are given at one token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import LoralloyError
from ..factors import widest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn


def hosts(model: nn.Module, adapter: Adapter, out: int, module: str | None = None, least: int = 2) -> list[str]:
    """The adapter's modules that may be balanced at, of rank `least` or more, in the model's order; `module` alone where named.

    Raises LoralloyError where there is none.
    """
    fits = {n for n in adapter if (f := adapter.outline(n)).kind == "linear" and f.shape[0] == out}
    fits = {n for n in fits if n == module or (module is None and not _inner(n))}
    found = [n for n, _ in model.named_modules() if n in fits]
    if not found:
        which = "" if module is None else f" called {module!r}"
        raise LoralloyError(
            f"adapter {adapter.name!r} has no linear module that writes {out} numbers to the residual stream{which} (query, "
            "key and value projections do not); leave the balance out, or name another with `module`"
        )
    if not (wide := [n for n in found if adapter.rank(n) >= least]):
        raise LoralloyError(
            f"module {found[-1]!r} of adapter {adapter.name!r} has rank 1: there is no room for a balance; give the merge a "
            "higher rank (--rank), or leave the balance out"
        )
    return wide


def check_hosts(model: nn.Module, adapters: Sequence[Adapter], out: int, rank: int | str | None) -> None:
    """Raise LoralloyError where no merge of these adapters, of this rank, could be balanced: before any work."""
    if rank == 1:
        raise LoralloyError(
            "a balance takes one direction of its module, and the merge has rank 1 (--rank); give 2 or more"
        )
    refused: list[LoralloyError] = []
    for adapter in adapters:
        check_saved(model, adapter)
        try:
            hosts(model, adapter, out, least=1)  # of a merge the rank may be larger
        except LoralloyError as error:
            refused.append(error)
    if len(refused) == len(adapters):
        raise refused[0]


def check_saved(model: nn.Module, adapter: Adapter) -> None:
    """Raise LoralloyError for a tensor that the adapter saved whole and the model has otherwise: answers are asked without it."""
    own = dict(model.named_parameters(remove_duplicate=False))
    for name in adapter.extra:
        mine, tensor = own.get(name.replace(".base_layer.", ".")), adapter.extra_tensor(name)
        if mine is not None and (mine.shape != tensor.shape or not torch.equal(tensor.to(mine), mine)):
            raise LoralloyError(
                f"adapter {adapter.name!r} saved {name!r} whole (modules_to_save), and the model is asked with its own; leave "
                "the balance out"
            )


def _inner(name: str) -> bool:
    """Query, key and value projections: often as wide as the residual stream, and not written to it."""
    first = name.rpartition(".")[2].lower().removeprefix("to_").split("_")[0]
    return first in {"q", "k", "v", "kv", "qkv", "wq", "wk", "wv", "wkv", "wqkv", "query", "key", "value"}


class Reading:
    """What modules are given and answer at one token, over all forwards inside, and which of them was run last.

    What the model runs over a cache that holds something is not read: those tokens are not where answers begin.

    Args:
        model: whose modules they are.
        names: of the modules.
        at: the token, -1 for the last.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], at: int) -> None:
        self.model, self.names, self.at = model, names, at
        self.last: str | None = None
        self._over_cache = False
        self._sums: dict[str, tuple[Tensor, Tensor, int]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Reading:
        try:
            self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
            for name in self.names:
                self._handles.append(self.model.get_submodule(name).register_forward_hook(self._hook(name)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        while self._handles:
            self._handles.pop().remove()

    def of(self, name: str) -> tuple[Tensor, float]:
        """Mean input [in], float64 on the CPU, and the mean length of what the module itself answers."""
        total, size, count = self._sums[name]
        return total.cpu().double() / count, float(size) / count

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        length = getattr(cache, "get_seq_length", None)
        self._over_cache = cache is not None and (length is None or bool(length() > 0))

    def _hook(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = args[0].detach()
            if x.ndim != 3 or self._over_cache:
                return
            self.last = name
            wide = widest(x.device)
            y = output.detach()[:, self.at].to(wide)
            found = x[:, self.at].to(wide).sum(0), y.norm(dim=-1).sum(), len(x)
            if name in self._sums:
                was = self._sums[name]
                found = was[0] + found[0], was[1] + found[1], was[2] + found[2]
            self._sums[name] = found

        return hook
