"""Accuracy and how sure it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import LoralloyError


@dataclass(frozen=True)
class Accuracy:
    """A proportion in [0, 1] with its 95 % Wilson interval and the number of examples."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, float | int]:
        return {"accuracy": self.value, "low": self.low, "high": self.high, "n": self.n}


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over paired examples, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def wilson(k: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The Wilson score interval (low, high) of k successes in n (Wilson 1927, JASA 22:209); z = 1.96 is 95 %.

    Raises LoralloyError unless 0 <= k <= n and n > 0.
    """
    if n <= 0 or not 0 <= k <= n:
        raise LoralloyError(f"{k} of {n} is no proportion; an interval needs 0 <= k <= n and n > 0")
    p, zz = k / n, z * z / n
    centre = (p + zz / 2) / (1 + zz)
    half = z / (1 + zz) * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    # at the ends the formula gives exactly 0 or 1; rounding must not push the interval off the proportion
    return (0.0 if k == 0 else max(0.0, centre - half)), (1.0 if k == n else min(1.0, centre + half))


def accuracy(correct: Sequence[bool | int]) -> Accuracy:
    """The share of true entries. Raises LoralloyError when there are none at all."""
    n, k = len(correct), sum(bool(c) for c in correct)
    low, high = wilson(k, n)
    return Accuracy(k / n, low, high, n)


def majority(answers: Sequence[str]) -> tuple[str, float]:
    """The commonest answer and its share; the first in the alphabet of equals."""
    if not answers:
        raise LoralloyError("no answers, so no majority class")
    counts = Counter(answers)
    label = min(counts, key=lambda text: (-counts[text], text))
    return label, counts[label] / len(answers)


def paired_bootstrap(
    a: Sequence[bool | float], b: Sequence[bool | float], seed: int = 0, samples: int = 10_000, level: float = 0.95
) -> Difference:
    """mean(a - b) over the same examples, and its percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    Examples are drawn with replacement, a and b together, so that what both find hard cancels.
    Raises LoralloyError when the lengths differ or are 0.
    """
    import numpy as np

    if len(a) != len(b) or not len(a):
        raise LoralloyError(f"a paired bootstrap needs two non-empty lists of one length; got {len(a)} and {len(b)}")
    delta = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    generator = np.random.default_rng(seed)
    n, means = len(delta), np.empty(samples)
    for start in range(0, samples, 500):  # in parts: samples x n indices at once would be 100 MB at n = 1000
        size = min(500, samples - start)
        means[start : start + size] = delta[generator.integers(0, n, (size, n))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(delta.mean()), float(low), float(high), n)


def stratified_bootstrap(
    strata: Mapping[str, tuple[Sequence[bool | float], Sequence[bool | float]]],
    seed: int = 0,
    samples: int = 10_000,
    level: float = 0.95,
) -> Difference:
    """Mean over strata of mean(a - b), and its percentile bootstrap interval with examples drawn within each stratum.

    strata: task -> (a, b) over the same examples. Every task counts the same, however many examples it has; `n` is of all
    examples. The interval is for these tasks, not for tasks in general. Raises LoralloyError when lengths differ or are 0.
    """
    import numpy as np

    if not strata:
        raise LoralloyError("a stratified bootstrap needs at least one task")
    generator = np.random.default_rng(seed)
    means, value, total = np.zeros(samples), 0.0, 0
    for name, (a, b) in strata.items():
        if len(a) != len(b) or not len(a):
            raise LoralloyError(
                f"{name}: a paired bootstrap needs two non-empty lists of one length; {len(a)}, {len(b)}"
            )
        delta = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
        value += float(delta.mean()) / len(strata)
        total += len(delta)
        for start in range(0, samples, 500):
            size = min(500, samples - start)
            drawn = delta[generator.integers(0, len(delta), (size, len(delta)))]
            means[start : start + size] += drawn.mean(axis=1) / len(strata)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Difference(value, float(low), float(high), total)


def paired_p(a: Sequence[bool | float], b: Sequence[bool | float], seed: int = 0, samples: int = 10_000) -> float:
    """Two-sided p of mean(a - b) = 0 by swapping a and b at random, example by example (a paired permutation test).

    (hits + 1) / (samples + 1), so never 0 (Phipson & Smyth 2010). Raises LoralloyError when lengths differ or are 0.
    """
    import numpy as np

    if len(a) != len(b) or not len(a):
        raise LoralloyError(f"a paired test needs two non-empty lists of one length; got {len(a)} and {len(b)}")
    delta = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    moved = delta[delta != 0]
    if not len(moved):
        return 1.0
    generator = np.random.default_rng(seed)
    seen, hits = abs(moved.sum()), 0
    for start in range(0, samples, 500):
        size = min(500, samples - start)
        signs = generator.integers(0, 2, (size, len(moved))) * 2 - 1
        hits += int((np.abs(signs @ moved) >= seen - 1e-9).sum())
    return (hits + 1) / (samples + 1)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p of several tests: Holm's step-down (1979), which keeps the chance of any false claim at the level.

    In the order given. Raises LoralloyError for a p that is not in [0, 1].
    """
    if bad := [name for name, value in p.items() if not 0 <= value <= 1]:
        raise LoralloyError(f"p of {bad[0]!r} is {p[bad[0]]}; it must be from 0 to 1")
    order = sorted(p, key=lambda name: p[name])
    adjusted: dict[str, float] = {}
    reached = 0.0
    for place, name in enumerate(order):
        reached = max(reached, min(1.0, (len(order) - place) * p[name]))
        adjusted[name] = reached
    return {name: adjusted[name] for name in p}
