"""Compositions inside a running transformers model (needs the `live` extra)."""

from __future__ import annotations

from .composed import LiveModel

__all__ = ["LiveModel"]
