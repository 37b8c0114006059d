"""One process of run.py: it goes through the queue of groups and does what no other process has."""

from __future__ import annotations

import argparse
import dataclasses
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import stamp
import torch
from plan import BENCHES, Bench, Cell, Group, Job, groups
from work import Site, toy, write

from loralloy.continual.experience import DomainStream
from loralloy.evaluation.suite.locks import lock

_NO_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory")


def opened(name: str, options: argparse.Namespace) -> tuple[Bench, DomainStream]:
    """A bench and its stream, as the command line changes them."""
    bench = BENCHES[name]
    stream = bench.stream()
    if options.toy:
        bench, stream = toy(bench, stream)
    if options.device:
        stream = dataclasses.replace(stream, fields=stream.fields.model_copy(update={"device": options.device}))
    return bench, stream


def wanted(options: argparse.Namespace) -> list[Group]:
    """The groups asked for, in the queue's order, benches side by side."""
    found = []
    for n, name in enumerate(options.bench):
        for group in groups(*opened(name, options)):
            if options.parts is not None and group.part not in options.parts:
                continue
            if options.seeds is None or group.seed in options.seeds:
                found.append((group.rank, n, group))
    return [group for _, _, group in sorted(found, key=lambda item: item[:2])]


def cell_path(out: Path, bench: str, name: str) -> Path:
    return out / "cells" / bench / f"{name}.json"


def done(group: Group, out: Path) -> bool:
    adapters = out / "adapters" / BENCHES[group.bench].share
    return all((adapters / job.name).is_dir() for job in group.jobs) and all(
        cell_path(out, group.bench, cell.name).is_file() for cell in group.cells
    )


class Worker:
    """One process: it goes through the queue until nothing is left that it could take."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.number, self.deadline, self.call = int(options.worker[0]), float(options.worker[1]), options.worker[2]
        self.sites: dict[str, Site | None] = {}
        self.makes: set[tuple[str, str]] = set()  # the adapters that this call trains

    def run(self) -> int:
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU
        from loralloy.console import console

        console.quiet = True
        queue = wanted(self.options)
        self.makes = {(BENCHES[group.bench].share, job.name) for group in queue for job in group.jobs}
        while time.time() < self.deadline:
            queue = [group for group in queue if not self.finished(group)]
            waiting = moved = False
            for group in queue:
                state = self.take(group)
                if state == "worked":
                    moved = True
                    break  # from the start again: what was not ready may be now
                waiting = waiting or state == "busy"
            if not moved and not waiting:
                break
            if not moved:
                time.sleep(0.5)
        return 0

    def finished(self, group: Group) -> bool:
        """Whether all of it is there, or has failed in this call."""
        adapters = self.out / "adapters" / BENCHES[group.bench].share
        return all(
            (adapters / j.name).is_dir() or self.error(group.bench, j.name).exists() for j in group.jobs
        ) and all(
            cell_path(self.out, group.bench, c.name).is_file() or self.error(group.bench, c.name).exists()
            for c in group.cells
        )

    def error(self, bench: str, name: str) -> Path:
        return self.out / "errors" / f"{self.call}-{bench}-{name.replace('/', '-')}.txt"

    def take(self, group: Group) -> str:
        """What became of a group.

        Returns "worked", "busy" (another process has it, or what it needs is being made), or "stuck" (what it needs is
        not made by this call, or has failed).
        """
        adapters = self.out / "adapters" / BENCHES[group.bench].share
        missing = [job for job in group.needs if not (adapters / job.name).is_dir()]
        if missing:
            share = BENCHES[group.bench].share
            comes = all(
                (share, job.name) in self.makes and not self.error(group.bench, job.name).exists() for job in missing
            )
            return "busy" if comes else "stuck"
        with lock(self.out / "locks" / group.name, wait=False) as held:
            if not held:
                return "busy"
            site = self.site(group.bench)
            if site is None:
                return "stuck"
            for job in group.jobs:
                self.attempt(group, job.name, lambda job=job: self.train(site, job))
            for cell in group.cells:
                path = cell_path(self.out, group.bench, cell.name)
                if not path.is_file():
                    self.attempt(group, cell.name, lambda cell=cell, path=path: self.compute(site, cell, path))
            return "worked"

    def site(self, name: str) -> Site | None:
        """The bench in this process; None where it cannot be opened, which is told once."""
        if name not in self.sites:
            try:
                site = Site(*opened(name, self.options), self.out)
                stamp.check(site)
                self.sites[name] = site
            except Exception:
                self.say(f"{name}: cannot be opened: {traceback.format_exc(limit=1).strip().splitlines()[-1]}")
                self.sites[name] = None
        return self.sites[name]

    def train(self, site: Site, job: Job) -> str:
        seconds = site.train(job)
        return f"trained in {seconds:.1f} s" if seconds else ""

    def compute(self, site: Site, cell: Cell, path: Path) -> str:
        result = site.cell(cell)
        write(path, result)
        scores = result.get("test") or {}
        mean = f"{sum(scores.values()) / len(scores):.3f}" if scores else "-"
        return f"{mean} in {result['seconds']['all']:.1f} s"

    def attempt(self, group: Group, name: str, do: Callable[[], str]) -> None:
        """Do it; out of memory is tried once more, in a while, with fewer rows at once. What fails is told and kept."""
        if time.time() >= self.deadline or self.error(group.bench, name).exists():
            return
        for retry in (False, True):
            try:
                said = do()
                if said:
                    self.say(f"{group.bench} {group.part} {name}: {said}")
                return
            except KeyboardInterrupt:
                raise
            except Exception as error:
                site = self.site(group.bench)
                if site is not None:
                    site.drop()
                said = str(error)
                full = isinstance(error, torch.cuda.OutOfMemoryError) or any(words in said for words in _NO_MEMORY)
                if full and not retry and site is not None:
                    site.bench = dataclasses.replace(site.bench, rows_at_once=max(8, site.bench.rows_at_once // 4))
                    time.sleep(5)
                    continue
                first = said.splitlines()[0] if said else type(error).__name__
                self.say(f"{group.bench} {group.part} {name}: FAILED: {first}")
                path = self.error(group.bench, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(traceback.format_exc(), encoding="utf-8")
                if "CUDA error" in said and not full:  # this process can do nothing on the device any more
                    raise SystemExit(1) from None
                return

    def say(self, text: str) -> None:
        left = self.deadline - time.time()
        clock = f"{left:6.0f} s left " if left < 1e8 else ""
        print(f"{clock}[{self.number}] {text}", flush=True)
