"""Merged adapters inside a running model: each row of a batch under its own, already merged adapter.

A rule other than the exact sum gives each query an adapter of its own. Here the adapters of a few hundred queries are stacked
once, [u, r, in] and [u, r, out] a module, and each row of a batch takes its own by one gather and two batched products:

    y_b = W0 x_b + B_(i_b) A_(i_b) x_b.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import LoralloyError
from ..factors import LoraFactors, compute_dtype
from .fit import check_fit
from .names import ModelNames

Factors = Mapping[str, LoraFactors]


class _Stack:
    """One module's factors of all adapters, padded to one rank; the last entry is zero and stands for the base."""

    def __init__(self, name: str, target: nn.Module, parts: Sequence[LoraFactors | None]) -> None:
        first = next(f for f in parts if f is not None)
        weight = target.weight
        assert isinstance(weight, Tensor)  # check_fit has seen to it
        device = weight.device
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        if first.kind == "conv":
            raise LoralloyError(
                f"module {name!r} is a convolution, which cannot have a merged adapter a row; leave it out, or answer the "
                "queries one composition at a time"
            )
        self.kind = first.kind
        # The root of the scaling goes to each side, so that 16-bit factors neither over- nor underflow.
        scalings = torch.tensor([0.0 if f is None else f.scaling for f in parts] + [0.0], dtype=torch.float32)
        root = scalings.abs().sqrt().to(device)
        self.A, self.B = (
            (_stacked(rows, device) * scale[:, None, None]).to(dtype)
            for rows, scale in (
                ([None if f is None else f.A for f in parts], root * scalings.sign().to(device)),
                ([None if f is None else f.B.T for f in parts], root),
            )
        )
        self.finite = torch.isfinite(self.A).all() & torch.isfinite(self.B).all()  # looked at once for all modules
        if self.kind == "embedding":
            self.A = self.A.transpose(1, 2).contiguous()  # [u + 1, vocabulary, r]


