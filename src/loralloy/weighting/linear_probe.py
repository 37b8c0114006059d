"""A linear probe on stored vectors: multinomial logistic regression. Our design, beside the paper's kernel."""

from __future__ import annotations

import warnings

import numpy as np

from ..errors import LoralloyError
from .calibration import log_loss
from .leave_one_out import Rows

STRENGTHS = (0.005, 0.02, 0.08, 0.32)  # C: inverse L2 strength, against the sum of the rows' losses
FOLDS = 3
CHOICE_ROWS = 400  # examples a task that a design is chosen on
SHRINK = 0.1  # share of the mean variance that is added to every direction before whitening

Layer = tuple[np.ndarray, np.ndarray]
"""Weight [out, in] and bias [out] of ``x @ weight.T + bias``, float32."""


def whitening(rows: Rows, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre [d] and matrix [d, d]: ``(x - centre) @ matrix`` has about unit within-task covariance, tasks counting the
    same. A fixed linear map, folded back into the first layer of what is fitted on it."""
    x, labels, share = rows.vectors[positions], rows.labels[positions], rows.shares(positions)
    means = np.stack([x[labels == task].mean(axis=0) for task in range(len(rows.tasks))])
    spread = x - means[labels]
    values, axes = np.linalg.eigh(((spread * share[:, None].astype(np.float32)).T @ spread).astype(np.float64))
    floor = SHRINK * max(values.mean(), 1e-12)
    return means.mean(axis=0), (axes / np.sqrt(np.maximum(values, 0) + floor)).astype(np.float32)


def solve(rows: Rows, strengths: tuple[float, ...], positions: np.ndarray) -> list[Layer]:
    """For each C, weight [tasks, d] and bias [tasks] of the logistic regression on the vectors at `positions`.

    It is solved on whitened vectors: L-BFGS then takes tens of iterations, not hundreds, and the L2 norm counts every
    direction by how much rows of one task spread along it. Every task counts the same, however many rows it has.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise LoralloyError("the probe needs scikit-learn: pip install 'loralloy[retrieval]'") from None

    labels, share = rows.labels[positions], rows.shares(positions)
    n, d = len(rows.tasks), rows.vectors.shape[1]
    centre, whiten = whitening(rows, positions)
    z = (rows.vectors[positions] - centre) @ whiten
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


def folds_of(rows: Rows, positions: np.ndarray, folds: int) -> np.ndarray | None:
    """A fold [m] for each vector, by example, so that the two vectors of one are never on both sides; None where some
    task would be missing from a fold's other side."""
    fold = np.zeros(len(positions), dtype=int)
    for task in range(len(rows.tasks)):
        mine = np.flatnonzero(rows.labels[positions] == task)
        fold[mine] = np.unique(rows.order[positions[mine]], return_inverse=True)[1] % folds
        if len(np.unique(fold[mine])) < folds:
            return None
    return fold


def choose_strength(rows: Rows) -> float:
    """C by 3-fold cross-validated log-loss, on at most 400 examples a task.

    The rows' losses are summed, so C is a prior that more rows outweigh: the best C of a part is good for the whole.
    """
    picked = rows.sample(CHOICE_ROWS)
    fold = folds_of(rows, picked, FOLDS)
    if fold is None:
        return STRENGTHS[1]  # a task of one or two examples: nothing can be held out
    held = np.zeros((len(STRENGTHS), len(picked), len(rows.tasks)))
    for f in range(FOLDS):
        for n, (weight, bias) in enumerate(solve(rows, STRENGTHS, picked[fold != f])):
            held[n, fold == f] = rows.vectors[picked[fold == f]] @ weight.T + bias
    own, share = rows.labels[picked], rows.shares(picked)
    return STRENGTHS[int(np.argmin([log_loss(logits, own, share) for logits in held]))]
