"""From a strategy to coefficients: what is done after each experience, before the merge."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..bank import Bank
from ..errors import LoralloyError
from ..weights import Weights
from .buffer import BufferRow
from .strategies import Entropy, Fixed, Grouped, Learned, Merge, RegMean, Search, Strategy, Uniform
from .workshop import Workshop

if TYPE_CHECKING:
    from ..live.learnable import Learnable
    from .grouping import Groups


@dataclass
class Held:
    """The terms of one bank under one merge, kept while strategies follow each other on them: making them is half the time.

    One at a time: another bank or merge takes its place.
    """

    workshop: Workshop
    _merge: Any = field(default=None, repr=False)
    groups: dict[float, Groups] = field(default_factory=dict, repr=False)
    """Group adapters by density."""
    _live: Learnable | None = field(default=None, repr=False)

    def get(self, bank: Bank, merge: Merge) -> Learnable:
        """The bank in the workshop's model under this merge, with nothing set."""
        from ..live.learnable import Learnable

        if self._live is None or self._live.given is not bank or self._merge != (merge.rule, merge.space):
            self.drop()
            self._live = Learnable(self.workshop.model, bank, merge.rule, merge.space, base=self.workshop.base)
            self._merge = merge.rule, merge.space
        self._live.set(None)
        return self._live

    def rest(self) -> None:
        """Nothing set in the model."""
        if self._live is not None:
            self._live.set(None)

    def drop(self) -> None:
        """Take it out of the model."""
        if self._live is not None:
            self._live.remove()
        self._live = self._merge = None


@dataclass(frozen=True)
class Adapted:
    """Coefficients, the bank that they are of (group adapters, for groups), and what there is to say about them."""

    weights: Weights
    bank: Bank
    record: Mapping[str, Any] = field(default_factory=dict)


def adapt(
    strategy: Strategy,
    merge: Merge,
    bank: Bank,
    arrived: Sequence[str],
    rows: Sequence[BufferRow],
    workshop: Workshop,
    held: Held,
    seed: int,
) -> Adapted:
    """The coefficients of `strategy` for the adapters of `bank`, which are named by their domains.

    arrived: the domains in the order they came. rows: of the memory buffer.
    Raises LoralloyError as the strategies do.
    """
    if isinstance(strategy, Fixed):
        return Adapted(Weights({name: float(strategy.weight) for name in bank.names}, "fixed"), bank)
    if isinstance(strategy, Uniform):
        return Adapted(Weights.uniform(bank.names), bank)
    if isinstance(strategy, Search):
        return _search(strategy, merge, bank, rows, workshop, held, seed)
    if isinstance(strategy, RegMean):
        from ..weighting.regmean import regmean

        found = rows if strategy.unlabelled is None else unlabelled(workshop, bank.names, strategy.unlabelled, seed)
        inputs = {name: workshop.inputs([row for row in found if row.domain == name]) for name in bank.names}
        options: dict[str, Any] = {} if strategy.ridge is None else {"ridge": strategy.ridge}
        held.rest()
        solved = regmean(
            workshop.model, bank, inputs, rule=merge.rule, space=merge.space, granularity=strategy.granularity,
            base=workshop.base, **options,
        )  # fmt: skip
        return Adapted(solved.weights, bank, {"settings": solved.settings})
    if isinstance(strategy, Grouped):
        from .grouping import Groups, assign, group_bank

        device = str(next(workshop.model.parameters()).device)
        made = held.groups.setdefault(strategy.density, Groups(strategy.density, device))
        groups = assign([bank[n] for n in arrived], strategy.threshold, strategy.groups, made)
        grouped = group_bank(bank, groups, made)
        return _learn(strategy, "answer", merge, grouped, rows, workshop, held, seed, {"groups": groups})
    if isinstance(strategy, Entropy):
        chosen = rows if strategy.unlabelled is None else unlabelled(workshop, bank.names, strategy.unlabelled, seed)
        return _learn(strategy, "entropy", merge, bank, chosen, workshop, held, seed, {})
    if isinstance(strategy, Learned):
        return _learn(strategy, "answer", merge, bank, rows, workshop, held, seed, {})
    raise LoralloyError(f"strategy {strategy.name!r} merges nothing, so it has no coefficients")


def _learn(
    strategy: Learned | Entropy | Grouped,
    kind: str,
    merge: Merge,
    bank: Bank,
    rows: Sequence[BufferRow],
    workshop: Workshop,
    held: Held,
    seed: int,
    record: Mapping[str, Any],
) -> Adapted:
    from ..weighting.adamerging import adamerging
    from ..weighting.learned import learn

    learned = (adamerging if kind == "entropy" else learn)(
        workshop.model, bank, workshop.objective(rows, kind), rule=merge.rule, space=merge.space,
        form=strategy.form, b_max=strategy.b_max, granularity=strategy.granularity,
        config=dataclasses.replace(strategy.learner(), seed=seed), learnable=held.get(bank, merge),
    )  # fmt: skip
    said = {"history": learned.history, "settings": learned.settings, "start_scale": learned.start_scale}
    return Adapted(learned.weights, bank, {**said, **record})


def _search(
    strategy: Search, merge: Merge, bank: Bank, rows: Sequence[BufferRow], workshop: Workshop, held: Held, seed: int
) -> Adapted:
    from ..weighting.candidates import Candidates, can_learn
    from ..weighting.searched import SearchConfig, search

    options = {} if strategy.budget is None else {"budget": strategy.budget}
    live = held.get(bank, merge) if can_learn(merge.rule, merge.space) else None
    if live is None:
        held.drop()
    candidates = Candidates(workshop.model, bank, merge.rule, merge.space, base=workshop.base, learnable=live)
    try:
        found = search(
            workshop.model, bank, workshop.objective(rows), rule=merge.rule, space=merge.space,
            config=SearchConfig(seed=seed, **options), candidates=candidates, base=workshop.base,
        )  # fmt: skip
    finally:
        candidates.remove()
    return Adapted(found.weights, bank, {"history": found.history, "settings": found.settings})


def unlabelled(workshop: Workshop, domains: Sequence[str], count: int, seed: int) -> list[BufferRow]:
    """`count` training rows of each domain, drawn by a seeded hash of their ids; their labels are left out."""
    found = []
    for name in domains:
        experience = workshop.experiences[name]
        ids, _ = workshop.labels(experience, "train")
        chosen = sorted(ids, key=lambda i: hashlib.sha256(f"{seed}|{name}|{i}".encode()).hexdigest())[:count]
        data = workshop.rows(experience, chosen)
        found += [BufferRow(i, name, "", row) for i, row in zip(chosen, data, strict=True)]
    return found
