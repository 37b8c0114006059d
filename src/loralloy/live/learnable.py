"""A bank inside a running model under one composition whose coefficients are a tensor that gradients flow to.

A module computes with W0 + dW(w), dW any entrywise rule's result in any space (see :mod:`loralloy.merging.basis`). Where dW is
low rank and a gradient is asked for, its factors act on the activations beside the base; otherwise the module's weight is
W0 + dW for as long as the coefficients are set, made once, so that a forward costs what the base's costs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base_ref import BaseRef
from ..errors import LoralloyError
from ..factors import norm
from ..merging.basis import Basis, State, learnable, make_basis
from ..merging.together import Together
from ..weights import Weights
from .fit import check_fit, check_saved_modules, compare_base, packed
from .names import ModelNames

if TYPE_CHECKING:
    from ..bank import Bank
    from ..merging.rule import Rule


@dataclass
class _Module:
    """One module of the base: its basis, and what it computes with at the moment."""

    module: nn.Module
    kind: str
    basis: Basis
    state: State | None = None  # set where the factors act beside the base
    merged: Tensor | None = None  # set where the module's weight is W0 + dW

    def merge(self, state: State) -> None:
        """Shadow the parameter: an instance's attribute is found before its parameter, which stays as it is."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        turned = self.kind == "embedding" or type(self.module).__name__ == "Conv1D"  # W0 is stored as [in, out]
        base = weight.detach()
        base = base.T if turned else base.flatten(1)
        total = self.basis.sum(state, base)
        self.put((None, total.T if turned else total.view(weight.shape)))

    def put(self, state: tuple[State | None, Tensor | None]) -> None:
        """Compute with this (state, merged) from now on; (None, None) is the base."""
        if self.merged is not None:
            self.module.__dict__.pop("weight", None)
        self.state, self.merged = state
        if self.merged is not None:
            self.module.__dict__["weight"] = self.merged

    @property
    def taken(self) -> bool:
        """Whether another composition shadows the weight."""
        shadow = self.module.__dict__.get("weight")
        return shadow is not None and shadow is not self.merged

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if self.state is None else self.basis.beside(args[0], self.state, output)


