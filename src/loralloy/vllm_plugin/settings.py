"""What the plugin is told, in environment variables: vLLM's own flags have no room for a plugin's."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import LoralloyError


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        bank: LORALLOY_BANK, a folder of adapters; absolute.
        cache: LORALLOY_CACHE, where merged adapters are kept; absolute, at the same path on every host.
        max_bytes: LORALLOY_CACHE_GIB, room for them in bytes.
        rank: LORALLOY_RANK; None for vLLM's --max-lora-rank.
        grace: LORALLOY_GRACE, seconds between the steps in which a merged adapter is
            taken back from vLLM (see :mod:`.lending`); at least 1.
        threads: LORALLOY_THREADS, that a merge computes with.
        same_base: LORALLOY_ASSUME_SAME_BASE, skip the checks of base models.
    """

    bank: Path
    cache: Path
    max_bytes: int = 20 << 30
    rank: int | None = None
    grace: float = 60.0
    threads: int = 1
    same_base: bool = False

    @staticmethod
    def read(environment: Mapping[str, str] = os.environ) -> Settings | None:
        """From the environment; None without LORALLOY_BANK. Raises LoralloyError naming the variable that is wrong."""
        bank = environment.get("LORALLOY_BANK")
        if not bank:
            return None
        cache = environment.get("LORALLOY_CACHE") or os.path.expanduser("~/.cache/loralloy/vllm")
        rank = _number(environment, "LORALLOY_RANK", 1, whole=True)
        threads = _number(environment, "LORALLOY_THREADS", 1, whole=True)
        gib = _number(environment, "LORALLOY_CACHE_GIB", 0.001)
        # less would leave nothing between a name's resolution and the request that vLLM shows for it
        grace = _number(environment, "LORALLOY_GRACE", 1, unit="seconds")
        return Settings(
            Path(bank).absolute(),
            Path(cache).absolute(),
            int((20 if gib is None else gib) * (1 << 30)),
            None if rank is None else int(rank),
            60.0 if grace is None else grace,
            _threads() if threads is None else int(threads),
            environment.get("LORALLOY_ASSUME_SAME_BASE", "").strip().lower() in ("1", "true", "yes"),
        )


def _threads() -> int:
    """A quarter of the cores: vLLM's own threads spin, and more threads than free cores wait for each other at every step."""
    return min(16, max(1, (os.cpu_count() or 1) // 4))


def _number(
    environment: Mapping[str, str], name: str, least: float, whole: bool = False, unit: str = ""
) -> float | None:
    text = environment.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= least and (value == int(value) or not whole)):
        raise LoralloyError(
            f"{name}={text!r}: give a {'whole ' if whole else ''}number of at least {least:g} {unit}".rstrip()
        )
    return value
