"""Cells of a half: a bank of two adapters, one probe, many merges, each answered and written down."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from choosing import chosen
from designs import Method
from gates import discarded, over_depth
from kept import key
from learned import learned
from plan import Cell, Half, Job, adapters, split

import sites
from devices import device_name, let_go
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.live.learnable import Learnable
from loralloy.live.merged_rows import MergedRows
from loralloy.merging import get_rule, make_plan, run
from loralloy.merging.tada import Found, watched
from loralloy.weighting.balance import balance
from loralloy.weighting.candidates import can_learn
from loralloy.weighting.common import freed_bank
from loralloy.weighting.gating import Gate
from loralloy.weighting.probed import Readings, probe
from loralloy.weighting.tada import in_order
from loralloy.weights import Weights

NAMES = ("task", "domain")
COMMON = 16  # directions that are read; methods use fewer


class Site(sites.Site):
    """A half in this process: its model, the pair that is held, and what its adapters answered to."""

    def __init__(self, half: Half, out: Path, device: str | None = None, inner: Any = None) -> None:
        self.half, self.out = half, out
        if inner is None and half.name == "language":
            from site_text import TextSite

            inner = TextSite(half, out, device or "auto")
        elif inner is None:
            from site_images import ImageSite

            inner = ImageSite(half, out, device or "auto")
        self.inner = inner
        self._held: tuple[Any, ...] | None = None
        self._bank: Bank | None = None
        self._freed: dict[tuple[Any, ...], Bank] = {}
        self._readings: dict[tuple[Any, ...], Readings] = {}
        self._live: tuple[tuple[Any, ...], Learnable] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.inner.model.parameters()).device

    def folder(self, job: Job) -> Path:
        return self.out / "adapters" / job.name

    def drop(self) -> None:
        """The model without anything in it."""
        self._bare()
        self._held = self._bank = None
        self._readings.clear()
        self._freed.clear()
        let_go()

    def _bare(self) -> None:
        """No live terms in the model."""
        if self._live is not None:
            self._live[1].remove()
            self._live = None

    def make(self, job: Job, out: Path) -> None:
        self.inner.train(job, out)

    # -- a cell --------------------------------------------------------------------------------------------------------

    def cell(self, cell: Cell) -> dict[str, Any]:
        """Compute a cell."""
        began = time.perf_counter()
        self.hold(cell)
        self.inner.begin(cell.seed)
        domain = split(cell.pair)[1]
        if cell.method.name in ("base", "task", "domain", "own"):
            told = self._alone(cell, domain)
        elif cell.method.trains:
            self._bare()
            told = learned(self.inner, self.bank, cell, domain, bool(self.half.few), lambda: self.score(domain))
        else:
            told = self._merged(cell, domain)
        settings = {
            "half": self.half.name, "pair": cell.pair, "seed": cell.seed, "rank": cell.rank, "method": cell.method.name,
            "at": cell.at, "key": key(self.half, cell),
        }  # fmt: skip
        seconds = {**told.pop("seconds", {}), "all": time.perf_counter() - began}
        return {
            "version": 1,
            "cell": settings,
            "title": cell.method.title,
            **told,
            "seconds": seconds,
            "device": device_name(self.inner.model),
        }

    def hold(self, cell: Cell) -> None:
        wanted = (cell.pair, cell.seed, cell.rank)
        if self._held != wanted:
            self.drop()
            self._held = wanted

    @property
    def bank(self) -> Bank:
        if self._bank is None:
            assert self._held is not None
            pair, seed, rank = self._held
            jobs = adapters(self.half, pair, seed, rank)
            self._bank = Bank([Adapter.load(self.folder(j), n) for j, n in zip(jobs, NAMES, strict=True)])
        return self._bank

    def bank_of(self, method: Method) -> Bank:
        """The adapters, freed of what the inputs have in common where the method says so."""
        if not method.common:
            return self.bank
        wanted = (method.common, method.common_of, method.inputs)
        if wanted not in self._freed:
            chosen = NAMES if method.common_of == "all" else NAMES[1:]
            self._freed[wanted] = freed_bank(self.bank, self.readings(method)[0].common, method.common, chosen)
        return self._freed[wanted]

    def score(self, domain: str, splits: tuple[str, ...] = ("validation", "test")) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in splits:
            right = self.inner.answers(domain, name)
            found[name] = sum(right) / len(right)
            if name == "test":
                found["correct"] = "".join("01"[r] for r in right)
        return found

    def _alone(self, cell: Cell, domain: str) -> dict[str, Any]:
        name, screen = cell.method.name, ("validation",)
        splits = screen if cell.pair in self.half.pairs("reserves") or name == "own" else ("validation", "test")
        if name == "base":
            return self.score(domain, splits)
        if name == "own":
            job = dataclasses.replace(adapters(self.half, cell.pair, cell.seed, cell.rank)[1], kind="own")
            adapter = Adapter.load(self.folder(job), "own")
        else:
            adapter = self.bank[name]
        told: dict[str, Any] = {}
        if cell.at == "balanced":
            adapter, told = self.balanced(adapter, cell, domain)
        with self.held(adapter):
            return {**self.score(domain, splits), **told}

    @contextlib.contextmanager
    def held(self, adapter: Adapter) -> Iterator[None]:
        """One adapter in the model, in full."""
        rows = MergedRows(self.inner.model)
        try:
            with torch.no_grad(), rows.use([adapter], [0]):
                yield
        finally:
            rows.remove()

    def balanced(self, adapter: Adapter, cell: Cell, domain: str) -> tuple[Adapter, dict[str, Any]]:
        """The adapter without the shift of its answers over the calibration inputs, and what is told of it; the adapter as it
        is, and why, where there is no balance."""
        began, count = time.perf_counter(), cell.method.inputs or self.half.calibration
        try:
            directions = self.inner.directions(domain)
            answers = self.inner.unlabelled_answers(domain, count, cell.seed)
            done = balance(self.inner.model, adapter, answers, directions, at=self.inner.read_at)
        except LoralloyError as error:
            told = {"reason": str(error)}
        else:
            adapter, told = done.adapter, {n: getattr(done, n) for n in ("module", "before", "after", "passes")}
        return adapter, {"balance": told, "seconds": {"balance": time.perf_counter() - began}}

    def _merged(self, cell: Cell, domain: str) -> dict[str, Any]:
        method = cell.method
        scale, values, tried = chosen(self, cell, domain)
        if cell.at in ("balanced", "tuned"):
            made, told = self.made(method, scale, values)
            made, more = self.balanced(made, cell, domain)
            told = {**told, **more, "seconds": {**told["seconds"], **more["seconds"]}}
            with self.held(made):
                found = self.score(domain)
        else:
            with self.set(method, scale, values) as told:
                found = self.score(domain)
        found |= {"scale": list(scale), **values, **({"tried": tried} if tried else {})}
        gates = over_depth(method, cell.seed, *self.readings(method)) if method.gate else {}
        return {**found, **told, **gates}

    @contextlib.contextmanager
    def set(self, method: Method, scale: tuple[float, float], values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The merge in the model: as a sum of terms where a rule has them and nothing is cut, else as the merged adapter."""
        began = time.perf_counter()
        rule = _rule(method, values)
        if method.rank == "full" and method.before is None and can_learn(rule, method.space):
            weights, bank = self.weights(method, scale), self.bank_of(method)
            wanted = (self._held, str(rule), method.space, method.common, method.common_of, method.inputs)
            if self._live is None or self._live[0] != wanted:
                self._bare()
                self._live = (wanted, Learnable(self.inner.model, bank, rule, method.space))
            with torch.no_grad(), self._live[1].at(weights):
                yield {"seconds": {"merge": time.perf_counter() - began}}
            return
        made, told = self.made(method, scale, values)
        with self.held(made):
            yield told

    def made(
        self, method: Method, scale: tuple[float, float], values: Mapping[str, Any]
    ) -> tuple[Adapter, dict[str, Any]]:
        """The merge as one adapter, and what is told of it."""
        began = time.perf_counter()
        bank = self.bank_of(method)
        plan = make_plan(
            bank, self.weights(method, scale), _rule(method, values), method.space, method.rank, torch.float32,  # type: ignore[arg-type]
            before=method.before, measure="none", device=self.device,  # type: ignore[arg-type]
        )  # fmt: skip
        seen: list[Found] = []
        if method.rule == "tada":
            moments = in_order(plan, self.readings(method)[0]) if method.judge == "activations" else None
            plan = dataclasses.replace(plan, rule=watched(plan.rule, seen, moments))
        with torch.no_grad():
            made = run(plan, bank).adapter
        told: dict[str, Any] = {"seconds": {"merge": time.perf_counter() - began}}
        if seen:
            told["conflicts"] = discarded(seen)
        return made, told

    # -- gates ---------------------------------------------------------------------------------------------------------

    def weights(self, method: Method, scale: tuple[float, float]) -> Weights:
        if method.gate is None:
            return Weights(dict(zip(NAMES, scale, strict=True)), "fixed")
        gate = Gate(**{**method.gate, "scale": scale, "seed": self._held[1] if self._held else 0})
        return gate.weights(*self.readings(method))

    def readings(self, method: Method) -> tuple[Readings, Readings | None]:
        """Of the domain's inputs, with moments, and of the reference's; each is probed once for a pair and seed."""
        assert self._held is not None
        pair, seed, _ = self._held
        task, domain = split(pair)
        count = method.inputs or self.half.calibration
        found = self._read(
            ("domain", count), lambda: self.inner.unlabelled("domain", domain, count, seed), moments=True
        )
        if method.gate is None or not Gate(**method.gate).needs_general:
            return found, None
        if method.reference == "general":
            return found, self._read(("general",), self.inner.general)
        return found, self._read(("task", count), lambda: self.inner.unlabelled("task", task, count, seed))

    def _read(self, name: tuple[Any, ...], batches: Any, moments: bool = False) -> Readings:
        if name not in self._readings:
            if self._live is not None:
                self._live[1].set(None)
            self._readings[name] = probe(
                self.inner.model, self.bank, batches(), moments=moments, common=COMMON if moments else 0
            )
        return self._readings[name]


def _rule(method: Method, values: Mapping[str, Any]) -> Any:
    given = {**method.values, **values}
    rule = get_rule(method.rule)
    return rule(**given) if given else rule
