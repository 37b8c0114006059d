"""One process of the harness: what its queue of groups is made of."""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Sequence
from pathlib import Path

from kept import key
from plan import Group, Half, Job, folder, groups, load, toy
from work import Site

from queue_cells import Piece, Queue, quiet, write


def halves(options: argparse.Namespace) -> dict[str, Half]:
    found = {name: load(name) for name in options.half}
    return {name: toy(half) for name, half in found.items()} if options.toy else found


def wanted(options: argparse.Namespace) -> list[Group]:
    """The groups asked for, in the queue's order, halves side by side."""
    from plan import PARTS

    found = []
    for n, half in enumerate(halves(options).values()):
        for group in groups(half):
            if (options.parts is None or group.part in options.parts) and (
                options.seeds is None or group.seed in options.seeds
            ):
                found.append(((PARTS[group.part][0], group.seed, n), group))
    return [group for _, group in sorted(found, key=lambda item: item[0])]


def cell_path(out: Path, group: Group, name: str) -> Path:
    return out / "cells" / folder(group.half, group.part) / f"{name}.json"


class Worker(Queue):
    """One process: it goes through the queue until nothing is left that it could take."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.out, int(options.worker[0]), float(options.worker[1]), options.worker[2])
        self.options, self.halves = options, halves(options)
        self.sites: dict[str, Site | None] = {}

    def run(self) -> int:
        quiet()
        return super().run()

    def queue(self) -> Sequence[Group]:
        found = wanted(self.options)
        if self.number == 0:
            self._stale(found)
        return found

    def _stale(self, found: Sequence[Group]) -> None:
        """Cells of another definition of their method are told, not taken for these, and not overwritten."""
        for group in found:
            for cell in group.cells:
                path = cell_path(self.out, group, cell.name)
                if path.is_file():
                    known = json.loads(path.read_text(encoding="utf-8"))["cell"]["key"]
                    if known != key(self.halves[group.half], cell):
                        self.say(f"{path.name} was made with other settings; remove it to make it again")

    def pieces(self, group: Group) -> Sequence[Piece]:
        cells = [
            Piece(c.name, cell_path(self.out, group, c.name), f"{group.half}-{group.part}-{c.name}")
            for c in group.cells
        ]
        return [*(self._adapter(job) for job in group.jobs), *cells]

    def needs(self, group: Group) -> Sequence[Piece]:
        return [self._adapter(job) for job in group.needs]

    def _adapter(self, job: Job) -> Piece:
        return Piece(job.name, self.out / "adapters" / job.name, job.name)

    def label(self, group: Group) -> str:
        return f"{group.half} {group.part}"

    def opened(self, group: Group) -> bool:
        """The half in this process; one that cannot be opened is told once."""
        if group.half not in self.sites:
            for other in self.sites.values():
                if other is not None:
                    other.drop()
            try:
                self.sites[group.half] = Site(self.halves[group.half], self.out, self.options.device)
            except Exception:
                self.say(f"{group.half}: cannot be opened: {traceback.format_exc(limit=1).strip().splitlines()[-1]}")
                self.sites[group.half] = None
        return self.sites[group.half] is not None

    def work(self, group: Group, piece: Piece) -> str:
        site = self.sites[group.half]
        assert site is not None
        job = next((job for job in group.jobs if job.name == piece.name), None)
        if job is not None:
            seconds = site.train(job)
            return f"trained in {seconds:.1f} s" if seconds else ""
        result = site.cell(next(cell for cell in group.cells if cell.name == piece.name))
        write(piece.path, result)
        shown = result.get("test", result.get("validation", float("nan")))
        return f"{shown:.3f} in {result['seconds']['all']:.1f} s"

    def failed(self, group: Group) -> None:
        site = self.sites.get(group.half)
        if site is not None:
            site.drop()

    def smaller(self, group: Group) -> bool:
        return True  # memory of other processes' peaks: another try is enough
