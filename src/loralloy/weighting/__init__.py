"""Weighting: how much of each adapter. One strategy a file; each returns `loralloy.weights.Weights`, nothing else."""

from .retrieved import Router, kernel, nucleus

__all__ = ["Router", "kernel", "nucleus"]
