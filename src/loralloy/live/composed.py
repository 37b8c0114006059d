"""Compositions inside a running model: each row of a batch has its own weights, nothing is merged.

For row b of a batch and a module with adapters i = 1..n,

    y_b = W0 x_b + sum_i w_bi s_i B_i A_i x_b = W0 x_b + B_cat ((w_b (x) 1_r) * (A_cat x_b)),

two thin matrix products and one broadcast multiply in r-space, whatever the number of different compositions in the
batch (:mod:`.stacked`). It is exact: the result equals a model with the merged adapter `linear` in delta space, row by row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base_ref import BaseRef
from ..errors import LoralloyError
from ..weights import Weights
from .fit import check_base, check_fit, check_saved_modules
from .gated import Gate, Gated
from .group import grouped, spread
from .names import ModelNames
from .stacked import Stacked, overflow, place, scaled

if TYPE_CHECKING:
    from ..bank import Bank


class LiveModel:
    """A base model with a bank composed into it, each row of a batch by its own weights.

    >>> live = LiveModel(model, bank)                                    # doctest: +SKIP
    >>> with live.compose([Weights({"a": 0.7, "b": 0.3}), Weights({"c": 1.0})]):
    ...     logits = model(**batch_of_two_rows).logits

    Outside `compose` the model is the plain base. `remove()` takes the hooks out again.

    Args:
        model: a transformers model (any module tree whose module names match the adapters', see :mod:`.names`).
        bank: adapters of that model.
        base: what the loaded model is, where known (see `loralloy.live.base.base_fingerprint`); it is checked against
            the bank's.
        assume_same_base: skip that check.

    Raises LoralloyError for another base model, a module the model does not have, shapes that do not fit, a convolution
    with groups, and adapters with fully saved modules (heads) other than the model's own, which cannot be mixed by row.
    """

    def __init__(
        self, model: nn.Module, bank: Bank, base: BaseRef | None = None, assume_same_base: bool = False
    ) -> None:
        if base is not None and not (assume_same_base or bank.assume_same_base):
            check_base(bank, base, model)
        names = ModelNames(model)
        bank = names.bank(bank)
        self.model, self.bank, self.names = model, bank, bank.names
        self.parts: dict[str, Stacked] = {}
        """By module of the base: the stacked factors of all adapters."""
        self._handles: list[Any] = []
        found = names.modules
        for name in bank.modules:
            factors = bank.factors(name)
            owner = next(iter(factors))
            if name not in found:
                raise names.unknown(bank[owner], name, f"adapter {owner!r}")
            try:
                check_fit(name, found[name], next(iter(factors.values())))
            except LoralloyError as error:
                raise error.within(f"module {name!r} of adapter {owner!r}") from None
            dtype, device = place(found[name])
            part = Stacked(
                name,
                next(iter(factors.values())).kind,
                {n: scaled(f, dtype, device) for n, f in factors.items()},
                self.names,
            )
            if not (bool(torch.isfinite(part.A).all()) and bool(torch.isfinite(part.B).all())):
                raise overflow(name, dtype)
            self.parts[name] = part
        check_saved_modules(model, bank)
        self._groups = grouped(self.parts)
        try:
            for name, part in self.parts.items():
                self._handles.append(found[name].register_forward_hook(part.hook))
        except BaseException:
            self.remove()
            raise

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def set(self, weights: Weights | Sequence[Weights] | None) -> None:
        """Set one composition for all rows, one for each row of the next batches, or None for the plain base."""
        if weights is None:
            for group in self._groups:
                group.setting = None
            return
        rows = [weights] if isinstance(weights, Weights) else list(weights)
        if not rows:
            raise LoralloyError("no weights given; give one composition, or one a row")
        for i, row in enumerate(rows):
            for name in row.names:
                if name not in self.names:
                    raise LoralloyError(
                        f"weights name adapter {name!r}, which is not in the bank ({', '.join(self.names)})"
                    )
            if row.per_module:
                rows[i] = self.bank.fit_weights(row)  # a misspelt module would be a weight of 0 that nobody sees
        spread(self._groups, self.names, rows)

    @contextlib.contextmanager
    def compose(self, weights: Weights | Sequence[Weights] | None) -> Iterator[nn.Module]:
        """The model under these weights inside the block; whatever was set before is set again after it."""
        before = [group.setting for group in self._groups]
        self.set(weights)
        try:
            yield self.model
        finally:
            for group, setting in zip(self._groups, before, strict=True):
                group.setting = setting

    @contextlib.contextmanager
    def gate(
        self,
        gate: Gate,
        allowed: Tensor | None = None,
        index: Sequence[int] | None = None,
        pooled: Tensor | None = None,
    ) -> Iterator[nn.Module]:
        """The model under a gate inside the block: coefficients that change by token or row (see :class:`Gated`).

        For `predict`, whose passes over a cache must find their prompt's, make one :class:`Gated` and pass its `rows`.
        """
        with Gated(self, gate, allowed).rows(index, pooled) as model:
            yield model

    def remove(self) -> None:
        """Take the hooks out: the model is the plain base again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
