"""A probe of an index's rows: linear or with a hidden layer, as held-out rows say; calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import hidden_probe, linear_probe
from .calibration import best_temperature, calibration_error, log_loss, softmax, squared_distances
from .leave_one_out import Rows
from .linear_probe import CHOICE_ROWS, STRENGTHS, Layer, folds_of

HELD_OUT = 5  # one in so many examples is held out to choose the design, and another time to choose the temperature


@dataclass(frozen=True)
class Design:
    """What is settled before weights are fitted: `units` of the hidden layer (0: a linear probe); `penalty`, the C of the
    logistic regression, or the dropout of the hidden units."""

    units: int
    penalty: float

    @property
    def settings(self) -> dict[str, Any]:
        return {"hidden units": self.units, "dropout": self.penalty} if self.units else {"C": self.penalty}

    def fit(self, rows: Rows, positions: np.ndarray) -> tuple[Layer, ...]:
        """The layers for the vectors at `positions`."""
        if self.units:
            return hidden_probe.train(rows, positions, self.units, self.penalty)
        return tuple(linear_probe.solve(rows, (self.penalty,), positions))


@dataclass(frozen=True)
class Probe:
    """softmax(f(x) / T) over `tasks`, for unit vectors x; f is W x + b, or W2 relu(W1 x + b1) + b2.

    `layers`: weight [out, in] and bias [out] of each, float32; `temperature` T; `report`, the figures of held-out examples
    by kind of query, and the mean Brier scores that the design was chosen by.
    """

    tasks: tuple[str, ...]
    layers: tuple[Layer, ...]
    temperature: float
    design: Design
    report: Mapping[str, Any] = field(default_factory=dict)

    def probabilities(self, vectors: np.ndarray) -> np.ndarray:
        """``[m, tasks]``, each row summing to 1, for vectors ``[m, d]``."""
        return softmax(logits(self.layers, vectors) / self.temperature)


def logits(layers: tuple[Layer, ...], vectors: np.ndarray) -> np.ndarray:
    """``[m, tasks]``, float64, for vectors ``[m, d]``."""
    for weight, bias in layers[:-1]:
        vectors = np.maximum(vectors @ weight.T + bias, 0)
    weight, bias = layers[-1]
    return (vectors @ weight.T + bias).astype(np.float64)


def choose_design(rows: Rows) -> tuple[Design, dict[str, float]]:
    """The design for these rows, and the mean Brier score of each that was tried.

    At most 400 examples a task take part; a fifth of them is held out. The linear probe, its C cross-validated, gives way
    to one of :data:`hidden_probe.DESIGNS`, in turn, when that one's score, each at its best temperature, is better by more
    than a standard error of the difference: few rows do not teach a hidden layer. The Brier score is what the tuned
    kernel's options are chosen by too: it looks at the weights that a query would get.
    """
    linear = Design(0, linear_probe.choose_strength(rows))
    picked = rows.sample(CHOICE_ROWS)
    fold = folds_of(rows, picked, HELD_OUT)
    if fold is None:
        return linear, {}
    out = picked[fold == 0]
    own, share = rows.labels[out], rows.shares(out)
    best, least, scores = linear, np.zeros(0), {}
    for design in (linear, *(Design(*pair) for pair in hidden_probe.DESIGNS)):
        found = logits(design.fit(rows, picked[fold > 0]), rows.vectors[out])
        score = squared_distances(softmax(found / best_temperature(found, own, share)), own)
        scores[", ".join(f"{name} {value}" for name, value in design.settings.items())] = float(share @ score)
        if design is linear:
            least = score
            continue
        gain = least - score
        error = np.sqrt((share**2) @ (gain - share @ gain) ** 2)
        if share @ gain > error:
            best, least = design, score
    return best, scores


def calibrate(rows: Rows, design: Design) -> tuple[float, dict[str, Any]]:
    """The temperature of least log-loss on a fifth of the examples, held out of a fit on the rest; and their figures."""
    every = np.arange(len(rows.labels))
    fold = folds_of(rows, every, HELD_OUT)
    if fold is None:
        return 1.0, {}
    out = every[fold == 0]
    found, own, share = logits(design.fit(rows, every[fold > 0]), rows.vectors[out]), rows.labels[out], rows.shares(out)
    temperature = best_temperature(found, own, share)
    report: dict[str, Any] = {"held out": len(np.unique(rows.groups[out]))}
    for kind in sorted(set(rows.kinds)):
        mine = rows.kinds[out] == kind
        p, part = softmax(found[mine] / temperature), share[mine] / share[mine].sum()
        report[str(kind)] = {
            "top1": float(part @ (p.argmax(axis=1) == own[mine])),
            "own": float(part @ p[np.arange(len(p)), own[mine]]),
            "log_loss": log_loss(found[mine] / temperature, own[mine], part),
            "calibration_error": calibration_error(p, own[mine]),
        }
    return temperature, report


def fit_probe(rows: Rows, chosen: tuple[Design, float] | None = None) -> Probe:
    """The probe of an index's rows. `chosen`: design and temperature; else both by held-out examples. Deterministic: rows
    are taken by hash, and training is seeded."""
    if len(rows.tasks) == 1:
        only = np.zeros((1, rows.vectors.shape[1]), np.float32), np.zeros(1, np.float32)
        return Probe(rows.tasks, (only,), 1.0, Design(0, STRENGTHS[1]))
    report: dict[str, Any] = {}
    if chosen:
        design, temperature = chosen
    else:
        design, scores = choose_design(rows)
        temperature, report = calibrate(rows, design)
        if scores:
            report["brier"] = scores
    return Probe(rows.tasks, design.fit(rows, np.arange(len(rows.labels))), temperature, design, report)
