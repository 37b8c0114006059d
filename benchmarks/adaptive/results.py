"""Cells as they were written, found by their settings, and means over seeds with t intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cells import EVEN, cell_name

import pages
from cell_files import Row, read, rounded
from loralloy.continual.results import Mean
from loralloy.errors import LoralloyError

_ABSENT = {"draw": 0}
ALONE = ("own", "joint")  # cells of adapters as they are
_DROPPED = ("correct", "searched", "version", "bench", "adapters")


@dataclass
class Cells:
    """All cells of a bench. Absent settings are as in `cells.Cell`: left out."""

    bench: str
    rows: list[Row]
    _by: dict[tuple[Any, ...], list[Row]] = field(default_factory=dict, repr=False)

    @staticmethod
    def load(folder: Path, bench: str) -> Cells:
        """The files of OUT/cells/BENCH."""
        return Cells(bench, read(folder / bench))

    def find(self, **settings: Any) -> list[Row]:
        """Cells whose settings are these; None asks for a setting that is absent, and what is not named may be anything.

        A cell that says nothing of its draw is of draw 0.
        """
        names = tuple(sorted(settings))
        if (names,) not in self._by:
            index: dict[tuple[Any, ...], list[Row]] = {}
            for row in self.rows:
                index.setdefault((names, *(_plain(row["cell"].get(n, _ABSENT.get(n))) for n in names)), []).append(row)
            self._by |= {(names,): [], **index}
        return self._by.get((names, *(_plain(settings[n]) for n in names)), [])

    def by_seed(self, value: Callable[[Row], float] | None = None, **settings: Any) -> dict[int, float]:
        """Final accuracy (or another value) by seed; the mean where several cells of a seed fit."""
        value = value or final
        found: dict[int, list[float]] = {}
        for row in self.find(**settings):
            found.setdefault(row["cell"]["seed"], []).append(value(row))
        return {seed: sum(v) / len(v) for seed, v in sorted(found.items())}

    def mean(self, **settings: Any) -> Mean:
        return Mean.of(list(self.by_seed(**settings).values()))

    def compact(self) -> list[Row]:
        """What a reader may want to compute from, without the row-by-row answers."""
        return [rounded({k: v for k, v in row.items() if k not in _DROPPED}) for row in self.rows]


def joined(kept: list[Row], new: list[Row], said: str) -> list[Row]:
    """Cells of an earlier page and of adapters that were made again since: those of both; a cell that both have is the page's.

    What shows that the adapters are the same are the cells that evaluate them alone: "own" for what merges them, "joint" for what
    is made of joint training, both for what else was trained. `new` must have those of its seeds and heads as far as the page
    has them, and they must agree. A bench without such cells is timed and of one run: its new cells stand for all.
    said: what the error calls them.
    Raises LoralloyError where they do not agree, or where nothing shows it.
    """
    alone = {_alone(r, r["cell"]["how"]) for r in kept if r["cell"]["how"] in ALONE}
    if not alone:
        return new or kept
    known = {cell_name(row["cell"]): row for row in kept}
    same: dict[tuple[int, str, str], bool] = {}
    for row in new:
        old = known.get(cell_name(row["cell"]))
        if old is not None and row["cell"]["how"] in ALONE:
            one = _alone(row, row["cell"]["how"])
            same[one] = same.get(one, True) and all(old[split] == row[split] for split in ("test", "validation"))
    for row in new:
        name = cell_name(row["cell"])
        for one in (_alone(row, how) for how in _of(row["cell"]["how"])):
            if name in known or one not in alone:
                continue
            if one not in same:
                raise LoralloyError(
                    f"{said}: nothing shows that {name} is of the page's adapters; run.py --beside makes the cells "
                    "that do, or write the page without --add"
                )
            if not same[one]:
                raise LoralloyError(
                    f"{said}: what {name} is made of is not what the page has ({one[2]} of seed {one[0]}, {one[1]} head: "
                    "other adapters); write the page without --add"
                )
    fresh = {cell_name(row["cell"]): row for row in new}
    return list({**fresh, **known}.values())


def _alone(row: Row, how: str) -> tuple[int, str, str]:
    return row["cell"]["seed"], row["cell"].get("head", "random"), how


def _of(how: str) -> tuple[str, ...]:
    """Which adapters a cell is made of, by the cells that evaluate them alone."""
    plain = how.removeprefix(EVEN)
    if plain in ALONE:
        return (plain,)
    return ALONE if plain in ("few", "seq") else ("own",)


def final(row: Row) -> float:
    """The mean over domains of the test accuracy."""
    return sum(row["test"].values()) / len(row["test"])


def validation(row: Row) -> float:
    return sum(row["validation"].values()) / len(row["validation"])


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Mean:
    """a - b, paired by seed."""
    return Mean.of([a[seed] - b[seed] for seed in a if seed in b])


def percent(mean: Mean, signed: bool = False) -> str:
    """Mean and standard deviation over seeds, in points."""
    if mean.n == 0:
        return ""
    said = f"{100 * mean.value:{'+' if signed else ''}.1f}"
    return said if mean.n < 2 else f"{said} ± {100 * mean.deviation:.1f}"


def interval(mean: Mean) -> str:
    """Mean and its 95 % t interval, in points."""
    if mean.n == 0:
        return ""
    if mean.n < 2:
        return f"{100 * mean.value:+.1f} (one seed)"
    return pages.interval(mean.value, low(mean), high(mean))


def low(mean: Mean) -> float:
    return mean.value - mean.half


def high(mean: Mean) -> float:
    return mean.value + mean.half


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
