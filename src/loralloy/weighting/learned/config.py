"""How coefficients are fitted: rates, steps, the start, the hold-out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ...errors import LoralloyError

ENOUGH = (
    4  # samples a stratum from which on some are held out by default, and coefficients may be finer than one an adapter
)
FINE = 40  # samples in all that the latter needs, too: with so few it was tried at no fewer than 4 a stratum
NOISE = 0.1  # label noise of strata with fewer than ENOUGH samples


@dataclass(frozen=True)
class LearnConfig:
    """How coefficients are fitted.

    Attributes:
        lr: Adam's rate at the first step; it falls to 0 along a cosine.
        steps: gradient steps.
        batch_size: rows a step; None for all.
        regularisation: lambda of lambda * mean (c - c_start)^2; None for 0.1 / (samples a stratum, at most 16): the fewer, the
            closer to the start.
        hold_out: fraction of every stratum that is kept from the gradients and picks the best step; 0 for none; "auto" is a
            quarter where every stratum has at least 4, else none.
        patience: steps without a better held-out loss after which a run ends (only with a hold-out).
        start: "scale" (ours): the best uniform scale by a line search on the buffer; "zero": the poster's alpha_0; or a scale.
            The poster's loss is that of `label_noise` 0.
        scales: what the line search tries, as far as they lie within the form's range: "near" (0.7 to 1.4) or "wide" (0.4 to 1.8
            times the scale at which the merge is as long as the adapters are,
            :meth:`loralloy.live.learnable.Learnable.matching_scale`), or scales. "auto" is wide where every stratum has at least
            4 samples, else near: of few rows, one that no scale answers right can take the start far off.
        label_noise: epsilon of a likelihood under which an answer is drawn at random from the example's n choices with that
            probability: -log((1 - epsilon) p + epsilon / n) instead of -log p, so that one example that no weights answer right
            is not all that is learned from. Answers without choices keep -log p. "auto" is 0.1 where a stratum of samples with
            choices has fewer than 4 of them, else 0.
        rows_at_once: rows of one forward, which bounds memory; the gradient is that of all of them.
        replay: on a GPU, record a step and replay it where the objective allows it, which saves launching its kernels one by
            one; as much memory as a step takes is held for as long as the run lasts.
        seed: of the hold-out and the batches.

    Raises LoralloyError for values out of range.
    """

    lr: float = 0.1
    steps: int = 60
    batch_size: int | None = None
    regularisation: float | None = None
    hold_out: float | Literal["auto"] = "auto"
    patience: int = 20
    start: float | Literal["scale", "zero"] = "scale"
    scales: tuple[float, ...] | Literal["auto", "near", "wide"] = "auto"
    label_noise: float | Literal["auto"] = "auto"
    rows_at_once: int = 32
    replay: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        def check(name: str, good: bool, allowed: str) -> None:
            if not good:
                raise LoralloyError(f"{name} is {getattr(self, name)!r}; give {allowed}")

        check("lr", _number(self.lr) and self.lr > 0, "a number above 0")
        check("steps", _whole(self.steps) and self.steps >= 0, "a whole number from 0")
        check(
            "batch_size",
            self.batch_size is None or (_whole(self.batch_size) and self.batch_size > 0),
            "a whole number from 1",
        )
        check("patience", _whole(self.patience) and self.patience >= 1, "a whole number from 1")
        check("rows_at_once", _whole(self.rows_at_once) and self.rows_at_once >= 1, "a whole number from 1")
        lam, held = self.regularisation, self.hold_out
        check("regularisation", lam is None or (_number(lam) and lam >= 0), "a number from 0")
        check("hold_out", held == "auto" or (_number(held) and 0 <= held < 1), "'auto' or a fraction from 0, below 1")
        check("start", self.start in ("scale", "zero") or _number(self.start), "'scale', 'zero' or a number")
        noise = self.label_noise
        check(
            "label_noise", noise == "auto" or (_number(noise) and 0 <= noise < 1), "'auto' or a number from 0, below 1"
        )
        named = isinstance(self.scales, str)
        check("scales", self.scales in ("auto", "near", "wide") if named else len(self.scales) > 0,
              "'auto', 'near', 'wide' or at least one scale")  # fmt: skip


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
