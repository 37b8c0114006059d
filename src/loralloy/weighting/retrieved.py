"""Weights retrieved from an index: kernel, sum by task, nucleus.

"Task-Aware LoRA Adapter Composition via Similarity Retrieval in Vector Databases" (arXiv 2602.21222). With the query's
unit vector q and its k nearest examples x_i, of task t(i):

    d_i = 1 - cos(q, x_i)        s_i = exp(-d_i)        m_t = sum_{i: t(i) = t} s_i / sum_i s_i

then the smallest prefix of the tasks, by falling mass, that reaches p (the crossing task included), renormalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import LoralloyError
from ..retrieval.index import Index
from ..weights import Weights
from .unlike import NEAREST, Unlike
from .weigher import Weighing, neighbours

KERNELS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    # exp(-d/T) up to a constant factor, which normalisation removes; without the shift a small T underflows to 0.
    "exp": lambda d, temperature: np.exp(-(d - d.min()) / temperature),
    "inverse": lambda d, temperature: 1.0 / (temperature + d),
    "uniform": lambda d, temperature: np.ones_like(d),
}


def kernel(distances: Sequence[float] | np.ndarray, name: str = "exp", temperature: float = 1.0) -> np.ndarray:
    """Similarities of neighbours at these cosine distances [k], divided by their sum (float64, they sum to 1).

    ``exp``: exp(-d/T), the paper's at T = 1 (nearly flat over a top-100: the weights are then about the label counts);
    ``inverse``: 1/(T + d); ``uniform``: 1 (label counts). Raises LoralloyError for an unknown name or T <= 0.
    """
    if name not in KERNELS:
        raise LoralloyError(f"kernel is {name!r}; known: {', '.join(KERNELS)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise LoralloyError(f"temperature is {temperature}; it must be a positive number")
    d = np.asarray(distances, dtype=np.float64)
    if d.size == 0 or not np.isfinite(d).all():
        raise LoralloyError("distances must be finite, and at least one")
    s = KERNELS[name](d, temperature)
    return s / s.sum()


def nucleus(masses: Mapping[str, float], p: float) -> dict[str, float]:
    """The smallest set of tasks, largest first, whose share of the mass reaches `p`, renormalised to sum to 1.

    The task that crosses `p` is kept; equal masses go by name; no task without mass is kept; p = 1 keeps all others.
    Raises LoralloyError when p is not in (0, 1], a mass is negative or not finite, or all are 0.
    """
    if not 0 < p <= 1:
        raise LoralloyError(f"p is {p}; it must be above 0 and at most 1")
    if bad := sorted(name for name, mass in masses.items() if not (math.isfinite(mass) and mass >= 0)):
        raise LoralloyError(f"mass of {bad[0]!r} is {masses[bad[0]]}; masses must be finite and not negative")
    top = max(masses.values(), default=0.0)
    if top <= 0:
        raise LoralloyError("no task has any mass, so there is nothing to choose from")
    scaled = {name: mass / top for name, mass in masses.items()}  # so that neither sum can overflow or vanish
    order = sorted((name for name in masses if masses[name] > 0), key=lambda name: (-masses[name], name))
    total = math.fsum(scaled.values())
    kept: list[str] = []
    for name in order:
        kept.append(name)
        # 0.6 + 0.3 reaches 0.9, whatever its last bit is.
        if p < 1 and math.fsum(scaled[n] for n in kept) >= p * total * (1 - 1e-12):
            break
    mass = math.fsum(scaled[name] for name in kept)
    return {name: scaled[name] / mass for name in kept}


@dataclass(frozen=True)
class Router(Weighing):
    """Routes texts to adapters by the tasks of their nearest examples; adapters carry their task's name.

    The paper's: ``k=100, p=0.9, kernel="exp", temperature=1``. `only`: the tasks to choose from (those that have an
    adapter, say); `show`: how many neighbours explain a weight; `unlike`: adds ``explain["unlike"]``. Raises
    LoralloyError for values out of range, and when the index holds none of `only`.
    """

    index: Index
    k: int = 100
    p: float = 0.9
    kernel: str = "exp"
    temperature: float = 1.0
    only: Collection[str] | None = None
    show: int = 5
    unlike: Unlike | None = None

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise LoralloyError(f"k is {self.k!r}; it must be a whole number of neighbours, at least 1")
        if self.show < 0:
            raise LoralloyError(f"show is {self.show}; it must not be negative")
        kernel([0.0], self.kernel, self.temperature)
        nucleus({"": 1.0}, self.p)

    @property
    def settings(self) -> dict[str, Any]:
        """The options, as plain data."""
        return {"router": "kernel", "k": self.k, "p": self.p, "kernel": self.kernel, "temperature": self.temperature}

    def _weigh(self, vectors: np.ndarray, dropped: list[str]) -> list[Weights]:
        # the score of being unlike the index reads its own number of neighbours, whatever k is
        found = self.index.search(vectors, max(self.k, NEAREST if self.unlike else 1), dropped, self.only)
        shown = neighbours(self.index, *found, self.show)
        return [
            self._weights(ids, distances, tasks, near[: self.k], dropped)
            for ids, distances, tasks, near in zip(*found, shown, strict=True)
        ]

    def _weights(
        self, ids: list[str], distances: np.ndarray, tasks: list[str], near: list[dict[str, Any]], exclude: list[str]
    ) -> Weights:
        near_enough = distances[: self.k]
        similarity = kernel(near_enough, self.kernel, self.temperature)
        by_task: dict[str, list[float]] = {}
        for task, s in zip(tasks[: self.k], similarity.tolist(), strict=True):
            by_task.setdefault(task, []).append(s)
        mass = {task: math.fsum(parts) for task, parts in by_task.items()}
        explain: dict[str, Any] = {
            "neighbours": near,
            "mass": dict(sorted(mass.items(), key=lambda item: (-item[1], item[0]))),
            "k": self.k,
            "found": len(near_enough),
            "p": self.p,
            "kernel": self.kernel,
            "temperature": self.temperature,
        }
        if self.unlike is not None:
            explain["unlike"] = self.unlike.score(ids, distances)
        if exclude:
            explain["exclude"] = exclude
        return Weights(nucleus(mass, self.p), "retrieved", explain)
