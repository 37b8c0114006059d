"""Numbers as text: shares as percent with one digit, differences in points, with their 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "-"


def share(value: float | None) -> str:
    """0.974 -> ``97.4 %``"""
    return MISSING if value is None else f"{100 * value:.1f} %"


def percent(value: float | None) -> str:
    """0.974 -> ``97.4``, for a table whose unit is percent."""
    return MISSING if value is None else f"{100 * value:.1f}"


def interval(found: Mapping[str, Any] | None) -> str:
    """``61.2 [60.0, 62.4]`` in percent."""
    return (
        MISSING
        if found is None
        else f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
    )


def signed(found: Mapping[str, Any] | None) -> str:
    """``-0.4 [-1.0, +0.2]`` in points."""
    if found is None:
        return MISSING
    return f"{_plus(found['value'])} [{_plus(found['low'])}, {_plus(found['high'])}]"


def points(found: Mapping[str, Any] | None) -> str:
    """``-0.4 points [-1.0, +0.2]``"""
    return MISSING if found is None else signed(found).replace(" [", " points [", 1)


def _plus(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("-0.0", "+0.0") else text


def number(value: float | None, digits: int = 2) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def mean_sd(found: Mapping[str, Any], factor: float = 1.0, digits: int = 2) -> str:
    """``0.72 ± 0.01``; without a deviation where there is one seed."""
    if found["mean"] is None:
        return MISSING
    sd = f" ± {factor * found['sd']:.{digits}f}" if found.get("sd") is not None else ""
    return f"{factor * found['mean']:.{digits}f}{sd}"


def size(value: float | None) -> str:
    """Bytes as kB, MB or GB."""
    if value is None:
        return MISSING
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value / 1e3:.0f} kB"


def names(values: Sequence[str], limit: int = 12) -> str:
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(values[:limit]) + more
