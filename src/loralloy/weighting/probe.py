"""Weights from a probe: calibrated probabilities of the tasks, then the paper's nucleus."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..weights import Weights
from . import fitted
from .leave_one_out import Rows
from .probe_fit import Design, Probe, fit_probe
from .retrieved import Router, nucleus
from .subsets import Subsets
from .tuned import Tuned, fit_kernel
from .unlike import NEAREST
from .weigher import Weighing, neighbours

if TYPE_CHECKING:
    from ..retrieval.index import Index


def fit(index: Index, names: Sequence[str], read: Callable[[], Rows], chosen: tuple[Design, float] | None) -> Probe:
    """:func:`fit_probe` on the rows of tasks `names`, kept in the index folder (a fit of a given design apart)."""
    kind = "probe"
    if chosen is not None:
        design, temperature = chosen
        given = json.dumps([design.units, design.penalty, temperature])
        kind += "_" + hashlib.sha256(given.encode()).hexdigest()[:8]
    if kept := fitted.load(index, kind, names):
        data, arrays = kept
        layers = tuple((arrays[f"weight{n}"], arrays[f"bias{n}"]) for n in range(len(arrays) // 2))
        design = Design(data["units"], data["penalty"])
        return Probe(tuple(data["tasks"]), layers, data["temperature"], design, data["report"])
    probe = fit_probe(read(), chosen)
    data = {
        "tasks": list(probe.tasks),
        "temperature": probe.temperature,
        "units": probe.design.units,
        "penalty": probe.design.penalty,
        "report": probe.report,
    }
    arrays = {f"weight{n}": weight for n, (weight, _) in enumerate(probe.layers)}
    arrays |= {f"bias{n}": bias for n, (_, bias) in enumerate(probe.layers)}
    fitted.save(index, kind, names, data, arrays)
    return probe


class ProbeRouter(Weighing):
    """Weights by a probe of the index's vectors, linear or with a hidden layer (:func:`fit_probe`), cut by the nucleus.

    A task that is left out takes no part: the probe is fitted again without its rows and its class (seconds, once; only
    the design and the temperature, a few numbers, stay those of the whole index or of `only`). `temperature` multiplies the
    calibrated one; `show`: how many nearest rows explain a weight. ``explain["unlike"]`` is there unless tasks are left out
    of a query; with `unlike` it is there too, for a leave-one-out pass without them.
    """

    def __init__(
        self,
        index: Index,
        only: Collection[str] | None = None,
        p: float = 0.9,
        temperature: float = 1.0,
        show: int = 5,
        unlike: bool = False,
    ) -> None:
        Router(index, p=p, temperature=temperature, show=show)  # checks
        self.index, self.only, self.p, self.temperature, self.show = index, only, p, temperature, show
        self.unlike = unlike
        self._probes = Subsets(index, only, self._fit)
        self._kernels = Subsets(index, only, lambda names, read: fit_kernel(index, names, read))

    def _fit(self, names: tuple[str, ...], read: Callable[[], Rows]) -> Probe:
        whole = tuple(sorted(self.index.tasks_left((), self.only)))
        if names == whole:
            return fit(self.index, names, read, None)
        of_all = self.fit()
        return fit(self.index, names, read, (of_all.design, of_all.temperature))

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
        """The options, and what held-out rows chose."""
        probe = self.fit()
        chosen = probe.design.settings | {"calibration temperature": probe.temperature}
        return {"router": "probe", "p": self.p, "temperature": self.temperature} | chosen

    def _weigh(self, vectors: np.ndarray, dropped: list[str]) -> list[Weights]:
        probe = self.fit(dropped)
        logits = np.log(np.maximum(probe.probabilities(vectors), 1e-300)) / self.temperature
        masses = np.exp(logits - logits.max(axis=1, keepdims=True))
        masses /= masses.sum(axis=1, keepdims=True)
        found = self.index.search(vectors, max(NEAREST, self.show), dropped, self.only)
        shown = neighbours(self.index, *found, self.show)
        unlike = self._kernels.without(dropped)[1].unlike if self.unlike or not dropped else None
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
            if dropped:
                explain["exclude"] = dropped
            result.append(Weights(nucleus(mass, self.p), "probe", explain))
        return result
