"""Gates: Arrow (training-free, by token), trained linear routers (by token or row), LoGo (weights by query)."""

from __future__ import annotations

from .arrow import Arrow
from .logo import Logo
from .router import LinearRouter

__all__ = ["Arrow", "LinearRouter", "Logo"]
