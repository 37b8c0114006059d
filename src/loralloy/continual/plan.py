"""What a stream has to compute: adapters, experiences and runs, each under a key made of all that decides it.

Two runs that come to the same state (one strategy, one set of domains, one seed, and nothing that depends on the order)
share one experience: it is computed once, whatever orders there are. Keys are made of inputs, not of results, so a plan
is made before any work, and a changed stream file computes only what it changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import LoralloyError
from .buffer import MemoryBuffer
from .experience import DomainStream
from .fields import BufferEntry
from .strategies import Gradient, Grouped, Merge, Oracle, Sequential, Strategy, digest
from .workshop import Workshop

PROTOCOL = 1
"""Raised when the same inputs are computed otherwise: older results are then made anew."""


@dataclass(frozen=True)
class AdapterJob:
    """One adapter to train: on one domain or several, from the base or from `init`; `lead` is the run's first adapter."""

    key: str
    domains: tuple[str, ...]
    seed: int
    init: AdapterJob | None = None
    lead: AdapterJob | None = None

    @property
    def folder(self) -> str:
        """A name for people, and the key."""
        first = self.domains[0] if len(self.domains) == 1 else f"joint-{len(self.domains)}"
        return f"{first}-seed{self.seed}-{self.key}"


@dataclass(frozen=True)
class BufferJob:
    """A memory buffer: its settings, its seed, and the domains offered to it, in this order."""

    key: str
    settings: BufferEntry
    seed: int
    domains: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One experience of one strategy: what is merged after it, and what is then evaluated.

    adapters: by domain, sorted by name (a merge's result does not depend on the order then); one entry where nothing is
    merged, none for the plain base. arrived: the domains in order, for what depends on it. evaluated: sorted.
    """

    key: str
    seed: int
    strategy: Strategy | None
    merge: Merge | None
    arrived: tuple[str, ...]
    adapters: tuple[AdapterJob, ...]
    evaluated: tuple[str, ...]
    buffer: BufferJob | None
    lead: AdapterJob | None = None


@dataclass(frozen=True)
class Run:
    """One strategy under one merge, in one order, from one seed. steps[t]: keys whose accuracies make row t; empty: none."""

    seed: int
    order: tuple[str, ...]
    strategy: str
    merge: str
    kind: str
    settings: Mapping[str, Any]
    steps: tuple[tuple[str, ...], ...]
    base: str
    buffer: Mapping[str, Any] | None = None


@dataclass
class Plan:
    """Runs, and the steps they need by key, in the order in which they are computed."""

    runs: list[Run] = field(default_factory=list)
    steps: dict[str, Step] = field(default_factory=dict)

    def to_dict(self) -> list[dict[str, Any]]:
        """The runs as plain JSON."""
        return [asdict(run) for run in self.runs]


def make_plan(stream: DomainStream, workshop: Workshop) -> Plan:
    """All runs of a stream. Raises LoralloyError for a strategy that cannot learn through a rule it is to be run with."""
    if any(strategy.balance for strategy in stream.strategies):
        workshop.check_balance()  # before hours of training
    for strategy in stream.strategies:
        for merge in merges_for(strategy, stream.merges):
            check(strategy, merge)
    planner, plan = _Planner(stream, workshop), Plan()
    # seed by seed and stage by stage: adapters come when needed, and one merge's strategies stand together
    for seed in stream.fields.seeds:
        found: list[tuple[int, int, Step]] = []
        for order in stream.orders:
            base = planner.base(seed, order)
            found.append((0, -1, base))
            for m, merge in enumerate([None, *stream.merges]):
                for strategy in stream.strategies:
                    if merge not in merges_for(strategy, stream.merges):
                        continue
                    rows = planner.rows(strategy, merge, seed, order)
                    found += [(t, m, step) for t, steps in enumerate(rows, 1) for step in steps]
                    own = (
                        strategy.buffer(stream.fields.buffer) if strategy.needs_buffer or workshop.remembers() else None
                    )
                    plan.runs.append(
                        Run(
                            seed, order, strategy.name, merge.name if merge else "", strategy.kind, strategy.settings,
                            tuple(tuple(step.key for step in steps) for steps in rows), base.key,
                            own.model_dump(mode="json") if own else None,
                        )
                    )  # fmt: skip
        for _, _, step in sorted(found, key=lambda item: item[:2]):
            plan.steps.setdefault(step.key, step)
    return plan


def merges_for(strategy: Strategy, merges: Sequence[Merge]) -> list[Merge | None]:
    """The merges that a strategy is run with; [None] for one that merges nothing."""
    if not strategy.merges_adapters:
        return [None]
    if strategy.only is None:
        return list(merges)
    return [m for m in merges if {m.name, m.rule.name, m.space} & set(strategy.only)]


def check(strategy: Strategy, merge: Merge | None) -> None:
    """Raises LoralloyError when a strategy cannot be run with a merge."""
    if merge is None:
        return
    try:
        if strategy.kind in ("learned", "entropy", "grouped"):
            from ..merging.basis import learnable

            learnable(merge.rule, merge.space)
        if strategy.kind == "regmean":
            from ..weighting.regmean import check_sum

            check_sum(merge.rule, merge.space)
        if strategy.balance and merge.rank == 1:
            raise LoralloyError("a balance takes one direction of its module, and the merge has rank 1; give 2 or more")
    except LoralloyError as error:
        raise LoralloyError(
            f"strategy {strategy.name!r} cannot be run with merge {merge.name!r}: {error}; name the merges it is for in "
            "`only`"
        ) from None


class _Planner:
    def __init__(self, stream: DomainStream, workshop: Workshop) -> None:
        self.stream, self.workshop = stream, workshop
        self.prints = {e.name: workshop.fingerprint(e) for e in stream.experiences}
        self.train, self.evaluate = workshop.identity("train"), workshop.identity("evaluate")
        self.names = tuple(sorted(self.prints))

    def named(self, domains: Sequence[str]) -> list[list[str]]:
        """Names beside contents: buffers and results are written by domain, so a renamed one is not theirs."""
        return [[name, self.prints[name]] for name in domains]

    def adapter(
        self, domains: Sequence[str], seed: int, init: AdapterJob | None, lead: AdapterJob | None
    ) -> AdapterJob:
        told = {
            "protocol": PROTOCOL, "train": self.train, "data": [self.prints[d] for d in domains], "seed": seed,
            "init": init and init.key, "lead": lead and lead.key,
        }  # fmt: skip
        return AdapterJob(digest(told), tuple(domains), seed, init, lead)

    def lead(self, seed: int, order: Sequence[str]) -> AdapterJob | None:
        return self.adapter(order[:1], seed, None, None) if self.workshop.leads() else None

    def own(self, name: str, seed: int, order: Sequence[str]) -> AdapterJob:
        """The adapter of one domain: of all orders, unless the head is learned on the first domain."""
        return self.adapter([name], seed, None, None if name == order[0] else self.lead(seed, order))

    def buffer(self, settings: BufferEntry, seed: int, arrived: Sequence[str]) -> BufferJob:
        free = MemoryBuffer(settings.per_class, settings.total, settings.selection, seed).order_free
        domains = tuple(sorted(arrived)) if free else tuple(arrived)
        told = [PROTOCOL, settings.model_dump(mode="json"), seed, self.named(domains), self.train]
        return BufferJob(digest(told), settings, seed, domains)

    def step(
        self, strategy: Strategy | None, merge: Merge | None, seed: int, order: Sequence[str], arrived: Sequence[str],
        adapters: Sequence[AdapterJob], evaluated: Sequence[str],
    ) -> Step:  # fmt: skip
        lead = self.lead(seed, order)
        uses = self.workshop.remembers() or (strategy is not None and strategy.needs_buffer)
        settings = self.stream.fields.buffer if strategy is None else strategy.buffer(self.stream.fields.buffer)
        buffer = self.buffer(settings, seed, arrived) if uses else None
        evaluated = tuple(sorted(evaluated))
        told = {
            "protocol": PROTOCOL, "evaluate": self.evaluate, "data": self.named(evaluated), "seed": seed,
            # one adapter as it is, is the same whichever strategy made it
            "strategy": strategy.settings if strategy and merge else bool(adapters),
            "merge": merge and merge.settings, "lead": lead and lead.key,
            "adapters": [job.key for job in adapters], "buffer": buffer and buffer.key,
            "uncut": bool(merge and self.stream.fields.uncut),
            # the library's defaults may change under what was learned before
            "learner": strategy.defaults() if isinstance(strategy, Gradient) else None,
            # HAM's groups depend on who came first, and so does what the merge of one chain is
            "order": list(arrived) if isinstance(strategy, Grouped) else None,
        }  # fmt: skip
        return Step(digest(told), seed, strategy, merge, tuple(arrived), tuple(adapters), evaluated, buffer, lead)

    def base(self, seed: int, order: Sequence[str]) -> Step:
        """The plain base model on every domain: the baseline of forward transfer."""
        return self.step(None, None, seed, order, self.names, (), self.names)

    def rows(self, strategy: Strategy, merge: Merge | None, seed: int, order: Sequence[str]) -> list[list[Step]]:
        """The steps of each experience of one run; none where it is not evaluated."""
        last = (strategy.after or self.stream.fields.after) == "last"
        found: list[list[Step]] = []
        chain: AdapterJob | None = None
        for t in range(1, len(order) + 1):
            arrived = order[:t]
            seen = self.names if self.stream.fields.unseen_too else arrived
            if isinstance(strategy, Sequential):
                new = self.own(order[t - 1], seed, order)
                chain = new if chain is None else self.adapter(order[t - 1 : t], seed, chain, self.lead(seed, order))
            if last and t < len(order):
                found.append([])
            elif isinstance(strategy, Oracle):
                found.append([
                    self.step(strategy, None, seed, order, (name,), (self.own(name, seed, order),), (name,))
                    for name in arrived
                ])  # fmt: skip
            elif strategy.kind == "joint":
                job = self.own(order[0], seed, order) if t == 1 else self.adapter(sorted(arrived), seed, None, None)
                found.append([self.step(strategy, None, seed, order, arrived, (job,), seen)])
            elif chain is not None:
                found.append([self.step(strategy, None, seed, order, arrived, (chain,), seen)])
            else:
                jobs = [self.own(name, seed, order) for name in sorted(arrived)]
                found.append([self.step(strategy, merge, seed, order, arrived, jobs, seen)])
        return found
