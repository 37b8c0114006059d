"""Weighting: how much of each adapter. One strategy a file; each returns `loralloy.weights.Weights`, nothing else."""

from .choose import KINDS, open_weigher
from .probe import ProbeRouter
from .retrieved import Router, kernel, nucleus
from .tuned import TunedRouter
from .unlike import Unlike, fall_back
from .weigher import Weigher

__all__ = [
    "KINDS",
    "ProbeRouter",
    "Router",
    "TunedRouter",
    "Unlike",
    "Weigher",
    "fall_back",
    "kernel",
    "nucleus",
    "open_weigher",
]
