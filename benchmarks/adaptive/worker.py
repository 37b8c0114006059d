"""One process of the harness: what its queue of groups is made of."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import stamp
from cells import Cell, Job, cell_name
from parts import rank
from plan import BENCHES, Bench, groups, toy
from results import ALONE
from work import Site

from loralloy.continual.experience import DomainStream
from loralloy.errors import LoralloyError
from queue_cells import Piece
from sites import Group, SiteWorker


def opened(name: str, options: argparse.Namespace) -> tuple[Bench, DomainStream]:
    """A bench and its stream, as the command line changes them."""
    bench = BENCHES[name]
    stream = bench.stream()
    if options.toy:
        bench, stream = toy(bench, stream)
    if options.device:
        stream = dataclasses.replace(stream, fields=stream.fields.model_copy(update={"device": options.device}))
    return bench, stream


def missing(queue: Sequence[Group], docs: Path, chosen: Callable[[Group], bool]) -> list[Group]:
    """What of the chosen groups of a queue the pages' .json files do not have, with the trainings that it needs.

    Of the seeds and heads of what is missing, the cells of own and joint adapters are made again: they show that the adapters
    are the pages' (`results.joined`). Raises LoralloyError for a folder without the pages of the queue's benches.
    """
    kept: set[tuple[str, str]] = set()
    for file in docs.glob("adaptive-*.json"):
        for bench, rows in json.loads(file.read_text(encoding="utf-8"))["cells"].items():
            kept |= {(bench, cell_name(row["cell"])) for row in rows}
    if lacking := {group.site for group in queue} - {bench for bench, _ in kept}:
        raise LoralloyError(f"--beside {docs}: no adaptive-*.json there has cells of {', '.join(sorted(lacking))}")
    every = [(group, cell) for group in queue for cell in group.cells]
    wanted = {(g.site, c.name) for g, c in every if chosen(g)} - kept
    of = {(g.site, c.seed, c.head) for g, c in every if (g.site, c.name) in wanted}
    wanted |= {(g.site, c.name) for g, c in every if c.how in ALONE and (g.site, c.seed, c.head) in of}
    needed: set[tuple[str, str]] = set()
    found = []
    for group in reversed(queue):  # training stands before what needs it
        cells = tuple(cell for cell in group.cells if (group.site, cell.name) in wanted)
        jobs = group.jobs if any((group.site, job.name) in needed for job in group.jobs) else ()
        if cells or jobs:
            needed |= {(group.site, job.name) for job in group.needs}
            found.append(dataclasses.replace(group, cells=cells, jobs=jobs))
    return found[::-1]


class Worker(SiteWorker):
    """Its sites are benches."""

    @staticmethod
    def wanted(options: argparse.Namespace) -> list[Group]:
        found = []
        for n, name in enumerate(options.bench):
            found += [(rank(group), n, group) for group in groups(*opened(name, options))]
        queue = [group for _, _, group in sorted(found, key=lambda item: item[:2])]

        def chosen(group: Group) -> bool:
            parts, seeds = options.parts, options.seeds
            return (parts is None or group.part in parts) and (seeds is None or group.seed in seeds)

        if options.beside is not None:
            return missing(queue, options.beside, chosen)
        return [group for group in queue if chosen(group)]

    @staticmethod
    def adapter(out: Path, group: Group, job: Job) -> Piece:
        path = out / "adapters" / BENCHES[group.site].share / job.name
        return Piece(job.name, path, f"{group.site}-{job.name}")

    @staticmethod
    def cell(out: Path, group: Group, cell: Cell) -> Piece:
        return Piece(cell.name, out / "cells" / group.site / f"{cell.name}.json", f"{group.site}-{cell.name}")

    def open(self, name: str) -> Site:
        site = Site(*opened(name, self.options), self.out)
        stamp.check(site)
        return site

    def score(self, result: dict[str, Any]) -> str:
        scores = result.get("test") or {}
        return f"{sum(scores.values()) / len(scores):.3f}" if scores else "-"

    def smaller(self, group: Group) -> bool:
        site = self.sites.get(group.site)
        if site is None:
            return False
        site.bench = dataclasses.replace(site.bench, rows_at_once=max(8, site.bench.rows_at_once // 4))
        return True

    def idle(self) -> None:
        for site in self.sites.values():
            if site is not None:
                site.drop()
