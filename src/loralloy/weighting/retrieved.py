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
class Router:
    """Routes texts to adapters by the tasks of their nearest examples; adapters carry their task's name.

    The paper's: ``k=100, p=0.9, kernel="exp", temperature=1``. `only`: the tasks to choose from (those that have an
    adapter, say); `show`: how many neighbours explain a weight. Raises LoralloyError for values out of range, and when
    the index holds none of `only`.
    """

    index: Index
    k: int = 100
    p: float = 0.9
    kernel: str = "exp"
    temperature: float = 1.0
    only: Collection[str] | None = None
    show: int = 5

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise LoralloyError(f"k is {self.k!r}; it must be a whole number of neighbours, at least 1")
        if self.show < 0:
            raise LoralloyError(f"show is {self.show}; it must not be negative")
        kernel([0.0], self.kernel, self.temperature)
        nucleus({"": 1.0}, self.p)

    def weigh(self, text: str, exclude: Collection[str] = ()) -> Weights:
        """The weights for one query; `exclude` leaves tasks out (its own, to measure out-of-domain use)."""
        return self.weigh_batch([text], exclude)[0]

    def weigh_batch(
        self, texts: Sequence[str], exclude: Collection[str] = (), *, exclude_each: Sequence[str | None] | None = None
    ) -> list[Weights]:
        """One Weights a text, in order. `exclude` holds for all; `exclude_each` adds one task (or None) a text."""
        return self.weigh_vectors(self.index.embed(texts), exclude, exclude_each=exclude_each)

    def weigh_vectors(
        self,
        vectors: np.ndarray,
        exclude: Collection[str] = (),
        *,
        exclude_each: Sequence[str | None] | None = None,
    ) -> list[Weights]:
        """As :meth:`weigh_batch`, for queries embedded already: unit vectors ``[m, d]`` from ``index.embed``."""
        if isinstance(exclude, str):
            exclude = (exclude,)
        own = list(exclude_each) if exclude_each is not None else [None] * len(vectors)
        if len(own) != len(vectors):
            raise LoralloyError(f"exclude_each has {len(own)} entries for {len(vectors)} queries")
        result: list[Weights | None] = [None] * len(vectors)
        for left_out in sorted(set(own), key=lambda name: (name is not None, name or "")):
            rows = [row for row, name in enumerate(own) if name == left_out]
            dropped = {*exclude, *([left_out] if left_out else [])}
            found = self.index.search(np.asarray(vectors)[rows], self.k, dropped, self.only)
            shown = [row_ids[: self.show] for row_ids in found[0]]
            flat = list(dict.fromkeys(i for row_ids in shown for i in row_ids))
            texts: dict[str, str] = {}
            for start in range(0, len(flat), 1000):
                texts |= zip(flat[start : start + 1000], self.index.texts(flat[start : start + 1000]), strict=True)
            for row, ids, distances, tasks in zip(rows, *found, strict=True):
                result[row] = self._weights(ids, distances, tasks, texts, sorted(dropped))
        return [weights for weights in result if weights is not None]

    def _weights(
        self, ids: list[str], distances: np.ndarray, tasks: list[str], texts: dict[str, str], exclude: list[str]
    ) -> Weights:
        similarity = kernel(distances, self.kernel, self.temperature)
        by_task: dict[str, list[float]] = {}
        for task, s in zip(tasks, similarity.tolist(), strict=True):
            by_task.setdefault(task, []).append(s)
        mass = {task: math.fsum(parts) for task, parts in by_task.items()}
        explain: dict[str, Any] = {
            "neighbours": [
                {"id": i, "task": task, "distance": float(d), "text": texts[i]}
                for i, d, task in zip(ids[: self.show], distances, tasks, strict=False)
            ],
            "mass": dict(sorted(mass.items(), key=lambda item: (-item[1], item[0]))),
            "k": self.k,
            "found": len(ids),
            "p": self.p,
            "kernel": self.kernel,
            "temperature": self.temperature,
        }
        if exclude:
            explain["exclude"] = exclude
        return Weights(nucleus(mass, self.p), "retrieved", explain)
