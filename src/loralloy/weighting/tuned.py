"""The kernel with k, temperature and p chosen on the index's own rows. Our design; the paper's kernel has them fixed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..weights import Weights
from . import fitted
from .leave_one_out import LeftOut, Rows, brier, leave_one_out, nucleus_rows
from .retrieved import Router
from .subsets import Subsets
from .unlike import Unlike
from .weigher import Weighing

if TYPE_CHECKING:
    from ..retrieval.index import Index

KS = (200, 100, 50, 20, 10, 5)
TEMPERATURES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.03, 0.02)
PS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)


@dataclass(frozen=True)
class Tuned:
    """What leave-one-out chose, and the figures of the choice and of the paper's setting on the same rows.

    `report`: ``{"chosen" | "paper": {"brier", "top1", "own"}}``, each with one figure by kind of query.
    """

    k: int
    temperature: float
    p: float
    unlike: Unlike
    report: Mapping[str, Any] = field(default_factory=dict)


def task_mass(left: LeftOut, k: int, temperature: float) -> np.ndarray:
    """Mass of each task ``[m, tasks]`` from the k nearest of the left-out rows, with the kernel exp(-d/T)."""
    d, labels = left.distances[:, :k], left.labels[:, :k]
    s = np.exp(-(d - d[:, :1]).astype(np.float64) / temperature)
    n = len(left.tasks)
    flat = (np.arange(len(d))[:, None] * n + labels).ravel()
    mass = np.bincount(flat, weights=s.ravel(), minlength=len(d) * n).reshape(len(d), n)
    return mass / mass.sum(axis=1, keepdims=True)


def _loss(left: LeftOut, weights: np.ndarray) -> float:
    """The Brier score; hinted and raw queries count the same, and so does every task within each."""
    scores = []
    for kind in sorted(set(left.kinds)):
        rows = np.flatnonzero(left.kinds == kind)
        scores.append(brier(weights[rows], left.own[rows], left.shares[rows] / left.shares[rows].sum()))
    return float(np.mean(scores))


def _figures(left: LeftOut, weights: np.ndarray) -> dict[str, dict[str, float]]:
    report: dict[str, dict[str, float]] = {}
    for kind in sorted(set(left.kinds)):
        rows = np.flatnonzero(left.kinds == kind)
        share, own = left.shares[rows] / left.shares[rows].sum(), left.own[rows]
        report[str(kind)] = {
            "brier": brier(weights[rows], own, share),
            "top1": float(share @ (weights[rows].argmax(axis=1) == own)),
            "own": float(share @ weights[rows, own]),
        }
    return report


def tune(left: LeftOut) -> Tuned:
    """The k, temperature and p whose final weights, after the nucleus, have the least Brier score on left-out rows.

    The Brier score is proper and bounded: it rewards mass on the own task, and unlike that mass alone it does not reward
    certainty that is often wrong (top-1 always has the most expected mass). Of equal scores the first is taken, the one
    nearest to the paper's flat kernel.
    """
    best: tuple[float, int, float, float] | None = None
    ks = [k for k in KS if k <= left.distances.shape[1]] or [left.distances.shape[1]]
    for k in ks:
        for temperature in TEMPERATURES:
            mass = task_mass(left, k, temperature)
            for p in PS:
                loss = _loss(left, nucleus_rows(mass, p))
                if best is None or loss < best[0] - 1e-9:
                    best = loss, k, temperature, p
    assert best is not None
    _, k, temperature, p = best
    report = {
        "chosen": _figures(left, nucleus_rows(task_mass(left, k, temperature), p)),
        "paper": _figures(left, nucleus_rows(task_mass(left, 100, 1.0), 0.9)),
    }
    return Tuned(k, temperature, p, Unlike.of(left), report)


def fit_kernel(index: Index, names: Sequence[str], read: Callable[[], Rows] | None = None) -> Tuned:
    """:func:`tune` on the rows of tasks `names`, kept in the index folder. `read` gives those rows, if held already."""
    if kept := fitted.load(index, "kernel", names):
        data, samples = kept
        return Tuned(data["k"], data["temperature"], data["p"], Unlike(samples), data["report"])
    tuned = tune(leave_one_out(read() if read else Rows.of(index, names)))
    data = {"k": tuned.k, "temperature": tuned.temperature, "p": tuned.p, "report": tuned.report, "tasks": list(names)}
    fitted.save(index, "kernel", names, data, tuned.unlike.samples)
    return tuned


class TunedRouter(Weighing):
    """The paper's kernel and nucleus with `k`, `temperature` and `p` chosen by leave-one-out (:func:`tune`).

    What is given is kept, what is None is chosen. For a query that leaves tasks out, the choice is made without them.
    `only` and `show` as for :class:`Router`; ``explain["unlike"]`` is always there.
    """

    def __init__(
        self,
        index: Index,
        only: Collection[str] | None = None,
        k: int | None = None,
        p: float | None = None,
        temperature: float | None = None,
        show: int = 5,
    ) -> None:
        self.index, self.only, self.show = index, only, show
        self.given: dict[str, Any] = {"k": k, "p": p, "temperature": temperature}
        checked: dict[str, Any] = {name: value for name, value in self.given.items() if value is not None}
        Router(index, **checked, show=show)  # raises for values out of range
        self._fits = Subsets(index, only, lambda names, read: fit_kernel(index, names, read))

    def fit(self, dropped: Collection[str] = ()) -> Tuned:
        """What was chosen for the index without the tasks `dropped`."""
        return self._fits.without(dropped)[1]

    def _router(self, dropped: Collection[str] = ()) -> Router:
        names, tuned = self._fits.without(dropped)
        chosen: dict[str, Any] = {n: getattr(tuned, n) if value is None else value for n, value in self.given.items()}
        return Router(self.index, **chosen, only=names, show=self.show, unlike=tuned.unlike)

    def prepare(self) -> None:
        """Choose now, so that no query waits for it."""
        self._router()

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen on the whole of the index (or of `only`)."""
        chosen = [name for name, value in self.given.items() if value is None]
        return self._router().settings | {"leave-one-out chose": chosen}

    def _weigh(self, vectors: np.ndarray, dropped: list[str]) -> list[Weights]:
        return self._router(dropped).weigh_vectors(vectors, dropped)
