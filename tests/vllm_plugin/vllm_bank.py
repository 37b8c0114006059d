"""Small adapters for the plugin's tests."""

from __future__ import annotations

from helpers import adapter, factors

MODULES = {"model.layers.0.q_proj": (12, 9), "model.layers.0.v_proj": (7, 9)}


def small(name, seed, rank=4, **more):
    parts = {m: factors(o, i, rank, seed * 10 + k) for k, (m, (o, i)) in enumerate(MODULES.items())}
    return adapter(parts, name, **more)
