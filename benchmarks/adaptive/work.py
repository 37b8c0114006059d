"""One process's work: it trains adapters and computes cells of a bench, keeping the model and one bank's terms."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import stamp
import torch
from cells import RULES, Cell, Job, needs, own
from plan import Bench

import sites
from devices import device_name, let_go, wait
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.continual.buffer import BufferRow, MemoryBuffer
from loralloy.continual.experience import DomainStream, Experience
from loralloy.continual.workshop import Workshop, composed, make_workshop
from loralloy.live.learnable import Learnable
from loralloy.merging import get_rule, merge
from loralloy.weighting.learned import LearnConfig
from loralloy.weights import Weights
from queue_cells import slot

LARGE = 20


def rule_of(name: str) -> Any:
    given = RULES[name]
    return get_rule(name)(**given) if given else get_rule(name)


class Site(sites.Site):
    """A bench in this process: its workshops by head and split, adapters on disk, and the terms that are held."""

    def __init__(self, bench: Bench, stream: DomainStream, out: Path, workshop: Workshop | None = None) -> None:
        self.bench, self.stream, self.out = bench, stream, out
        self.workshops: dict[tuple[str, str], Workshop] = {}
        self.main = workshop or make_workshop(stream)
        self.workshops["random", "test"] = self.main
        self.live: Learnable | None = None
        self._held: tuple[Any, ...] | None = None
        self._banks: dict[tuple[str, ...], Bank] = {}
        self._buffers: dict[tuple[Any, ...], list[BufferRow]] = {}
        self._hashes: dict[str, str] = {}

    # -- parts that are kept -------------------------------------------------------------------------------------------

    def workshop(self, head: str = "random", split: str = "test") -> Workshop:
        """The same base model under another head, or evaluated on the validation rows."""
        if (head, split) not in self.workshops:
            fields = self.stream.fields
            changes: dict[str, Any] = {}
            if split == "validation":
                limit = {"split": "validation", "limit": self.bench.validation}
                changes["evaluate"] = fields.evaluate.model_copy(update=limit)
            if fields.images is not None:
                changes["images"] = fields.images.model_copy(update={"head": head})
            stream = dataclasses.replace(self.stream, fields=fields.model_copy(update=changes))
            main: Any = self.main
            more = (main.sets,) if fields.images is not None else (main.tokenizer,)
            if fields.images is not None:  # the stream's names for the data's
                more = ({e.domain: main.sets[e.name] for e in stream.experiences},)
            self.workshops[head, split] = type(main)(stream, main.model, *more)
        return self.workshops[head, split]

    def folder(self, job: Job) -> Path:
        return self.out / "adapters" / self.bench.share / job.name

    def bank(self, jobs: Sequence[Job]) -> Bank:
        key = tuple(job.name for job in jobs)
        if key not in self._banks:
            self._banks.clear()
            self._banks[key] = Bank([Adapter.load(self.folder(job), job.domains[0]) for job in jobs])
        return self._banks[key]

    def made_of(self, cell: Cell) -> dict[str, str]:
        """job -> the hash of its adapter, of all that a cell needs; compared with what other cells of the bench are made of."""
        jobs = needs(cell, self.stream.orders)
        if new := [job for job in jobs if job.name not in self._hashes]:
            found = {job.name: Adapter.load(self.folder(job)).content_hash.removeprefix("sha256:")[:16] for job in new}
            stamp.check_adapters(self, found)
            self._hashes |= found
        return {job.name: self._hashes[job.name] for job in jobs}

    def terms(self, cell: Cell) -> tuple[Learnable, Bank, float]:
        """The bank in the model under the cell's rule and space, with nothing set; and the seconds that making it took."""
        jobs = needs(cell, self.stream.orders)
        key = (tuple(job.name for job in jobs), cell.rule, cell.space)
        began = time.perf_counter()
        if self._held != key:
            self.drop()
            bank = self.bank(jobs)
            self.live = Learnable(self.main.model, bank, rule_of(cell.rule), cell.space, base=self.main.base)
            self._held = key
            wait()
        assert self.live is not None
        self.live.set(None)
        return self.live, self.live.given, time.perf_counter() - began

    @property
    def device(self) -> torch.device:
        return next(self.main.model.parameters()).device

    def drop(self) -> None:
        """The model without a bank in it."""
        if self.live is not None:
            self.live.remove()
        self.live = self._held = None
        let_go()

    def rows(
        self, seed: int, domains: Sequence[str], per_class: int, fresh: bool = False, draw: int = 0
    ) -> list[BufferRow]:
        """The memory buffer after these domains; `fresh`: of rows that no adapter was trained on."""
        key = (seed, tuple(domains), per_class, fresh, draw)
        if key not in self._buffers:
            drawn = seed + 1000 * draw  # no draw of a seed is one of another
            buffer = MemoryBuffer(per_class, seed=drawn)
            for name in domains:
                experience = self.main.experiences[name]
                ids, labels = self.unseen(experience) if fresh else self.main.labels(experience, "train")
                chosen = MemoryBuffer(per_class, seed=drawn)
                chosen.add(name, ids, labels)
                kept = [row.id for row in chosen.rows]
                where = dict(zip(ids, labels, strict=True))
                buffer.add(name, kept, [where[i] for i in kept], None, self.main.rows(experience, kept))
            self._buffers[key] = buffer.rows
        return self._buffers[key]

    def unseen(self, experience: Experience) -> tuple[list[str], list[str]]:
        """(ids, labels) that no adapter was trained on: texts beyond the training limit, images of the validation split."""
        if experience.task is None:
            return self.main.labels(experience, "validation")
        rows = experience.task.examples("train")[self.stream.fields.train.get("limit") :]
        return [e.id for e in rows], [e.answer for e in rows]

    # -- work ----------------------------------------------------------------------------------------------------------

    def make(self, job: Job, out: Path) -> None:
        workshop = self.workshop("learned" if job.head == "learned" else "random")
        lead = own(job.seed, self.stream.orders[job.order][0], "learned", job.order)
        leads = job.head == "learned" and len(job.domains) == 1 and job.domains != lead.domains
        workshop.begin(job.seed, self.folder(lead) if leads else None)
        before = job.before
        init = None if before is None else self.folder(before)
        experiences = [workshop.experiences[d] for d in job.domains]
        with self.short(workshop, experiences, job.few) if job.few else contextlib.nullcontext():
            workshop.train(experiences, out, job.seed, init)

    @contextlib.contextmanager
    def short(self, workshop: Any, experiences: Sequence[Experience], per_class: int) -> Iterator[None]:
        """Training on the first rows of each domain, as many as a buffer has of it, for as many steps as a merge learns."""
        usual, first = workshop.config, experiences[0]
        classes = first.task.labels if first.task is not None else workshop.sets[first.name].classes
        rows, steps = (
            per_class * len(classes or ("",)),
            LearnConfig().steps if self.bench.toy_steps is None else self.bench.toy_steps,
        )
        if first.task is None:  # each domain gets its share of the steps
            changes = {"steps": max(1, steps // len(experiences))}
        else:
            changes = {"epochs": steps * usual.batch_size / (rows * len(experiences))}
        workshop.config = dataclasses.replace(usual, limit=rows, **changes)
        try:
            yield
        finally:
            workshop.config = usual

    def cell(self, cell: Cell) -> dict[str, Any]:
        """Compute a cell."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        made_of = self.made_of(cell)
        began = time.perf_counter()
        heavy = (cell.per_class or 0) >= LARGE
        with slot(self.out, "heavy", self.bench.heavy) if heavy else contextlib.nullcontext():
            if cell.how == "seq":
                found = self._sequence(cell)
            elif not cell.rule:
                found = self._alone(cell)
            else:
                found = self._merged(cell)
            if heavy:
                let_go()  # the others need what this has held
        found["seconds"] = {**found.get("seconds", {}), "all": time.perf_counter() - began}
        if torch.cuda.is_available():
            found["memory"] = int(torch.cuda.max_memory_allocated())
        settings = {k: v for k, v in dataclasses.asdict(cell).items() if v not in (None, "")}
        if found.get("correct"):
            found["rows_tested"] = {name: len(bits) for name, bits in found["correct"].items()}
        return {
            "version": 1,
            "bench": self.bench.name,
            "cell": settings,
            "device": device_name(self.main.model),
            "adapters": made_of,
            **found,
        }

    def _begin(self, cell: Cell) -> list[BufferRow]:
        """The head of the cell's seed, and the buffer's rows where it has one."""
        lead = own(cell.seed, self.stream.orders[cell.order][0], "learned", cell.order)
        for split in ("test", "validation"):
            self.workshop(cell.head, split).begin(cell.seed, self.folder(lead) if cell.head == "learned" else None)
        if cell.per_class is None:
            return []
        return self.rows(cell.seed, cell.domains, cell.per_class, cell.how == "fresh", cell.draw)

    def _score(
        self, cell: Cell, rows: Sequence[BufferRow], domains: Sequence[str], saved: Path | None = None
    ) -> dict[str, Any]:
        """Accuracy by domain under what is set in the model: test rows, row by row, and validation rows."""
        found: dict[str, Any] = {"test": {}, "correct": {}, "validation": {}}
        began = time.perf_counter()
        workshop = self.workshop(cell.head)
        workshop.after_merge(rows, saved)
        for name in domains:
            right = workshop.evaluate(workshop.experiences[name]).correct
            found["test"][name] = sum(right) / len(right)
            found["correct"][name] = "".join("01"[r] for r in right)
        seconds = time.perf_counter() - began
        if self.bench.validation != 0:
            workshop = self.workshop(cell.head, "validation")
            workshop.after_merge(rows, saved)
            for name in domains:
                found["validation"][name] = workshop.evaluate(workshop.experiences[name]).accuracy
        return {**found, "seconds": {"evaluate": seconds}}

    def _alone(self, cell: Cell) -> dict[str, Any]:
        self.drop()
        rows = self._begin(cell)
        names = self.stream.names
        if cell.how == "base":
            return self._score(cell, rows, names)
        if cell.even:
            from even import evened

            (job,) = needs(cell, self.stream.orders)
            with evened(self, cell, Adapter.load(self.folder(job)), rows) as told:
                return {**self._score(cell, rows, names), **told}
        if cell.how in ("joint", "few"):
            (job,) = needs(cell, self.stream.orders)
            with composed(self.main, self.folder(job)):
                return self._score(cell, rows, names, self.folder(job) if cell.head == "learned" else None)
        found: dict[str, Any] = {"test": {}, "correct": {}, "validation": {}}
        for job in needs(cell, self.stream.orders):
            with composed(self.main, self.folder(job)):
                part = self._score(cell, rows, job.domains)
            for key in found:
                found[key] |= part[key]
        return found

    def _sequence(self, cell: Cell) -> dict[str, Any]:
        """Row t of the matrix: every domain under the adapter after t domains."""
        self.drop()
        rows, steps = self._begin(cell), []
        for job in needs(cell, self.stream.orders):
            with composed(self.main, self.folder(job)):
                steps.append(self._score(cell, rows, self.stream.names))
        return {**steps[-1], "matrix": [step["test"] for step in steps]}

    def _merged(self, cell: Cell) -> dict[str, Any]:
        from strategies import coefficients, geometry

        live, bank, making = self.terms(cell)
        if cell.how == "geometry":
            return {**geometry(live, live.bank), "seconds": {"terms": making}}
        rows = self._begin(cell)
        began = time.perf_counter()
        weights, told = coefficients(self, cell, live, bank, rows)
        wait()
        seconds = {"terms": making, "learn": time.perf_counter() - began}
        names = cell.domains if self.bench.sizes else self.stream.names
        with self.set(cell, live, bank, weights, rows) as setting:
            found = self._score(cell, rows, names)
        found["seconds"] |= {**seconds, "set": setting.pop("seconds")}
        told |= setting
        table = [[weights.of(n, m) for m in bank[n]] for n in bank.names]
        told["weights"] = {n: sum(row) / len(row) for n, row in zip(bank.names, table, strict=True)}
        if weights.per_module:
            told["range"] = {n: [min(row), max(row)] for n, row in zip(bank.names, table, strict=True)}
        return {**found, **told, "terms": live.nbytes, "rows": len(rows)}

    @contextlib.contextmanager
    def set(
        self, cell: Cell, live: Learnable, bank: Bank, weights: Weights, rows: Sequence[BufferRow]
    ) -> Iterator[dict[str, Any]]:
        """The merge in the model: uncut, or as the adapter of a rank that `merge` makes, evened out or not. Yields the seconds
        that it took, and what there is to say of it."""
        began = time.perf_counter()
        if cell.rank is None:
            with torch.no_grad(), live.at(weights):
                wait()
                yield {"seconds": time.perf_counter() - began}
            return
        from loralloy.weighting.candidates import Candidates

        self.drop()
        if cell.even:
            from even import evened

            made = merge(bank, weights, rule_of(cell.rule), cell.space, cell.rank, device=self.device, measure="none")  # type: ignore[arg-type]
            with evened(self, cell, made.adapter, rows) as told:
                yield {"seconds": time.perf_counter() - began, **told}
            return
        cut = Candidates(self.main.model, bank, rule_of(cell.rule), cell.space, cell.rank, base=self.main.base)  # type: ignore[arg-type]
        try:
            with cut.at(weights):
                yield {"seconds": time.perf_counter() - began}
        finally:
            cut.remove()
