"""Helpers of the neighbouring rooms."""

from __future__ import annotations

import sys
from pathlib import Path

for room in ("training", "retrieval"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / room))
