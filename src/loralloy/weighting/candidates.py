"""A bank inside a model under one rule, for whatever weights are to be measured; no gradients.

An entrywise rule runs through :class:`loralloy.live.learnable.Learnable`, whose terms are made once; any other rule, and any cut
to a rank, merges the bank anew for each candidate, and so does a quantised base, whose weights nothing can be added to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import LoralloyError
from ..live import LiveModel
from ..live.fit import packed
from ..live.learnable import Learnable
from ..live.merged_rows import MergedRows
from ..live.names import named_for
from ..merging import Rule, merge
from ..merging.basis import learnable
from ..merging.plan import Rank, check_rank, check_rule
from ..weights import Weights

if TYPE_CHECKING:
    from ..bank import Bank
    from ..base_ref import BaseRef


class Candidates:
    """Compositions of one bank under one rule, one after the other.

    >>> candidates = Candidates(model, bank, "tsv_m")                    # doctest: +SKIP
    >>> with candidates.at(Weights({"a": 0.7, "b": 0.3})):               # doctest: +SKIP
    ...     loss = objective.loss(range(objective.size))

    Args:
        model, bank, base: as for :class:`loralloy.live.LiveModel`.
        rule, space: any rule.
        rank: what each merge is cut to; "full" is the rule's own result, which is what gradients see too.
        learnable: one that is in the model already, for this rule and space; it is used where it serves, and left there.

    Raises LoralloyError for another base model, adapters that do not fit it, and a rule, space or rank there is not.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        rule: Rule | str = "linear",
        space: str | None = None,
        rank: Rank = "full",
        *,
        base: BaseRef | None = None,
        learnable: Learnable | None = None,
    ) -> None:
        given, bank = bank, named_for(model, bank)
        self.model, self.bank, self.names = model, bank, bank.names
        self.rule, self.space = check_rule(rule, space)  # type: ignore[arg-type]
        self.rank = check_rank(rank)
        adapted = set(bank.modules)
        self._packed = any(packed(module) for name, module in model.named_modules() if name in adapted)
        self.live: Learnable | None = None if self.merges else learnable
        self._own = self.live is None
        self._rows: MergedRows | None = None
        if self.merges:
            LiveModel(model, bank, base).remove()  # looks whether bank and model fit
            self._rows = MergedRows(model)
        elif self.live is None:
            self.live = Learnable(model, given, self.rule, self.space, base=base)

    @property
    def merges(self) -> bool:
        """Whether every candidate is merged, rather than summed from terms that are made once."""
        return self._packed or self.rank != "full" or not can_learn(self.rule, self.space)

    @contextlib.contextmanager
    def at(self, weights: Weights | None) -> Iterator[nn.Module]:
        """The model under these weights inside the block, without gradients; None is the plain base."""
        if weights is not None:
            weights = self.bank.fit_weights(weights)
        with torch.no_grad():
            if self.live is not None:
                with self.live.at(weights):
                    yield self.model
            elif weights is None or not any(w for name in self.names for w in self._of(weights, name)):
                yield self.model
            else:
                assert self._rows is not None
                made = merge(
                    self.bank, weights, self.rule, self.space, self.rank, torch.float32,
                    measure="none", device=next(self.model.parameters()).device,
                ).adapter  # fmt: skip
                try:
                    with self._rows.use([made], [0]):
                        yield self.model
                finally:
                    self._rows.load([])

    def _of(self, weights: Weights, name: str) -> list[float]:
        return [weights.of(name, module) for module in self.bank[name]]

    def remove(self) -> None:
        """Take the hooks out: the model is the plain base again (but for a `learnable` that was given)."""
        if self.live is not None and self._own:
            self.live.remove()
        if self._rows is not None:
            self._rows.remove()


def can_learn(rule: Rule, space: str) -> bool:
    """Whether gradients can flow to a rule's coefficients."""
    try:
        learnable(rule, space)
    except LoralloyError:
        return False
    return True
