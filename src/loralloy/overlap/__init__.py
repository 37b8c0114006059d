"""What adapters share before they are merged: cosine of dW, common directions, sign conflict, and what it says of rules."""

from __future__ import annotations

from .group import Group
from .measure import By, Overlap, overlap
from .plot import draw
from .table import tables
from .verdict import Remark, candidates, verdict

__all__ = ["By", "Group", "Overlap", "Remark", "candidates", "draw", "overlap", "tables", "verdict"]
