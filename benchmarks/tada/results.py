"""Cells as they were written, and paired differences over pairs, seeds and rows with their intervals."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import pages
from cell_files import Row, read

SAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """value with its 95 % bootstrap interval, over `pairs` pairs; nan where there is nothing to resample."""

    value: float
    low: float
    high: float
    pairs: int

    @property
    def above(self) -> bool:
        return self.low > 0

    @property
    def below(self) -> bool:
        return self.high < 0

    def points(self) -> str:
        """In points; "" for no pair."""
        if not self.pairs:
            return ""
        return pages.interval(self.value, self.low, self.high)


@dataclass
class Cells:
    """The cells of one half: of the final pairs, the development pairs or the screen."""

    rows: list[Row]

    def __post_init__(self) -> None:
        self._by: dict[tuple[str, str, int], dict[tuple[str, int], Row]] = {}
        for row in self.rows:
            c = row["cell"]
            self._by.setdefault((c["method"], c["at"], c["rank"]), {})[c["pair"], c["seed"]] = row

    @staticmethod
    def load(folder: Path) -> Cells:
        return Cells(read(folder))

    @property
    def methods(self) -> list[tuple[str, str, int]]:
        return list(self._by)

    def of(self, method: str, at: str, rank: int) -> dict[tuple[str, int], Row]:
        """(pair, seed) -> cell."""
        return self._by.get((method, at, rank), {})

    def by_pair(self, method: str, at: str, rank: int, split: str = "test") -> dict[str, float]:
        """Accuracy, the mean over seeds."""
        found: dict[str, list[float]] = {}
        for (pair, _), row in sorted(self.of(method, at, rank).items()):
            if split in row:
                found.setdefault(pair, []).append(row[split])
        return {pair: sum(v) / len(v) for pair, v in found.items()}

    def average(self, method: str, at: str, rank: int, split: str = "test") -> float:
        """The mean over pairs of the mean over seeds; nan where there are none."""
        values = list(self.by_pair(method, at, rank, split).values())
        return sum(values) / len(values) if values else math.nan

    def difference(self, a: tuple[str, str, int], b: tuple[str, str, int]) -> Interval:
        """a - b on the rows, pairs and seeds that both have."""
        one, two = self.of(*a), self.of(*b)
        rows: dict[str, list[np.ndarray]] = {}
        for at in sorted(one.keys() & two.keys()):
            x, y = bits(one[at]), bits(two[at])
            if len(x) and len(x) == len(y):
                rows.setdefault(at[0], []).append(x - y)
        return bootstrap([np.stack(v) for v in rows.values()])


def bits(row: Row) -> np.ndarray:
    """1 for each test row that was answered right, else 0."""
    told = row.get("correct", "")
    if ":" in told:  # as `packed` writes it
        count, number = told.split(":")
        told = f"{int(number, 16):0{count}b}"
    return np.frombuffer(told.encode(), np.uint8).astype(np.float32) - 48


def packed(correct: str) -> str:
    """The same in a quarter of the letters, for the file that is kept."""
    return f"{len(correct)}:{int(correct, 2):x}" if correct and ":" not in correct else correct


@functools.lru_cache(maxsize=64)
def _draws(n: int, slots: int, seed: int) -> np.ndarray:
    """Shares of n things in resamples, [slots, SAMPLES, n]; the same for every comparison."""
    rng = np.random.default_rng([n, slots, seed])
    return (rng.multinomial(n, np.full(n, 1 / n), (slots, SAMPLES)) / n).astype(np.float32)


def bootstrap(pairs: Sequence[np.ndarray]) -> Interval:
    """The mean over pairs of the mean over seeds and rows of differences [seeds, rows], resampled in three levels.

    Pairs are drawn with replacement; within each, its seeds and its rows, which are the same rows for all its seeds (crossed, not
    nested). It errs on the wide side, since the pairs' means carry the noise of their rows once more. With few pairs the
    interval is what these pairs say of others like them, and no more.
    """
    k = len(pairs)
    if not k:
        return Interval(math.nan, math.nan, math.nan, 0)
    value = float(np.mean([d.mean() for d in pairs]))
    drawn = np.empty((k, k, SAMPLES), np.float32)  # pair, slot, sample
    for i, d in enumerate(pairs):
        rows = _draws(d.shape[1], k, 1) @ d.T.astype(np.float32)  # [slots, samples, seeds]
        drawn[i] = (rows * _draws(d.shape[0], k, 2 + i)).sum(-1)
    chosen = np.random.default_rng(0).integers(0, k, (SAMPLES, k))
    means = drawn[chosen.T, np.arange(k)[:, None], np.arange(SAMPLES)[None]].mean(0)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(value, float(low), float(high), k)


def over_pairs(values: dict[str, list[float]]) -> Interval:
    """The mean over pairs of means over seeds, pairs and seeds resampled."""
    return bootstrap([np.array(v, np.float32)[:, None] for v in values.values() if v])


def slopes(cells: Iterable[Row]) -> dict[str, list[float]]:
    """By pair, the slope over depth of the domain's log odds, one a seed."""
    found: dict[str, list[float]] = {}
    for row in cells:
        if "slope" in row and not math.isnan(row["slope"][0]):
            found.setdefault(row["cell"]["pair"], []).append(row["slope"][0])
    return found


def percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def best(items: Iterable[Any], value: Callable[[Any], float]) -> Any:
    """The item with the largest value that is a number; None for none."""
    known = [(value(i), n, i) for n, i in enumerate(items) if not math.isnan(value(i))]
    return max(known, key=lambda k: (k[0], -k[1]))[2] if known else None
