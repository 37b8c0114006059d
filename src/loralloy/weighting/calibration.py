"""What a router's probabilities are judged by on held-out rows, and the temperature that calibrates them."""

from __future__ import annotations

import numpy as np

BINS = 15


def softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def log_loss(logits: np.ndarray, own: np.ndarray, shares: np.ndarray) -> float:
    """Mean of -log softmax at the own task, weighted by `shares`, in nats."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return float(shares @ (np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(own)), own]))


def squared_distances(probabilities: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Brier scores [m]: each row's squared distance from 1 at the own task and 0 elsewhere (0 to 2)."""
    return (probabilities**2).sum(axis=1) - 2 * probabilities[np.arange(len(own)), own] + 1


def calibration_error(probabilities: np.ndarray, own: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of the top task: mean over equal-width bins of \\|confidence - accuracy\\|."""
    top, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == own
    place = np.minimum((top * bins).astype(int), bins - 1)
    gaps = [abs(top[place == b].mean() - right[place == b].mean()) * (place == b).mean() for b in np.unique(place)]
    return float(sum(gaps))


def best_temperature(logits: np.ndarray, own: np.ndarray, shares: np.ndarray) -> float:
    """T of least log-loss of softmax(logits / T), between e^-2 and e^2 (temperature scaling: Guo et al. 2017)."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(lambda t: log_loss(logits / np.exp(t), own, shares), bounds=(-2, 2), method="bounded")
    return float(np.exp(found.x))
