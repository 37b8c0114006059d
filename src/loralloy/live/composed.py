"""Compositions inside a running model: each row of a batch has its own weights, nothing is merged.

For row b of a batch and a module with adapters i = 1..n,

    y_b = W0 x_b + sum_i w_bi s_i B_i A_i x_b = W0 x_b + B_cat ((w_b (x) 1_r) * (A_cat x_b)),

two thin matrix products and one broadcast multiply in r-space, whatever the number of different compositions in the
batch. It is exact: the result equals a model with the merged adapter `linear` in delta space, row by row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..base_ref import BaseRef
from ..errors import LoralloyError
from ..factors import LoraFactors
from ..weights import Weights
from .fit import check_base, check_fit, check_saved_modules
from .gated import Gate, Gated

if TYPE_CHECKING:
    from ..bank import Bank


def scaled(f: LoraFactors, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A [r, in, ...] and B [out, r, ...] with the scaling in them, as they are stacked.

    The root of the scaling goes to each side, so that 16-bit factors neither over- nor underflow.
    """
    root = abs(f.scaling) ** 0.5
    a, b = f.A.float() * (root if f.scaling >= 0 else -root), f.B.float() * root
    return a.to(device, dtype), b.to(device, dtype)


def place(target: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype and device that factors of this module of the base have to have."""
    weight = target.weight
    assert isinstance(weight, Tensor)  # check_fit has seen to it
    # a quantised base computes in the dtype of its input
    return weight.dtype if weight.dtype.is_floating_point else torch.float32, weight.device


class Stacked:
    """The stacked factors of one module of the base, and the hook that adds their weighted output.

    `parts`: by adapter, what :func:`scaled` gives; `names`: all adapters, in the order of the weights.
    """

    def __init__(self, name: str, kind: str, parts: Mapping[str, tuple[Tensor, Tensor]], names: Sequence[str]) -> None:
        self.name, self.kind = name, kind
        self.stack(parts, names)

    def stack(self, parts: Mapping[str, tuple[Tensor, Tensor]], names: Sequence[str]) -> None:
        """Take these adapters' factors (at least one's) in place of what was there; nothing is set then."""
        self.A = torch.cat([a for a, _ in parts.values()], 0)  # [R, in, ...]
        self.B = torch.cat([b for _, b in parts.values()], 1)  # [out, R, ...]
        index = {n: i for i, n in enumerate(names)}
        layout = [(index[n], len(a)) for n, (a, _) in parts.items()]
        # column of A_cat -> index of its adapter, so that a row's weights spread to its R coefficients by one gather
        owner = [i for i, rank in layout for _ in range(rank)]
        self.owner = torch.tensor(owner, device=self.A.device)
        self.layout = tuple(layout), self.A.device  # modules of one layout have the same coefficients
        self.coefficients: Tensor | None = None  # [rows, R] or [1, R]
        self.rows = 1  # how many rows were given; 1 is for all
        self.gated: Gated | None = None  # while set, a gate decides and not the coefficients
        self._stacked: tuple[Tensor, Tensor] | None = None

    def set(self, rows: Tensor) -> None:
        """rows [b, n] of weights -> coefficients [b, R] (or [1, R] when all rows agree), None when all are zero."""
        spread = rows.to(self.owner.device)[:, self.owner]
        self.rows = spread.shape[0]
        if self.rows > 1 and bool((spread == spread[:1]).all()):
            spread = spread[:1]
        self.coefficients = spread if bool((spread != 0).any()) else None

    def stacked(self, n: int) -> tuple[Tensor, Tensor]:
        """The factors by adapter, padded to one rank: A [n, r, in] and B^T [n, r, out]; zero where one has no such module."""
        if self._stacked is None:
            mine = [self.owner == i for i in range(n)]
            a, b = (pad_sequence([t[m] for m in mine], batch_first=True) for t in (self.A, self.B.T))
            self._stacked = a, b
        return self._stacked

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.gated is not None:
            return output + self.gated.output(self, args[0]).to(output.dtype)
        if self.coefficients is None:
            return None
        x = args[0]
        c = self.coefficients
        if self.rows not in (1, x.shape[0]):
            raise LoralloyError(
                f"weights are set for {self.rows} rows but the batch has {x.shape[0]}; give one weight a row, or one for all"
            )
        if self.kind == "embedding":
            inner = self.A.T[x] * getattr(module, "embed_scale", 1.0)  # [b, l, R]; Gemma scales its embeddings
        elif self.kind == "conv":
            assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            inner = module._conv_forward(x.to(self.A.dtype), self.A, None)  # [b, R, ...]
            inner = inner * c.to(inner.dtype).reshape(c.shape + (1,) * (inner.ndim - 2))
            return output + _pointwise(inner, self.B).to(output.dtype)
        else:
            inner = x.to(self.A.dtype) @ self.A.T  # [b, ..., R]
        inner = inner * c.to(inner.dtype).reshape(c.shape[0], *([1] * (inner.ndim - 2)), c.shape[1])
        return output + (inner @ self.B.T).to(output.dtype)


def _pointwise(x: Tensor, b: Tensor) -> Tensor:
    """The 1x1 convolution with b [out, R, 1, ...] on x [b, R, ...]."""
    return (x.movedim(1, -1) @ b.flatten(1).T).movedim(-1, 1)


def overflow(name: str, dtype: torch.dtype) -> LoralloyError:
    return LoralloyError(f"module {name!r}: the factors overflow the model's dtype {dtype}; load the model in float32")


def spread(parts: Mapping[str, Stacked], names: Sequence[str], rows: Sequence[Weights]) -> None:
    """Set each module's coefficients to these rows' weights of the adapters `names`, in the order of the stacks."""
    if any(row.per_module for row in rows):
        for name, part in parts.items():
            part.set(torch.tensor([[row.of(n, name) for n in names] for row in rows]))
        return
    table = torch.tensor([[row.of(n) for n in names] for row in rows])
    known: dict[Any, tuple[Tensor | None, int]] = {}  # setting waits for the device: once, not once a module
    for part in parts.values():
        if part.layout in known:
            part.coefficients, part.rows = known[part.layout]
        else:
            part.set(table)
            known[part.layout] = part.coefficients, part.rows


class LiveModel:
    """A base model with a bank composed into it, each row of a batch by its own weights.

    >>> live = LiveModel(model, bank)                                    # doctest: +SKIP
    >>> with live.compose([Weights({"a": 0.7, "b": 0.3}), Weights({"c": 1.0})]):
    ...     logits = model(**batch_of_two_rows).logits

    Outside `compose` the model is the plain base. `remove()` takes the hooks out again.

    Args:
        model: a transformers model (any module tree whose module names match the adapters').
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
            check_base(bank, base)
        self.model, self.bank, self.names = model, bank, bank.names
        self.parts: dict[str, Stacked] = {}
        """By module of the base: the stacked factors of all adapters."""
        self._handles: list[Any] = []
        found = dict(model.named_modules())
        for name in bank.modules:
            factors = bank.factors(name)
            owner = next(iter(factors))
            if name not in found:
                raise LoralloyError(
                    f"adapter {owner!r} has module {name!r}, which the model does not; it is not of this base model"
                )
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
            for part in self.parts.values():
                part.coefficients = None
            return
        rows = [weights] if isinstance(weights, Weights) else list(weights)
        if not rows:
            raise LoralloyError("no weights given; give one composition, or one a row")
        for row in rows:
            for name in row.names:
                if name not in self.names:
                    raise LoralloyError(
                        f"weights name adapter {name!r}, which is not in the bank ({', '.join(self.names)})"
                    )
            if row.per_module:
                self.bank.check_weights(row)  # a misspelt module would be a weight of 0 that nobody sees
        spread(self.parts, self.names, rows)

    @contextlib.contextmanager
    def compose(self, weights: Weights | Sequence[Weights] | None) -> Iterator[nn.Module]:
        """The model under these weights inside the block; whatever was set before is set again after it."""
        before = {name: (part.coefficients, part.rows) for name, part in self.parts.items()}
        self.set(weights)
        try:
            yield self.model
        finally:
            for name, part in self.parts.items():
                part.coefficients, part.rows = before[name]

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
