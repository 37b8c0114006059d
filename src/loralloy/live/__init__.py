"""Compositions inside a running transformers model (needs the `live` extra)."""

from __future__ import annotations

from .composed import LiveModel
from .gated import Gate, Gated, Pass
from .merged_rows import MergedRows

__all__ = ["Gate", "Gated", "LiveModel", "MergedRows", "Pass"]
