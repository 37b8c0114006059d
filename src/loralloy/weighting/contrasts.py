"""Arrays [M, n] of modules and adapters on their way to gates: less their means, pooled, smoothed over depth (:mod:`.gating`)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ..layerwise import layer_of

_LAYER = re.compile(r"(^|\.)\d+(?=\.|$)")


def projection_of(module: str) -> str:
    """The module's name without its layer: ``model.layers.*.mlp.up_proj``."""
    return _LAYER.sub(r"\1*", module, count=1)


def depths(modules: Sequence[str]) -> np.ndarray:
    """Where a module's layer lies between the first and the last, 0 to 1; NaN for a module without a layer."""
    layers = [layer_of(m) for m in modules]
    found = [layer for layer in layers if layer is not None]
    low, high = min(found, default=0), max(found, default=0)
    return np.array([np.nan if layer is None else (layer - low) / max(1, high - low) for layer in layers])


def contrasted(logs: np.ndarray) -> np.ndarray:
    return logs - np.nanmean(logs, -1, keepdims=True)


def standardised(contrast: np.ndarray, how: str) -> np.ndarray:
    """Step 2. The spread is that of the differences between adapters: for two, of log(q_D / q_T)."""
    if how == "none":
        return contrast
    centred = contrast - np.nanmean(contrast, 0, keepdims=True)
    centred = centred - np.nanmean(centred, 1, keepdims=True)
    if how == "centre":
        return centred
    pairs = [centred[:, i] - centred[:, j] for i in range(centred.shape[1]) for j in range(i)]
    spread = np.sqrt(np.nanmean(np.square(pairs)))
    return centred / spread if spread > 1e-9 else np.zeros_like(centred)


def pooled(x: np.ndarray, modules: Sequence[str], by: str) -> np.ndarray:
    """Means over the modules that share a gate."""
    if by == "module":
        return x
    keys = [layer_of(m) if by == "layer" else projection_of(m) if by == "projection" else "" for m in modules]
    out = x.copy()
    for key in dict.fromkeys(keys):
        rows = [k for k, other in enumerate(keys) if other == key]
        out[rows] = np.where(np.isnan(x[rows]), np.nan, np.nanmean(x[rows], 0))
    return out


def smoothed(x: np.ndarray, modules: Sequence[str], width: float) -> np.ndarray:
    """A Gaussian mean over the layers of each projection; modules without a layer stay."""
    out = x.copy()
    kinds = [projection_of(m) for m in modules]
    layers = [layer_of(m) for m in modules]
    for kind in dict.fromkeys(kinds):
        rows = [k for k, other in enumerate(kinds) if other == kind and layers[k] is not None]
        at = np.array([layers[k] for k in rows], dtype=float)
        near = np.exp(-0.5 * ((at[:, None] - at[None]) / width) ** 2)
        part = x[rows]
        there = ~np.isnan(part)
        total = near @ np.where(there, part, 0.0)
        out[rows] = np.where(there, total / np.maximum(near @ there, 1e-300), np.nan)
    return out


def shuffle(shares: np.ndarray, seed: int) -> None:
    """Rows are dealt anew, among modules that the same adapters have; in place."""
    rng = np.random.default_rng(seed)
    kinds = [tuple(row) for row in np.isnan(shares)]
    for kind in dict.fromkeys(kinds):
        rows = np.array([k for k, other in enumerate(kinds) if other == kind])
        shares[rows] = shares[rng.permutation(rows)]
