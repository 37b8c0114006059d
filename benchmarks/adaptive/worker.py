"""One process of the harness: what its queue of groups is made of."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE.parent),) if p not in sys.path]

import stamp  # noqa: E402
from cells import Group, Job  # noqa: E402
from parts import rank  # noqa: E402
from plan import BENCHES, Bench, groups, toy  # noqa: E402
from work import Site  # noqa: E402

from loralloy.continual.experience import DomainStream  # noqa: E402
from queue_cells import Piece, Queue, quiet, write  # noqa: E402


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
                found.append((rank(group), n, group))
    return [group for _, _, group in sorted(found, key=lambda item: item[:2])]


def cell_path(out: Path, bench: str, name: str) -> Path:
    return out / "cells" / bench / f"{name}.json"


def done(group: Group, out: Path) -> bool:
    adapters = out / "adapters" / BENCHES[group.bench].share
    return all((adapters / job.name).is_dir() for job in group.jobs) and all(
        cell_path(out, group.bench, cell.name).is_file() for cell in group.cells
    )


class Worker(Queue):
    """One process: it goes through the queue until nothing is left that it could take."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.out, int(options.worker[0]), float(options.worker[1]), options.worker[2])
        self.options = options
        self.sites: dict[str, Site | None] = {}

    def run(self) -> int:
        quiet()
        return super().run()

    def queue(self) -> Sequence[Group]:
        return wanted(self.options)

    def pieces(self, group: Group) -> Sequence[Piece]:
        cells = [
            Piece(c.name, cell_path(self.out, group.bench, c.name), f"{group.bench}-{c.name}") for c in group.cells
        ]
        return [*(self._adapter(group, job) for job in group.jobs), *cells]

    def needs(self, group: Group) -> Sequence[Piece]:
        return [self._adapter(group, job) for job in group.needs]

    def _adapter(self, group: Group, job: Job) -> Piece:
        path = self.out / "adapters" / BENCHES[group.bench].share / job.name
        return Piece(job.name, path, f"{group.bench}-{job.name}")

    def label(self, group: Group) -> str:
        return f"{group.bench} {group.part}"

    def opened(self, group: Group) -> bool:
        """The bench in this process; one that cannot be opened is told once."""
        name = group.bench
        if name not in self.sites:
            try:
                site = Site(*opened(name, self.options), self.out)
                stamp.check(site)
                self.sites[name] = site
            except Exception:
                self.say(f"{name}: cannot be opened: {traceback.format_exc(limit=1).strip().splitlines()[-1]}")
                self.sites[name] = None
        return self.sites[name] is not None

    def work(self, group: Group, piece: Piece) -> str:
        site = self.sites[group.bench]
        assert site is not None
        job = next((job for job in group.jobs if job.name == piece.name), None)
        if job is not None:
            seconds = site.train(job)
            return f"trained in {seconds:.1f} s" if seconds else ""
        result = site.cell(next(cell for cell in group.cells if cell.name == piece.name))
        write(piece.path, result)
        scores = result.get("test") or {}
        mean = f"{sum(scores.values()) / len(scores):.3f}" if scores else "-"
        return f"{mean} in {result['seconds']['all']:.1f} s"

    def failed(self, group: Group) -> None:
        site = self.sites.get(group.bench)
        if site is not None:
            site.drop()

    def smaller(self, group: Group) -> bool:
        site = self.sites.get(group.bench)
        if site is None:
            return False
        site.bench = dataclasses.replace(site.bench, rows_at_once=max(8, site.bench.rows_at_once // 4))
        return True

    def idle(self) -> None:
        for site in self.sites.values():
            if site is not None:
                site.drop()
