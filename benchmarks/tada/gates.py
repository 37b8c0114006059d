"""What a cell tells of a design: how its gates lie over the depth of a model, and what its rule discarded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from designs import Method

from loralloy.merging.tada import Found
from loralloy.weighting.contrasts import depths
from loralloy.weighting.gating import Gate, depth_slope
from loralloy.weighting.probed import Readings


def over_depth(method: Method, seed: int, readings: Readings, general: Readings | None) -> dict[str, Any]:
    """The domain's share by third of the depth, and the slope of log(q_D / q_T) over depth (see `depth_slope`)."""
    assert method.gate is not None
    gate = Gate(**{**method.gate, "scale": (1.0, 1.0), "seed": seed})
    share = gate.shares(readings, general)[:, 1]
    depth = depths(readings.modules)
    thirds = [share[(depth >= low) & (depth <= low + 1 / 3)] for low in (0.0, 1 / 3, 2 / 3)]
    told: dict[str, Any] = {"domain_share": [float(t.mean()) if len(t) else None for t in thirds]}
    if gate.kind == "probe":
        slope = depth_slope(gate, readings, general, samples=200)
        told["slope"] = [slope.slope, slope.low, slope.high, slope.agreement]
    return told


def discarded(seen: Sequence[Found]) -> dict[str, Any]:
    """Components over all modules, and the share of ||dW||_F that went with them."""
    lost, all_ = (torch.cat([getattr(f, n) for f in seen]).double().square().sum() for n in ("removed", "total"))
    counts = {n: sum(int(getattr(f, n).sum()) for f in seen) for n in ("components", "dropped", "cleared")}
    return {**counts, "removed": float((lost / all_).sqrt()) if float(all_) else 0.0}
