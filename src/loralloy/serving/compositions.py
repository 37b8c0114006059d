"""What a composition is in the running model: live by row where it is a weighted sum, else merged once and kept."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..errors import LoralloyError
from ..merging import make_plan, run
from ..weights import Weights
from .by_module import weights_of
from .engine import Busy
from .grammar import AUTO, BASE, Composition, parse, with_terms

if TYPE_CHECKING:
    from ..bank import Bank
    from ..live.paged import PagedModel

_LONG = 16384  # characters that are read in some 20 ms
_HELD = 16  # bytes that a weight by module takes for a character of its text
_READING = 64  # long ones that may wait to be read
T = TypeVar("T")
Cache = Literal["live", "hit", "merged", "cold"]


class NotFound(LoralloyError):
    """A composition names an adapter that the bank does not have."""


@dataclass(frozen=True)
class Ready:
    """A composition that rows can use.

    Attributes:
        composition: with the routed terms in the place of `auto`.
        weights: of the adapters in the live model: the bank's, or the one merged adapter.
        given: the composition's own, each for every module of its adapter where it differs.
        cache: "live" (no merge needed), "hit" (merged before), "merged" (now), "cold" (not merged yet).
        error: ||dW - dW_exact|| / ||dW_exact|| of the merge; 0 for live ones.
        key: of the merged adapter; None for live ones.
    """

    composition: Composition
    weights: Weights
    given: Weights
    cache: Cache
    space: str
    rank: str
    error: float | None = 0.0
    key: str | None = None


@dataclass(eq=False)
class _Merged:
    composition: Composition
    means: Weights  # of each adapter's, over its modules
    name: str  # in the live model
    error: float
    size: int
    users: int = 0
    uses: int = 0
    seconds: float = 0.0
    born: float = field(default_factory=time.time)


class Compositions:
    """The compositions of a bank in a live model.

    A composition whose rule is not a weighted sum is merged by :func:`loralloy.merging.run`, once however many ask for it
    at a time, and kept under a hash of all that it depends on (the adapters' contents, weights, rule with every
    parameter, space, rank); it enters the live model as one more adapter. Those used longest ago are let go of when there
    is no room; one that rows are using never is.

    Args:
        bank, live: the adapters, and the model they are paged into.
        max_bytes: room for merged adapters, in bytes as they are stored.
        max_waiting: merges that may wait for their turn; one runs at a time.
        on_merge: called with a merge's seconds.
        remove: takes an adapter out of the live model once no row that is set uses it (see :meth:`.engine.Engine.later`);
            at once by default.
    """

    def __init__(
        self,
        bank: Bank,
        live: PagedModel,
        max_bytes: int = 2 << 30,
        max_waiting: int = 16,
        on_merge: Callable[[float], None] | None = None,
        remove: Callable[[str], None] | None = None,
    ) -> None:
        self.bank, self.live = bank, live
        self.max_bytes, self.max_waiting = max_bytes, max_waiting
        self._on_merge, self._remove = on_merge or (lambda _: None), remove or live.remove
        self._numbers = itertools.count()
        self._kept: OrderedDict[str, _Merged] = OrderedDict()
        self._under_way: dict[str, asyncio.Task[_Merged]] = {}
        self._pool, self._reader, self._reading = ThreadPoolExecutor(1, "merger"), ThreadPoolExecutor(1, "reader"), 0
        self.evicted = 0

    def read(self, asked: str | Composition) -> Composition:
        """A request's `model`: an adapter's exact name, or a composition in the grammar; or one that was read elsewhere.

        Raises GrammarError, and NotFound for an adapter that is not in the bank.
        """
        text = asked if isinstance(asked, str) else None
        if text is not None and text in self.bank and text not in (AUTO, BASE):
            return Composition(((text, 1.0),))
        made = asked if isinstance(asked, Composition) else parse(asked)
        for name, _ in made.terms:
            if name not in self.bank:
                known = ", ".join(self.bank.names[:20]) + (", ..." if len(self.bank) > 20 else "")
                shown = name if len(name) <= 200 else name[:197] + "..."
                raise NotFound(f"there is no adapter {shown!r} in this bank; it has {known}")
        return made

    async def asked(self, what: str | Composition) -> Composition:
        """:meth:`read`; in a thread what takes longer than others should wait."""
        if isinstance(what, str) and len(what) > _LONG:
            return await self.aside(len(what), self.read, what)
        return self.read(what)

    async def aside(self, size: int, work: Callable[..., T], *args: Any) -> T:
        """`work` in a thread, for something of so many characters. What is long goes one by one: Python runs one thread at a
        time, and many at once would leave the decoder and the event loop little. Raises Busy when too many wait."""
        if size <= _LONG:
            return await asyncio.to_thread(work, *args)
        if self._reading >= _READING:
            raise Busy(f"{self._reading} long compositions wait to be read", 5)
        self._reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, work, *args)
        finally:
            self._reading -= 1

    @asynccontextmanager
    async def use(
        self, composition: Composition, routed: Weights | None = None, merge: bool = True
    ) -> AsyncIterator[Ready]:
        """The composition, ready, for as long as the block lasts; `routed` stands in for `auto`.

        Without `merge` it is used only if it is live or kept, and else "cold", which no row can use. Raises LoralloyError for
        what cannot be merged, Busy when too many merges wait.
        """
        filled = self.fill(composition, routed)
        if filled.live:
            # what a weight by module means is read from the adapters
            yield await self.aside(filled.size, self._live, filled) if filled.by_module else self._live(filled)
            return
        # hashing reads the adapters, the first time
        key, given = await self.aside(filled.size, self._settle, filled)
        if not merge and key not in self._kept:
            yield self._cold(filled, key, given)
            return
        entry, cache = await self._merged(filled, key, given)
        try:
            yield self._ready(filled, key, given, entry, cache)
        finally:
            entry.users -= 1

    def fill(self, composition: Composition, routed: Weights | None = None) -> Composition:
        """The composition with the routed terms (see :func:`.grammar.with_terms`); the base model alone for weights of 0 (a
        fallback) and under `base`."""
        if not composition.auto:
            return composition
        if routed is None:
            raise LoralloyError("this server has no index to route with, so there is no auto; name adapters")
        return with_terms(composition, routed.items())

    def look(self, composition: Composition) -> Ready:
        """How a composition stands, without merging it."""
        if composition.live:
            return self._live(composition)
        key, given = self._settle(composition)
        entry = self._kept.get(key)
        return (
            self._cold(composition, key, given) if entry is None else self._ready(composition, key, given, entry, "hit")
        )

    @property
    def kept(self) -> list[tuple[Ready, _Merged]]:
        """The merged ones, the one used last first; weights by module are given by their means."""
        return [(self._ready(e.composition, k, e.means, e, "hit"), e) for k, e in reversed(self._kept.items())]

    @property
    def size(self) -> int:
        """Bytes of the merged adapters."""
        return sum(entry.size for entry in self._kept.values())

    def key(self, composition: Composition) -> str:
        """A hash of all that the merged adapter depends on."""
        return self._settle(composition)[0]

    def _settle(self, composition: Composition) -> tuple[str, Weights]:
        """The key, and the weights for every module."""
        space, rank = _settled(composition)
        weights = weights_of(self.bank, composition.terms)
        terms = sorted(
            ([self.bank[name].content_hash, weight] for name, weight in weights.to_dict()["weights"].items()),
            key=lambda term: (term[0], json.dumps(term[1], sort_keys=True)),
        )
        said = json.dumps([1, terms, str(composition.bound), space, rank], sort_keys=True)
        return "merged:" + hashlib.sha256(said.encode()).hexdigest()[:32], weights

    def close(self) -> None:
        for pool in (self._pool, self._reader):
            pool.shutdown(wait=False, cancel_futures=True)

    def _live(self, composition: Composition) -> Ready:
        terms = composition.terms or tuple((name, 0.0) for name in self.bank.names[:1])
        weights = weights_of(self.bank, terms)
        return Ready(composition, weights, weights, "live", "delta", "full")

    def _ready(self, composition: Composition, key: str, given: Weights, entry: _Merged, cache: Cache) -> Ready:
        space, rank = _settled(composition)
        return Ready(composition, Weights({entry.name: 1.0}), given, cache, space, rank, entry.error, key)

    def _cold(self, composition: Composition, key: str, given: Weights) -> Ready:
        space, rank = _settled(composition)
        return Ready(composition, Weights({BASE: 0.0}), given, "cold", space, rank, None, key)

    async def _merged(self, composition: Composition, key: str, given: Weights) -> tuple[_Merged, Cache]:
        cache: Cache = "hit"
        while key not in self._kept:  # again, if others drove it out before this one had its turn
            cache = "merged"
            if key not in self._under_way:
                if len(self._under_way) >= self.max_waiting:
                    raise Busy(f"{len(self._under_way)} compositions wait to be merged", 5)
                task = asyncio.get_running_loop().create_task(self._merge(key, composition, given))
                self._under_way[key] = task
                task.add_done_callback(lambda _: self._under_way.pop(key, None))
            await asyncio.shield(self._under_way[key])  # others may wait for it when this client has gone
        entry = self._kept[key]
        self._kept.move_to_end(key)
        entry.users, entry.uses = entry.users + 1, entry.uses + 1
        return entry, cache

    async def _merge(self, key: str, composition: Composition, given: Weights) -> _Merged:
        entry = await asyncio.get_running_loop().run_in_executor(self._pool, self._merge_now, key, composition, given)
        self._on_merge(entry.seconds)
        try:
            self._make_room(entry.size)
        except Busy:
            self._remove(entry.name)
            raise
        self._kept[key] = entry
        return entry

    def _merge_now(self, key: str, composition: Composition, weights: Weights) -> _Merged:
        start = time.perf_counter()
        plan = make_plan(self.bank, weights, composition.bound, composition.space, composition.rank, name=key)  # type: ignore[arg-type]
        size = plan.bytes_out + _HELD * sum(len(weight.text) for weight in composition.by_module.values())
        if size > self.max_bytes:
            text = str(composition)
            shown = text if len(text) <= 1000 else text[:997] + "..."
            raise LoralloyError(
                f"merged, {shown} would take {size >> 20} MiB at rank {plan.top}, and there is room for "
                f"{self.max_bytes >> 20}; give a smaller rank, as in '@ {composition.rule}(rank=16)'"
            )
        made = run(plan, self.bank)
        # a number, since one let go of under this key may still be in the model for a moment
        means = Weights(dict(weights.items()))
        entry = _Merged(composition, means, f"{key}#{next(self._numbers)}", made.report.error, size)
        self.live.add(made.adapter, entry.name)
        try:
            self.live.load(entry.name)  # here, not in the decoder's time
        except LoralloyError:
            self._remove(entry.name)
            raise
        entry.seconds = time.perf_counter() - start
        return entry

    def _make_room(self, size: int) -> None:
        for key, entry in [(k, e) for k, e in self._kept.items() if not e.users]:
            if self.size + size <= self.max_bytes:
                return
            del self._kept[key]
            self._remove(entry.name)
            self.evicted += 1
        if self.size + size > self.max_bytes:
            raise Busy("all merged compositions are in use, and there is no room for another", 5)


def _settled(composition: Composition) -> tuple[str, str]:
    """The space and the rank that the rule takes where none is given."""
    rule = composition.bound
    return composition.space or rule.spaces[0], str(composition.rank or rule.default_rank)
