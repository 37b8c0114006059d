"""Weights from the linear probe: calibrated probabilities of the tasks, then the paper's nucleus."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..weights import Weights
from . import fitted
from .leave_one_out import Rows
from .linear_probe import Probe, fit_probe
from .retrieved import Router, nucleus
from .subsets import Subsets
from .tuned import Tuned, fit_kernel
from .unlike import NEAREST
from .weigher import Weighing, neighbours

if TYPE_CHECKING:
    from ..retrieval.index import Index


def fit(index: Index, names: Sequence[str], read: Callable[[], Rows], chosen: tuple[float, float] | None) -> Probe:
    """:func:`fit_probe` on the rows of tasks `names`, kept in the index folder (a fit with a given C apart)."""
    kind = "probe" if chosen is None else "probe_" + hashlib.sha256(repr(chosen).encode()).hexdigest()[:8]
    if kept := fitted.load(index, kind, names):
        data, arrays = kept
        return Probe(
            tuple(data["tasks"]),
            arrays["weight"],
            arrays["bias"],
            data["temperature"],
            data["strength"],
            data["report"],
        )
    probe = fit_probe(read(), chosen)
    data = {
        "tasks": list(probe.tasks),
        "temperature": probe.temperature,
        "strength": probe.strength,
        "report": probe.report,
    }
    fitted.save(index, kind, names, data, {"weight": probe.weight, "bias": probe.bias})
    return probe


class ProbeRouter(Weighing):
    """Weights by a multinomial logistic regression on the index's vectors (:func:`fit_probe`), cut by the nucleus.

    A task that is left out takes no part: the regression is fitted again without its rows and its class (seconds, once;
    only C and the temperature, two numbers, stay those of the whole index or of `only`). `temperature` multiplies the
    calibrated one; `show`: how many nearest rows explain a weight. ``explain["unlike"]`` is there unless tasks are left out
    of a query (it would take a leave-one-out pass without them).
    """

    def __init__(
        self,
        index: Index,
        only: Collection[str] | None = None,
        p: float = 0.9,
        temperature: float = 1.0,
        show: int = 5,
    ) -> None:
        Router(index, p=p, temperature=temperature, show=show)  # checks
        self.index, self.only, self.p, self.temperature, self.show = index, only, p, temperature, show
        self._probes = Subsets(index, only, self._fit)
        self._kernels = Subsets(index, only, lambda names, read: fit_kernel(index, names, read))

    def _fit(self, names: tuple[str, ...], read: Callable[[], Rows]) -> Probe:
        whole = tuple(sorted(self.index.tasks_left((), self.only)))
        if names == whole:
            return fit(self.index, names, read, None)
        of_all = self.fit()
        return fit(self.index, names, read, (of_all.strength, of_all.temperature))

    def fit(self, dropped: Collection[str] = ()) -> Probe:
        """The probe of the index without the tasks `dropped`."""
        return self._probes.without(dropped)[1]

    def tuned(self) -> Tuned:
        """The leave-one-out pass that ``explain["unlike"]`` reads; of the whole index, or of `only`."""
        return self._kernels.without()[1]

    def prepare(self) -> None:
        """Fit now, so that no query waits for it."""
        self.tuned()
        self.fit()

    @property
    def settings(self) -> dict[str, Any]:
        """The options, and what cross-validation chose."""
        probe = self.fit()
        chosen = {"C": probe.strength, "calibration temperature": probe.temperature}
        return {"router": "probe", "p": self.p, "temperature": self.temperature} | chosen

    def _weigh(self, vectors: np.ndarray, dropped: list[str]) -> list[Weights]:
        probe = self.fit(dropped)
        logits = np.log(np.maximum(probe.probabilities(vectors), 1e-300)) / self.temperature
        masses = np.exp(logits - logits.max(axis=1, keepdims=True))
        masses /= masses.sum(axis=1, keepdims=True)
        found = self.index.search(vectors, max(NEAREST, self.show), dropped, self.only)
        shown = neighbours(self.index, *found, self.show)
        unlike = None if dropped else self.tuned().unlike
        result = []
        for row, near, ids, distances in zip(masses.tolist(), shown, found[0], found[1], strict=True):
            mass = dict(sorted(zip(probe.tasks, row, strict=True), key=lambda item: (-item[1], item[0])))
            explain: dict[str, Any] = {
                "neighbours": near,
                "mass": mass,
                "router": "probe",
                "p": self.p,
                "temperature": self.temperature,
            }
            if unlike is not None:
                explain["unlike"] = unlike.score(ids, distances)
            else:
                explain["exclude"] = dropped
            result.append(Weights(nucleus(mass, self.p), "probe", explain))
        return result