def _stacked(rows: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """[u + 1, r, k] from [r_i, k] each, in float32 or wider; None and the last are zero."""
    given = [row for row in rows if row is not None]
    if len({(row.dtype, row.device) for row in given}) > 1:
        given = [row.to(device, torch.float32) for row in given]
    parts = iter(given)
    zero = given[0].new_zeros(max(row.shape[0] for row in given), given[0].shape[1])
    full = [zero if row is None else next(parts) for row in [*rows, None]]
    if len({row.shape for row in full}) == 1:
        stack = torch.stack(full)  # a few kernels for all; padding takes one an adapter
    else:
        stack = pad_sequence(full, batch_first=True)
    return stack.to(device).to(compute_dtype(stack))


class MergedRows:
    """A model in which every row of a batch runs under one of several merged adapters.

    >>> rows = MergedRows(model, [merge_a, merge_b])                     # doctest: +SKIP
    >>> with rows.rows([0, 1, 0, -1]):                                   # doctest: +SKIP
    ...     logits = model(**batch_of_four).logits

    For :func:`loralloy.live.scoring.predict`, whose batches are subsets in any order:
    ``rows_hook=lambda examples: rows.rows([adapter_of[i] for i in examples])``.

    Stacks take (u + 1) x r x (in + out) entries a module, so a long run loads its adapters in portions (:meth:`load`). Adapters
    may differ in rank and in modules; what an adapter does not have is zero. Linear layers, GPT-2's Conv1D and embeddings.

    Args:
        model: a module tree whose names match the adapters'.
        adapters: module -> factors each, as `merge_factors` returns them; none may be given, to `load` later.

    Raises LoralloyError for modules that the model does not have, shapes that do not fit, and convolutions.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Factors] = ()) -> None:
        self.model, self.count, self._called = model, 0, ModelNames(model)
        self._found = self._called.modules
        self._stacks: dict[str, _Stack] = {}
        self._handles: dict[str, Any] = {}
        self._one: int | None = None  # every row has this adapter
        self._index: Tensor | None = None  # [b], one adapter a row; None with _one None: the base
        self._rows = 0
        self.load(adapters)

    def load(self, adapters: Sequence[Factors]) -> None:
        """Take these adapters in place of those before; their positions are what :meth:`rows` counts from 0."""
        adapters = [self._called.factors(adapter) for adapter in adapters]
        names = list(dict.fromkeys(module for adapter in adapters for module in adapter))
        stacks = {}
        for name in names:
            parts = [adapter.get(name) for adapter in adapters]
            if name not in self._found:
                raise self._called.unknown(next(a for a in adapters if name in a), name, "an adapter")
            checked: set[tuple[Any, ...]] = set()
            for f in parts:
                if f is not None and (look := (f.kind, f.shape)) not in checked:
                    checked.add(look)
                    try:
                        check_fit(name, self._found[name], f)
                    except LoralloyError as error:
                        raise error.within(f"module {name!r}") from None
            stacks[name] = _Stack(name, self._found[name], parts)
        if stacks and not bool(torch.stack([stack.finite.to(self._device) for stack in stacks.values()]).all()):
            name = next(name for name, stack in stacks.items() if not bool(stack.finite))
            raise LoralloyError(
                f"module {name!r}: the factors overflow the model's dtype {stacks[name].A.dtype}; load the model in float32"
            )
        self._stacks, self.count = stacks, len(adapters)
        for name in [n for n in self._handles if n not in stacks]:
            self._handles.pop(name).remove()
        for name in stacks:
            if name not in self._handles:
                self._handles[name] = self._found[name].register_forward_hook(self._hook(name))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextlib.contextmanager
    def rows(self, index: Sequence[int]) -> Iterator[nn.Module]:
        """Inside the block row b of each batch runs under adapter ``index[b]``; -1 is the plain base; one index is for all.

        Raises LoralloyError for an index that is not loaded, or none at all.
        """
        index = list(index)
        if not index:
            raise LoralloyError("no rows given; give the number of an adapter for each row of the batch")
        for i in index:
            if not -1 <= i < self.count:
                raise LoralloyError(f"there is no merged adapter {i}; {self.count} are loaded, -1 is the base")
        before = self._one, self._index, self._rows
        self._one = self._index = None
        self._rows = len(index)
        if len(set(index)) > 1:
            self._index = torch.tensor([self.count if i < 0 else i for i in index], device=self._device)
        elif index[0] >= 0:
            self._one = index[0]
        try:
            yield self.model
        finally:
            self._one, self._index, self._rows = before

    @contextlib.contextmanager
    def use(self, adapters: Sequence[Factors], index: Sequence[int]) -> Iterator[nn.Module]:
        """:meth:`load`, then :meth:`rows`: for adapters that are used once."""
        self.load(adapters)
        with self.rows(index) as model:
            yield model

    def remove(self) -> None:
        """Take the hooks out and let the stacks go: the model is the plain base again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._stacks.clear()
        self.count = 0

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            one, index = self._one, self._index
            if one is None and index is None:
                return None
            stack, x = self._stacks[name], args[0]
            if self._rows not in (1, x.shape[0]):
                raise LoralloyError(
                    f"merged adapters are set for {self._rows} rows but the batch has {x.shape[0]}; give one a row"
                )
            a, b = stack.A, stack.B
            if index is not None:
                index = index.to(a.device)
            if stack.kind == "embedding":
                scale = getattr(module, "embed_scale", 1.0)  # Gemma scales its embeddings
                inner = (a[one][x] if index is None else a[index[:, None], x]) * scale
                return output + (inner @ (b[one] if index is None else b[index])).to(output.dtype)
            x = x.to(a.dtype)
            if index is None:
                return output + (x @ a[one].mT @ b[one]).to(output.dtype)
            flat = x.reshape(x.shape[0], -1, x.shape[-1])
            more = torch.bmm(torch.bmm(flat, a[index].mT), b[index])
            return output + more.reshape(output.shape).to(output.dtype)

        return hook
