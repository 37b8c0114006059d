"""Cells of a half: a bank of two adapters, one probe, many merges, each answered and written down."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from designs import COEFFICIENTS, Method
from plan import Cell, Half, Job, adapters, split

from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.live.learnable import Learnable
from loralloy.live.merged_rows import MergedRows
from loralloy.merging import get_rule, make_plan, run
from loralloy.merging.tada import Found, watched
from loralloy.weighting.candidates import can_learn
from loralloy.weighting.gating import Gate, depth_slope, depths
from loralloy.weighting.levels import LEVELS, information
from loralloy.weighting.probed import Readings, probe
from loralloy.weighting.tada import in_order
from loralloy.weights import Weights

NAMES = ("task", "domain")


class Site:
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
        self._readings: dict[tuple[Any, ...], Readings] = {}
        self._live: tuple[tuple[Any, ...], Learnable] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.inner.model.parameters()).device

    def folder(self, job: Job) -> Path:
        return self.out / "adapters" / job.name

    def drop(self) -> None:
        """The model without anything in it."""
        if self._live is not None:
            self._live[1].remove()
            self._live = None
        self._held = self._bank = None
        self._readings.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def train(self, job: Job) -> float:
        """Seconds; 0 for an adapter that is there."""
        out = self.folder(job)
        if out.is_dir():
            return 0.0
        self.drop()
        began = time.perf_counter()
        out.parent.mkdir(parents=True, exist_ok=True)
        self.inner.train(job, out)
        return time.perf_counter() - began

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
            told = self._learned(cell, domain)
        else:
            told = self._merged(cell, domain)
        settings = {
            "half": self.half.name, "pair": cell.pair, "seed": cell.seed, "rank": cell.rank, "method": cell.method.name,
            "at": cell.at, "key": key(self.half, cell),
        }  # fmt: skip
        seconds = {**told.pop("seconds", {}), "all": time.perf_counter() - began}
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {
            "version": 1,
            "cell": settings,
            "title": cell.method.title,
            **told,
            "seconds": seconds,
            "device": device,
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

    def _score(self, domain: str, splits: tuple[str, ...] = ("validation", "test")) -> dict[str, Any]:
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
            return self._score(domain, splits)
        if name == "own":
            job = dataclasses.replace(adapters(self.half, cell.pair, cell.seed, cell.rank)[1], kind="own")
            adapter = Adapter.load(self.folder(job), "own")
        else:
            adapter = self.bank[name]
        rows = MergedRows(self.inner.model)
        try:
            with torch.no_grad(), rows.use([adapter], [0]):
                return self._score(domain, splits)
        finally:
            rows.remove()

    def _merged(self, cell: Cell, domain: str) -> dict[str, Any]:
        method = cell.method
        tried: list[dict[str, Any]] = []

        def look(values: Mapping[str, Any], scale: tuple[float, float]) -> float:
            with self.set(method, scale, values):
                seen = self._score(domain, ("validation",))["validation"]
            tried.append({"scale": list(scale), **values, "validation": seen})
            return float(seen)

        values: dict[str, Any] = {"density": method.densities[0]} if method.densities else {}
        scale = COEFFICIENTS[0] if cell.at == "even" else (1.0, 1.0)
        if cell.at == "free":
            answers = self.inner.unlabelled_answers(domain, method.inputs or self.half.calibration, cell.seed)
            for level in LEVELS:
                with self.set(method, (level, level), values):
                    tried.append({"scale": [level, level], "information": information(answers())})
            known = [t for t in tried if math.isfinite(t["information"])]
            best = max(known, key=lambda t: t["information"])["scale"]  # of equals the smallest
            scale = (best[0], best[1])
        if cell.at == "best":  # the density at weights of 1, then the weights at that density; the first of equals
            if method.densities:
                known = {d: look({"density": d}, scale) for d in method.densities}
                values = {"density": max(method.densities, key=lambda d: known[d])}
            seen = {tuple(t["scale"]): t["validation"] for t in tried if t.get("density") == values.get("density")}
            for one in COEFFICIENTS:
                if one not in seen:
                    seen[one] = look(values, one)
            scale = max(COEFFICIENTS, key=lambda c: seen[c])
        with self.set(method, scale, values) as told:
            found = self._score(domain)
        found |= {"scale": list(scale), **values, **({"tried": tried} if tried else {})}
        return {**found, **told, **(self.gates(method) if method.gate else {})}

    @contextlib.contextmanager
    def set(self, method: Method, scale: tuple[float, float], values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The merge in the model: as a sum of terms where a rule has them and nothing is cut, else as the merged adapter."""
        began = time.perf_counter()
        weights = self.weights(method, scale)
        rule = get_rule(method.rule)
        given = {**method.values, **values}
        rule = rule(**given) if given else rule
        told: dict[str, Any] = {}
        if method.rank == "full" and method.before is None and can_learn(rule, method.space):
            wanted = (self._held, str(rule), method.space)
            if self._live is None or self._live[0] != wanted:
                if self._live is not None:
                    self._live[1].remove()
                self._live = (wanted, Learnable(self.inner.model, self.bank, rule, method.space))
            with torch.no_grad(), self._live[1].at(weights):
                told["seconds"] = {"merge": time.perf_counter() - began}
                yield told
            return
        plan = make_plan(
            self.bank, weights, rule, method.space, method.rank, torch.float32, before=method.before, measure="none",  # type: ignore[arg-type]
            device=self.device,
        )  # fmt: skip
        seen: list[Found] = []
        if method.rule == "tada":
            moments = in_order(plan, self.readings(method)[0]) if method.judge == "activations" else None
            plan = dataclasses.replace(plan, rule=watched(rule, seen, moments))
        with torch.no_grad():
            made = run(plan, self.bank).adapter
        if seen:
            lost, all_ = (
                torch.cat([getattr(f, n) for f in seen]).double().square().sum() for n in ("removed", "total")
            )
            counts = {n: sum(int(getattr(f, n).sum()) for f in seen) for n in ("components", "dropped", "cleared")}
            told["conflicts"] = {**counts, "removed": float((lost / all_).sqrt()) if float(all_) else 0.0}
        rows = MergedRows(self.inner.model)
        told["seconds"] = {"merge": time.perf_counter() - began}
        try:
            with torch.no_grad(), rows.use([made], [0]):
                yield told
        finally:
            rows.remove()

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
            self._readings[name] = probe(self.inner.model, self.bank, batches(), moments=moments)
        return self._readings[name]

    def gates(self, method: Method) -> dict[str, Any]:
        """The domain's share by third of the depth, and the slope of log(q_D / q_T) over depth (see `depth_slope`)."""
        assert method.gate is not None
        gate = Gate(**{**method.gate, "scale": (1.0, 1.0), "seed": self._held[1] if self._held else 0})
        readings, general = self.readings(method)
        share = gate.shares(readings, general)[:, 1]
        depth = depths(readings.modules)
        thirds = [share[(depth >= low) & (depth <= low + 1 / 3)] for low in (0.0, 1 / 3, 2 / 3)]
        told: dict[str, Any] = {"domain_share": [float(t.mean()) if len(t) else None for t in thirds]}
        if gate.kind == "probe":
            slope = depth_slope(gate, readings, general, samples=200)
            told["slope"] = [slope.slope, slope.low, slope.high, slope.agreement]
        return told

    # -- what trains ---------------------------------------------------------------------------------------------------

    def _learned(self, cell: Cell, domain: str) -> dict[str, Any]:
        from loralloy.weighting.adamerging import CONFIG, adamerging
        from loralloy.weighting.learned import LearnConfig, learn

        method = cell.method
        entropy = method.trains == "entropy"
        objective = self.inner.objective(domain, method.trains, cell.seed)
        config = dataclasses.replace(CONFIG if entropy else LearnConfig(), seed=cell.seed, rows_at_once=64)
        if self.half.few:
            config = dataclasses.replace(config, steps=2)
        rule = get_rule(method.rule)(**method.values) if method.values else get_rule(method.rule)
        if self._live is not None:
            self._live[1].remove()
            self._live = None
        live = Learnable(self.inner.model, self.bank, rule, method.space)
        began = time.perf_counter()
        try:
            done = (adamerging if entropy else learn)(
                self.inner.model, self.bank, objective, rule=rule, space=method.space, granularity=method.grain,  # type: ignore[arg-type]
                config=config, learnable=live, progress=False, **({} if entropy else {"b_max": 3.0}),
            )  # fmt: skip
            seconds = {"learn": time.perf_counter() - began}
            with torch.no_grad(), live.at(done.weights):
                return {**self._score(domain), "seconds": seconds, "rows": objective.size}
        finally:
            live.remove()


def key(half: Half, cell: Cell) -> str:
    """Of all that a cell's result depends on beside its name: the method's definition and the half's settings, with the
    pair's own task and domain alone of all that are named there."""
    task, domain = split(cell.pair)
    fields = {k: v for k, v in half.fields.items() if k not in ("final", "reserves", "development", "first")}
    fields |= {"tasks": half.fields["tasks"][task], "domains": half.fields["domains"][domain]}
    told: list[Any] = [dataclasses.asdict(cell.method), fields, half.calibration, half.few]
    told += [{"best": COEFFICIENTS, "free": LEVELS, "even": COEFFICIENTS[0]}.get(cell.at)]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]