class Learnable:
    """A base model with a bank in it under one composition; gradients flow to the table of coefficients.

    >>> live = Learnable(model, bank, "ties", "delta")                    # doctest: +SKIP
    >>> with live.at(coefficients()):
    ...     loss = objective.loss(rows)
    >>> loss.backward()

    Attributes:
        names: the adapters, in the order of a table's columns.
        modules: the modules, in the order of a table's rows.
        present: [modules, n] bool, which adapter has which module.
        bank, given: the bank by the model's names of modules, and as it came.

    Args:
        model: any module tree whose module names match the adapters' (see :mod:`.names`). What torch.compile makes of it does
            not see a merged weight, so compile nothing before the bank is taken out. A deep copy that is made while
            coefficients are set has them for good; a state dict is always the base's.
        bank: adapters of that model.
        rule, space: as for `merge`; what must be learnable (see :func:`loralloy.merging.basis.learnable`).
        base: what the loaded model is, where known; it is checked against the bank's.
        dtype: of the terms; None for the model's on a GPU, float32 on a CPU (float64 for a float64 model).
        on_module: called with each module's name when its terms are made (progress).

    Raises LoralloyError for another base model, a module the model does not have, shapes that do not fit, whole saved
    modules, a quantised module, a compiled model, and a rule that cannot be learned through.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        rule: Rule | str = "linear",
        space: str | None = None,
        *,
        base: BaseRef | None = None,
        dtype: torch.dtype | None = None,
        on_module: Callable[[str], None] | None = None,
    ) -> None:
        if base is not None and not bank.assume_same_base:
            verdict, why = compare_base(bank, base, model)
            if verdict != "same":
                raise LoralloyError(
                    f"the bank's adapters are of {bank.base}, the loaded model is {base}: {why}; load the model the adapters "
                    "were trained on, or pass --assume-same-base"
                )
        self._called, self.given = ModelNames(model), bank
        bank = self._called.bank(bank)
        self.model, self.bank = model, bank
        self.rule, self.space = learnable(rule, space)
        self.names, self.modules = bank.names, bank.modules
        self.present = torch.tensor([[m in bank[n] for n in self.names] for m in self.modules])
        found = self._called.modules
        if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in found.values()):
            raise LoralloyError(
                "the model is compiled, and what is compiled does not see the weights change; give the model before torch.compile"
            )
        for name in self.modules:
            self._check(name, found.get(name))
        check_saved_modules(model, bank)
        weights = {name: found[name].weight for name in self.modules}
        self._parts: list[_Module] = []
        self._handles: list[Any] = []
        self._together: list[tuple[Tensor, Together]] = []
        kinds = [next(a.outline(name).kind for a in bank.values() if name in a) for name in self.modules]
        places = [(weights[name].device, self._dtype(weights[name], dtype)) for name in self.modules]
        parts: dict[int, _Module] = {}
        for place in dict.fromkeys(places):
            here = [j for j, own in enumerate(places) if own == place]
            names = [self.modules[j] for j in here]
            made = make_basis(bank, names, self.rule, self.space, dtype=place[1], device=place[0], on_module=on_module)
            bases = [made.pop(name) for name in names]
            together = Together(bases, len(self.names), [kinds[j] == "linear" for j in here])
            self._together.append((torch.tensor(here), together))
            for j, name, basis in zip(here, names, together.bases, strict=True):
                parts[j] = _Module(found[name], kinds[j], basis)
        for j in range(len(self.modules)):
            self._parts.append(parts[j])
            self._handles.append(parts[j].module.register_forward_hook(parts[j].hook))

    def _check(self, name: str, module: nn.Module | None) -> None:
        owner = next(n for n in self.names if name in self.bank[n])
        if module is None:
            error = self._called.unknown(self.bank[owner], name, f"adapter {owner!r}")
            raise LoralloyError(f"{error} (or the model is wrapped, by PEFT say: give the model inside)")
        try:
            check_fit(name, module, self.bank[owner].outline(name))
        except LoralloyError as error:
            raise error.within(f"module {name!r} of adapter {owner!r}") from None
        if "weight" in module.__dict__:
            raise LoralloyError(_taken(name))
        if module._parameters.get("weight") is None or packed(module):
            raise LoralloyError(
                f"module {name!r} is a quantised {type(module).__name__}; load the model in float32 or bfloat16 to learn weights"
            )

    @staticmethod
    def _dtype(weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
        if dtype is not None:
            return dtype
        return torch.promote_types(weight.dtype, torch.float32) if weight.device.type == "cpu" else weight.dtype

    @property
    def device(self) -> torch.device:
        return self._parts[0].module._parameters["weight"].device  # type: ignore[union-attr]

    @property
    def nbytes(self) -> int:
        """Memory of the terms."""
        return sum(part.basis.nbytes for part in self._parts)

    @torch.no_grad()
    def matching_scale(self) -> float:
        """The uniform weight, at most 1, at which ||dW||_F of the merge is the root mean square of the adapters' own norms.

        Over all modules. What these rules make grows in proportion to a uniform weight, so one merge tells. It is 1 where
        the merge is no longer than the adapters are (they cancel out), or nothing at all.
        """
        merged = own = 0.0
        for name, part in zip(self.modules, self._parts, strict=True):
            ones = torch.ones(len(self.names), device=part.basis.who.device)
            merged += float(torch.linalg.vector_norm(part.basis.combine(ones), dtype=torch.float64)) ** 2
            own += sum(norm(f) ** 2 for f in self.bank.factors(name).values())
        ratio = math.sqrt(own / len(self.names) / merged) if merged > 0 else math.inf
        return min(ratio, 1.0) if ratio > 0 else 1.0

    def set(self, table: Tensor | Weights | None) -> None:
        """Set the coefficients: [n] for all modules or [modules, n], or Weights; None for the plain base.

        A table that asks for gradients (while they are enabled) keeps the way to it; any other is merged once.
        Raises LoralloyError for a table of another shape, weights that do not fit the bank, a module under another
        composition, and after `remove`.
        """
        if table is None:
            for part in self._parts:
                part.put((None, None))
            return
        if not self._handles:
            raise LoralloyError("this bank was taken out of the model by remove(); make another Learnable")
        if name := next((m for m, part in zip(self.modules, self._parts, strict=True) if part.taken), None):
            raise LoralloyError(_taken(name))
        if isinstance(table, Weights):
            table = self.bank.fit_weights(table)
            rows = [[table.of(n, m) for n in self.names] for m in self.modules]
            table = torch.tensor(rows, dtype=torch.float64).to(self.device, torch.float32)
        n, many = len(self.names), len(self.modules)
        if tuple(table.shape) not in ((n,), (many, n)):
            raise LoralloyError(
                f"the coefficients are {list(table.shape)}; give [{n}] for all modules or [{many}, {n}], one row a module"
            )
        flows = torch.is_grad_enabled() and table.requires_grad
        table = table if flows else table.detach()
        states = self._states(table.expand(many, n), flows)
        try:
            for part, state in zip(self._parts, states, strict=True):
                part.put((None, None))  # frees the sum before the next is made
                if flows and part.basis.low_rank and part.kind == "linear":
                    part.put((state, None))
                else:
                    part.merge(state)
        except BaseException:  # half of the modules under a composition is none
            self.set(None)
            raise

    def _states(self, table: Tensor, flows: bool) -> list[State]:
        """What each module computes with under the table [modules, n]."""
        found: dict[int, State] = {}
        for here, together in self._together:
            rows = table if len(self._together) == 1 else table[here.to(table.device)]
            found.update(zip(here.tolist(), together.states(rows, rounded=flows), strict=True))
        return [found[j] for j in range(len(self.modules))]

    @contextlib.contextmanager
    def at(self, table: Tensor | Weights | None) -> Iterator[nn.Module]:
        """The model under these coefficients inside the block; what was set before is set again after it."""
        before = [(part.state, part.merged) for part in self._parts]  # as it is: gradients may flow to it
        try:
            self.set(table)
            yield self.model
        finally:
            for part, state in zip(self._parts, before, strict=True):
                part.put(state if self._handles else (None, None))

    def remove(self) -> None:
        """Take everything out: the model is the plain base again."""
        self.set(None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _taken(name: str) -> str:
    return f"module {name!r} holds another composition already; remove() that first"
