"""What benchmarks/adaptive and benchmarks/tada work on: sites (a bench, a half), each of trainings and cells.

A site is opened once by a process, which then keeps its model. Its work lies in groups of what one process does at a stretch:
jobs (an adapter's training each, whose result is a folder) and cells (a measurement each, one small JSON file).
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cell_files import write
from devices import let_go, quiet
from queue_cells import Piece, Queue


@dataclass(frozen=True)
class Group:
    """Work that one process does at a stretch: jobs, or cells of one bank. needs: jobs of others that must be done before."""

    site: str
    part: str
    seed: int
    jobs: tuple[Any, ...] = ()
    cells: tuple[Any, ...] = ()
    needs: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        first = self.jobs[0].name.replace("/", "-") if self.jobs else self.cells[0].name
        return f"{self.site}-{self.part}-{first}"


class Site:
    """A site in this process. Subclasses have `cell(cell)`, which computes one, too."""

    def folder(self, job: Any) -> Path:
        """Of a job's adapter."""
        raise NotImplementedError

    def make(self, job: Any, out: Path) -> None:
        """Train a job's adapter into a folder that is not there."""
        raise NotImplementedError

    def drop(self) -> None:
        """The model without anything in it."""
        raise NotImplementedError

    def train(self, job: Any) -> float:
        """Train an adapter unless it is there; the seconds."""
        out = self.folder(job)
        if out.is_dir():
            return 0.0
        self.drop()
        began = time.perf_counter()
        out.parent.mkdir(parents=True, exist_ok=True)
        self.make(job, out)
        let_go()  # what training has held
        return time.perf_counter() - began


class SiteWorker(Queue):
    """One process: it goes through the queue until nothing is left that it could take."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.out, int(options.worker[0]), float(options.worker[1]), options.worker[2])
        self.options = options
        self.sites: dict[str, Any] = {}  # None: it could not be opened

    # -- what subclasses say -------------------------------------------------------------------------------------------

    @staticmethod
    def wanted(options: argparse.Namespace) -> list[Group]:
        """The groups asked for, in the queue's order, sites side by side."""
        raise NotImplementedError

    @staticmethod
    def adapter(out: Path, group: Group, job: Any) -> Piece:
        raise NotImplementedError

    @staticmethod
    def cell(out: Path, group: Group, cell: Any) -> Piece:
        raise NotImplementedError

    def open(self, name: str) -> Any:
        """The site of this name."""
        raise NotImplementedError

    def score(self, result: dict[str, Any]) -> str:
        """What is said of a cell's result."""
        raise NotImplementedError

    # -- what is the same ----------------------------------------------------------------------------------------------

    @classmethod
    def parts(cls, group: Group, out: Path) -> list[Piece]:
        adapters = [cls.adapter(out, group, job) for job in group.jobs]
        return adapters + [cls.cell(out, group, cell) for cell in group.cells]

    @classmethod
    def done(cls, group: Group, out: Path) -> bool:
        return all(piece.path.exists() for piece in cls.parts(group, out))

    def run(self) -> int:
        quiet()
        return super().run()

    def queue(self) -> Sequence[Group]:
        return self.wanted(self.options)

    def pieces(self, group: Group) -> Sequence[Piece]:
        return self.parts(group, self.out)

    def needs(self, group: Group) -> Sequence[Piece]:
        return [self.adapter(self.out, group, job) for job in group.needs]

    def in_turn(self, group: Group) -> bool:
        return any(getattr(job, "before", None) is not None for job in group.jobs)

    def label(self, group: Group) -> str:
        return f"{group.site} {group.part}"

    def opened(self, group: Group) -> bool:
        """The site in this process; one that cannot be opened is told once."""
        name = group.site
        if name not in self.sites:
            try:
                self.sites[name] = self.open(name)
            except Exception:
                self.say(f"{name}: cannot be opened: {traceback.format_exc(limit=1).strip().splitlines()[-1]}")
                self.sites[name] = None
        return self.sites[name] is not None

    def work(self, group: Group, piece: Piece) -> str:
        site = self.sites[group.site]
        job = next((job for job in group.jobs if job.name == piece.name), None)
        if job is not None:
            seconds = site.train(job)
            return f"trained in {seconds:.1f} s" if seconds else ""
        result = site.cell(next(cell for cell in group.cells if cell.name == piece.name))
        write(piece.path, result)
        return f"{self.score(result)} in {result['seconds']['all']:.1f} s"

    def failed(self, group: Group) -> None:
        if (site := self.sites.get(group.site)) is not None:
            site.drop()
