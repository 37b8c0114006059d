"""Gates: from what a probe read to a weight for every adapter at every module.

With q_i(m) the signal of adapter i at module m (its response to the domain's inputs, divided by its response to the reference):

    1. l_i = log q_i - mean over adapters of log q_j     how the adapters compare; for two, l_D - l_T = log(q_D / q_T)
    2. over the modules: less the mean, divided by the spread    (`standardise`)
    3. a Gaussian mean over depth, within each projection        (`smooth`)
    4. g_i = exp(l_i / T) / sum_j exp(l_j / T)                   for two a sigmoid
    5. w_i = c_i n g_i                                           n adapters there; the mean over adapters is c

The level of q says little: an adapter trained on more of the domain's text answers more strongly everywhere, and would take the
task adapter's place everywhere. Step 2 takes it out and keeps where each adapter is strong against the other, so that every
adapter's mean weight stays near c_i. All of this is this project's own; "TaDA" (To et al. 2026, arXiv 2606.05016) is
public in its abstract only, which asks for weights by layer and projection that are invariant to the adapters' magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from ..errors import LoralloyError
from ..weights import Weights
from .contrasts import contrasted, depths, pooled, shuffle, smoothed, standardised
from .probed import Readings, Signal

Kind: TypeAlias = Literal["probe", "norm", "uniform", "ramp", "falling", "shuffled"]
KINDS: dict[Kind, str] = {
    "probe": "the probe's signal",
    "norm": "||dW x|| as it is: the larger adapter wins (as LoGo weighs adapters)",
    "uniform": "all adapters alike",
    "ramp": "by depth alone: the first adapter's share falls, of two from 0.7 to 0.3 at temperature 1, and the others' rise",
    "falling": "the ramp upside down",
    "shuffled": "the probe's gates, dealt to other modules at random",
}
REFERENCES = {
    "none": "the response alone",
    "general": "divided by the response to general inputs, so that what any input sets off drops out",
    "base": "against what the base's own weight answers to the same input",
}
STANDARDISE = {
    "spread": "less the mean over modules, divided by the spread",
    "centre": "less the mean over modules",
    "none": "as it is",
}
BY = {
    "module": "each layer and projection",
    "layer": "each layer, its projections alike",
    "projection": "each projection, its layers alike",
    "adapter": "one weight an adapter",
}
FORMS = {
    "share": "all adapters are gated, their mean weight is kept",
    "anchor": "the first adapter keeps its weight, the others are gated",
}
_RAMP = float(np.log(0.7 / 0.3))  # log odds of the two ends


@dataclass(frozen=True)
class Gate:
    """How signals become weights. The defaults are reasoned; that nothing is divided out was chosen on development pairs
    (docs/tada.md).

    Attributes:
        kind: one of KINDS.
        reference: one of REFERENCES; of kinds "probe" and "shuffled".
        temperature: above 0; large makes the adapters alike, small lets one take all.
        smooth: width of the mean over depth, in layers (standard deviation); 0 for none.
        standardise: one of STANDARDISE.
        by: one of BY: modules whose signals are averaged and that get one gate.
        form: one of FORMS.
        scale: c_i, one number an adapter, or empty for ones.
        seed: of "shuffled".

    Raises LoralloyError for a value that is none of these.
    """

    kind: Kind = "probe"
    reference: Literal["none", "general", "base"] = "none"
    temperature: float = 2.0
    smooth: float = 1.0
    standardise: Literal["spread", "centre", "none"] = "spread"
    by: Literal["module", "layer", "projection", "adapter"] = "module"
    form: Literal["share", "anchor"] = "share"
    scale: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        known: dict[str, Mapping[Any, str]] = {
            "kind": KINDS, "reference": REFERENCES, "standardise": STANDARDISE, "by": BY, "form": FORMS,
        }  # fmt: skip
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise LoralloyError(
                    f"{name} of the gate is {getattr(self, name)!r}; choose one of {', '.join(choices)}"
                )
        if not (np.isfinite(self.temperature) and self.temperature > 0):
            raise LoralloyError(f"temperature of the gate is {self.temperature}; it must be a number above 0")
        if not (np.isfinite(self.smooth) and self.smooth >= 0):
            raise LoralloyError(f"smooth of the gate is {self.smooth}; it must be a number of layers, 0 or more")
        if not all(np.isfinite(c) for c in self.scale):
            raise LoralloyError(f"scale of the gate is {self.scale}; give one finite number an adapter")

    @property
    def needs_general(self) -> bool:
        """Whether readings of general inputs are needed."""
        return self.reference == "general" and self.kind in ("probe", "shuffled")

    def weights(self, readings: Readings, general: Readings | None = None) -> Weights:
        """The weight of every adapter at every module that it has.

        A module that could not be probed (``"*"``), or that one adapter alone has, gets c_i: there is nothing to choose by.
        Raises LoralloyError where `general` is needed and not given or is of other adapters, and for a scale of another length.
        """
        names = readings.adapters
        scale = self.scale or (1.0,) * len(names)
        if len(scale) != len(names):
            raise LoralloyError(f"scale of the gate has {len(scale)} numbers for {len(names)} adapters; give one each")
        shares = self.shares(readings, general)
        there = ~np.isnan(readings.sums["norm"][0])
        n = there.sum(1, keepdims=True)
        factor = np.where(np.isnan(shares), 1.0, n * shares)
        if self.form == "anchor":
            factor[:, 0] = 1.0
        coefficients: dict[str, dict[str, float]] = {}
        for i, name in enumerate(names):
            own = {m: float(scale[i] * factor[k, i]) for k, m in enumerate(readings.modules) if there[k, i]}
            coefficients[name] = own | ({"*": float(scale[i])} if readings.left_out or not own else {})
        return Weights(coefficients, "probed", {"gate": self.to_dict(), "inputs": readings.inputs})

    def shares(self, readings: Readings, general: Readings | None = None) -> np.ndarray:
        """g, [M, n], rows that sum to 1; NaN where an adapter is absent."""
        contrast = self.contrast(readings, general)
        raised = np.exp((contrast - np.nanmax(contrast, 1, keepdims=True)) / self.temperature)
        shares = raised / np.nansum(raised, 1, keepdims=True)
        if self.kind == "shuffled":
            shuffle(shares, self.seed)
        return shares

    def contrast(self, readings: Readings, general: Readings | None = None) -> np.ndarray:
        """What the softmax takes (steps 1 to 3), before the temperature: [M, n], NaN where an adapter is absent."""
        modules = readings.modules
        there = ~np.isnan(readings.sums["norm"][0])
        if self.kind in ("uniform", "ramp", "falling"):
            return np.where(there, self._by_depth(modules, there), np.nan)
        logs = np.where(there, self.signal(readings, general), np.nan)
        shared = there.sum(1) > 1
        found = np.where(there, 0.0, np.nan)
        if not shared.any():
            return found
        found[shared] = standardised(contrasted(logs[shared]), self.standardise)
        found[shared] = pooled(found[shared], [m for m, s in zip(modules, shared, strict=True) if s], self.by)
        if self.smooth > 0 and self.by in ("module", "layer"):
            found[shared] = smoothed(found[shared], [m for m, s in zip(modules, shared, strict=True) if s], self.smooth)
        return found

    def signal(
        self, readings: Readings, general: Readings | None = None, counts: np.ndarray | None = None
    ) -> np.ndarray:
        """log q, [..., M, n]: `counts` as in :meth:`Readings.mean`."""
        which: Signal = "norm" if self.kind == "norm" else "base" if self.reference == "base" else "response"
        with np.errstate(divide="ignore"):
            logs = np.log(readings.mean(which, counts))
        if np.isneginf(logs).any() or (
            which == "base" and np.isnan(logs[..., ~np.isnan(readings.sums["norm"][0])]).any()
        ):
            raise LoralloyError(
                f"the {which} signal is 0 or not defined at some module (a quantised base, or inputs that an adapter does not "
                "answer to); choose another reference or other inputs"
            )
        if self.needs_general:
            if general is None:
                raise LoralloyError(
                    "reference 'general' needs readings of general inputs; give them, or reference 'none'"
                )
            if (general.adapters, general.modules) != (readings.adapters, readings.modules):
                raise LoralloyError("the general inputs were read with other adapters or modules than the domain's")
            logs = logs - np.log(general.mean("response"))
        return logs

    def to_dict(self) -> dict[str, Any]:
        return {**{k: getattr(self, k) for k in self.__dataclass_fields__}, "scale": list(self.scale)}

    def _by_depth(self, modules: Sequence[str], there: np.ndarray) -> np.ndarray:
        if self.kind == "uniform":
            return np.zeros(there.shape)
        rise = (2 * depths(modules) - 1)[:, None] * _RAMP / 2 * (1 if self.kind == "ramp" else -1)
        sign = np.ones(there.shape[1])
        sign[0] = -1
        return np.nan_to_num(rise) * sign


@dataclass(frozen=True)
class Depth:
    """How the log odds of an adapter against the first change from the first layer to the last, with a 95 % interval over
    calibration inputs; and how far two halves of the inputs agree (the correlation of their log odds over modules)."""

    slope: float
    low: float
    high: float
    agreement: float


def depth_slope(
    gate: Gate,
    readings: Readings,
    general: Readings | None = None,
    adapter: int = 1,
    samples: int = 1000,
    seed: int = 0,
) -> Depth:
    """The least squares slope over depth of log(q_adapter / q_first) before any standardisation, and how sure it is.

    The interval is a bootstrap of the domain's inputs: the adapters and the general inputs are taken as they are. NaN without
    two layers.
    """
    depth = depths(readings.modules)
    odds = gate.signal(readings, general)
    ok = ~np.isnan(depth) & ~np.isnan(odds[:, 0]) & ~np.isnan(odds[:, adapter])
    if ok.sum() < 2 or np.ptp(depth[ok]) == 0:
        return Depth(*[float("nan")] * 4)
    x = depth[ok] - depth[ok].mean()

    def slopes(counts: np.ndarray) -> np.ndarray:
        q = gate.signal(readings, general, counts)[..., ok, :]
        return (q[..., adapter] - q[..., 0]) @ x / (x @ x)

    n, rng = readings.inputs, np.random.default_rng(seed)
    drawn = rng.multinomial(n, np.full(n, 1 / n), samples).astype(float)
    many = slopes(drawn) if n > 1 else np.full(1, np.nan)
    halves = [np.arange(n) % 2 == k for k in (0, 1)]
    agreement = float("nan")
    if n > 1:
        one, two = (
            (q[ok, adapter] - q[ok, 0]) for q in (gate.signal(readings, general, h.astype(float)) for h in halves)
        )
        if min(np.std(one), np.std(two)) > 0:
            agreement = float(np.corrcoef(one, two)[0, 1])
    low, high = np.nanpercentile(many, [2.5, 97.5]) if n > 1 else (float("nan"), float("nan"))
    return Depth(float(slopes(np.ones(n))), float(low), float(high), agreement)
