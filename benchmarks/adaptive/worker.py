"""One process of the harness: what its queue of groups is made of."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import stamp
from cells import Cell, Job
from parts import rank
from plan import BENCHES, Bench, groups, toy
from work import Site

from loralloy.continual.experience import DomainStream
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


class Worker(SiteWorker):
    """Its sites are benches."""

    @staticmethod
    def wanted(options: argparse.Namespace) -> list[Group]:
        found = []
        for n, name in enumerate(options.bench):
            for group in groups(*opened(name, options)):
                if options.parts is not None and group.part not in options.parts:
                    continue
                if options.seeds is None or group.seed in options.seeds:
                    found.append((rank(group), n, group))
        return [group for _, _, group in sorted(found, key=lambda item: item[:2])]

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
