"""A linear probe on stored vectors: multinomial logistic regression, calibrated. Our design, beside the paper's kernel."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import LoralloyError
from .leave_one_out import Rows

STRENGTHS = (0.005, 0.02, 0.08, 0.32)  # C: inverse L2 strength, against the sum of the rows' losses
FOLDS = 3
CHOICE_ROWS = 400  # examples a task that C is chosen on
HELD_OUT = 5  # one in so many examples is held out to choose the temperature
SHRINK = 0.1  # share of the mean variance that is added to every direction before whitening
BINS = 15


@dataclass(frozen=True)
class Probe:
    """softmax((W x + b) / T) over `tasks`, for unit vectors x.

    `weight` [tasks, d], `bias` [tasks], float32; `temperature` T; `strength` C as scikit-learn has it; `report`, the
    cross-validated figures of the choice, by kind of query.
    """

    tasks: tuple[str, ...]
    weight: np.ndarray
    bias: np.ndarray
    temperature: float
    strength: float
    report: Mapping[str, Any] = field(default_factory=dict)

    def probabilities(self, vectors: np.ndarray) -> np.ndarray:
        """``[m, tasks]``, each row summing to 1, for vectors ``[m, d]``."""
        return softmax((vectors @ self.weight.T + self.bias).astype(np.float64) / self.temperature)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def log_loss(logits: np.ndarray, own: np.ndarray, shares: np.ndarray) -> float:
    """Mean of -log softmax at the own task, weighted by `shares`, in nats."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return float(shares @ (np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(own)), own]))


def calibration_error(probabilities: np.ndarray, own: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of the top task: mean over equal-width bins of \\|confidence - accuracy\\|."""
    top, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == own
    place = np.minimum((top * bins).astype(int), bins - 1)
    gaps = [abs(top[place == b].mean() - right[place == b].mean()) * (place == b).mean() for b in np.unique(place)]
    return float(sum(gaps))


def _solve(rows: Rows, strengths: tuple[float, ...], positions: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each C, weight [tasks, d] and bias [tasks] of the logistic regression on the vectors at `positions`.

    It is solved on vectors whitened by the within-task covariance (a fixed linear map, folded back into the weights):
    L-BFGS then takes tens of iterations, not hundreds, and the L2 norm counts every direction by how much rows of one
    task spread along it. Every task counts the same, however many rows it has.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise LoralloyError("the probe needs scikit-learn: pip install 'loralloy[retrieval]'") from None

    x, labels, share = rows.vectors[positions], rows.labels[positions], rows.shares(positions)
    n, d = len(rows.tasks), x.shape[1]
    means = np.stack([x[labels == task].mean(axis=0) for task in range(n)])
    centre = means.mean(axis=0)
    spread = x - means[labels]
    values, axes = np.linalg.eigh(((spread * share[:, None].astype(np.float32)).T @ spread).astype(np.float64))
    floor = SHRINK * max(values.mean(), 1e-12)
    whiten = (axes / np.sqrt(np.maximum(values, 0) + floor)).astype(np.float32)  # [d, d]
    z = (x - centre) @ whiten
    solved = []
    for strength in strengths:
        model = LogisticRegression(C=strength, tol=3e-4, max_iter=100)
        with warnings.catch_warnings():  # 100 iterations are enough: cross-validation judges what they give
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(z, labels, sample_weight=share * len(labels))
        inner, bias = model.coef_, model.intercept_
        if n == 2:  # scikit-learn keeps the one difference
            inner, bias = np.concatenate([-inner, inner]) / 2, np.concatenate([-bias, bias]) / 2
        weight = inner @ whiten.T
        solved.append((weight.astype(np.float32).reshape(n, d), (bias - weight @ centre).astype(np.float32)))
    return solved


def _folds(rows: Rows, positions: np.ndarray, folds: int) -> np.ndarray | None:
    """A fold [m] for each vector, by example, so that the two vectors of one are never on both sides; None where some
    task would be missing from a fold's other side."""
    fold = np.zeros(len(positions), dtype=int)
    for task in range(len(rows.tasks)):
        mine = np.flatnonzero(rows.labels[positions] == task)
        fold[mine] = np.unique(rows.order[positions[mine]], return_inverse=True)[1] % folds
        if len(np.unique(fold[mine])) < folds:
            return None
    return fold


def _choose(rows: Rows) -> float:
    """C by 3-fold cross-validated log-loss, on at most 400 examples a task.

    The rows' losses are summed, so C is a prior that more rows outweigh: the best C of a part is good for the whole.
    """
    picked = rows.sample(CHOICE_ROWS)
    fold = _folds(rows, picked, FOLDS)
    if fold is None:
        return STRENGTHS[1]  # a task of one or two examples: nothing can be held out
    held = np.zeros((len(STRENGTHS), len(picked), len(rows.tasks)))
    for f in range(FOLDS):
        for n, (weight, bias) in enumerate(_solve(rows, STRENGTHS, picked[fold != f])):
            held[n, fold == f] = rows.vectors[picked[fold == f]] @ weight.T + bias
    own, share = rows.labels[picked], rows.shares(picked)
    return STRENGTHS[int(np.argmin([log_loss(logits, own, share) for logits in held]))]


def _calibrate(rows: Rows, strength: float) -> tuple[float, dict[str, Any]]:
    """The temperature of least log-loss on a fifth of the examples, held out of a fit on the rest; and their figures."""
    from scipy.optimize import minimize_scalar

    every = np.arange(len(rows.labels))
    fold = _folds(rows, every, HELD_OUT)
    if fold is None:
        return 1.0, {}
    weight, bias = _solve(rows, (strength,), every[fold > 0])[0]
    out = every[fold == 0]
    logits, own, share = (rows.vectors[out] @ weight.T + bias).astype(np.float64), rows.labels[out], rows.shares(out)
    found = minimize_scalar(lambda t: log_loss(logits / np.exp(t), own, share), bounds=(-2, 2), method="bounded")
    temperature = float(np.exp(found.x))
    report: dict[str, Any] = {"held out": len(np.unique(rows.groups[out]))}
    for kind in sorted(set(rows.kinds)):
        mine = rows.kinds[out] == kind
        p, part = softmax(logits[mine] / temperature), share[mine] / share[mine].sum()
        report[str(kind)] = {
            "top1": float(part @ (p.argmax(axis=1) == own[mine])),
            "own": float(part @ p[np.arange(len(p)), own[mine]]),
            "log_loss": log_loss(logits[mine] / temperature, own[mine], part),
            "calibration_error": calibration_error(p, own[mine]),
        }
    return temperature, report


def fit_probe(rows: Rows, chosen: tuple[float, float] | None = None) -> Probe:
    """The probe of an index's rows. `chosen`: (C, temperature); else C by cross-validation and the temperature on
    held-out examples. Deterministic: rows are taken by hash, and the optimisation starts from 0."""
    if len(rows.tasks) == 1:
        return Probe(rows.tasks, np.zeros((1, rows.vectors.shape[1]), np.float32), np.zeros(1, np.float32), 1.0, 0.0)
    strength = chosen[0] if chosen else _choose(rows)
    temperature, report = (chosen[1], {}) if chosen else _calibrate(rows, strength)
    weight, bias = _solve(rows, (strength,), np.arange(len(rows.labels)))[0]
    return Probe(rows.tasks, weight, bias, temperature, strength, report)
