"""Helpers of the neighbouring rooms."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

for room in ("training", "retrieval"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / room))


@pytest.fixture(scope="module", autouse=True)
def unsynced():
    """Streams write hundreds of small files; waiting for the disk at each of them proves nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield
