"""One process of the harness: what its queue of groups is made of."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kept import key
from plan import PARTS, Cell, Half, Job, folder, groups, load, toy
from work import Site

from queue_cells import Piece
from sites import Group, SiteWorker


def halves(options: argparse.Namespace) -> dict[str, Half]:
    found = {name: load(name) for name in options.half}
    return {name: toy(half) for name, half in found.items()} if options.toy else found


class Worker(SiteWorker):
    """Its sites are halves."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.halves = halves(options)

    @staticmethod
    def wanted(options: argparse.Namespace) -> list[Group]:
        found = []
        for n, half in enumerate(halves(options).values()):
            for group in groups(half):
                if (options.parts is None or group.part in options.parts) and (
                    options.seeds is None or group.seed in options.seeds
                ):
                    found.append(((PARTS[group.part][0], group.seed, n), group))
        return [group for _, group in sorted(found, key=lambda item: item[0])]

    @staticmethod
    def adapter(out: Path, group: Group, job: Job) -> Piece:
        return Piece(job.name, out / "adapters" / job.name, job.name)

    @staticmethod
    def cell(out: Path, group: Group, cell: Cell) -> Piece:
        path = out / "cells" / folder(group.site, group.part) / f"{cell.name}.json"
        return Piece(cell.name, path, f"{group.site}-{group.part}-{cell.name}")

    def queue(self) -> Sequence[Group]:
        found = super().queue()
        if self.number == 0:
            self._stale(found)
        return found

    def _stale(self, found: Sequence[Group]) -> None:
        """Cells of another definition of their method are told, not taken for these, and not overwritten."""
        for group in found:
            for cell in group.cells:
                path = self.cell(self.out, group, cell).path
                if path.is_file():
                    known = json.loads(path.read_text(encoding="utf-8"))["cell"]["key"]
                    if known != key(self.halves[group.site], cell):
                        self.say(f"{path.name} was made with other settings; remove it to make it again")

    def open(self, name: str) -> Site:
        for other in self.sites.values():
            if other is not None:
                other.drop()
        return Site(self.halves[name], self.out, self.options.device)

    def score(self, result: dict[str, Any]) -> str:
        return f"{result.get('test', result.get('validation', float('nan'))):.3f}"

    def smaller(self, group: Group) -> bool:
        return True  # memory of other processes' peaks: another try is enough
