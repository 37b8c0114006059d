"""One picture a half: averages with and without labels, differences from ours with intervals, and the gate over depth by pair."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import claims
from designs import BASELINES, METHODS
from plan import ALONE, Half
from results import Cells

from pages import png, pyplot

SETTINGS = {"ones": ("1/1", "C7"), "balanced": ("1/1, balanced", "C0"), "best": ("best by validation (labels)", "C1")}


def draw(half: Half, cells: Cells) -> bytes:
    figure, (left, middle, right) = pyplot().subplots(1, 3, figsize=(17, 6.2), constrained_layout=True)
    _averages(left, half, cells)
    _differences(middle, half, cells)
    _depth(right, half, cells)
    return png(figure)


def _averages(axes: Any, half: Half, cells: Cells) -> None:
    """Of merges that have all of the settings; the task adapter alone as lines."""
    names = [m.name for m in BASELINES] + list(half.designs)
    whole = [n for n in names if all(cells.of(n, at, half.rank) for at in SETTINGS)]
    whole.sort(key=lambda n: cells.average(n, "balanced", half.rank))
    for at, (label, colour) in SETTINGS.items():
        values = [100 * cells.average(n, at, half.rank) for n in whole]
        axes.plot(values, range(len(whole)), "o", color=colour, markersize=4, label=label)
    for at, style in (("", ":"), ("balanced", "--")):
        if cells.of("task", at, half.rank):
            said = "task adapter alone" + (", balanced" if at else "")
            axes.axvline(
                100 * cells.average("task", at, half.rank), color="black", linestyle=style, linewidth=1, label=said
            )
    axes.set_yticks(range(len(whole)), [fill(METHODS[n].title, 46) for n in whole], fontsize=7)
    for tick, name in zip(axes.get_yticklabels(), whole, strict=True):
        tick.set_fontweight("bold" if name in half.designs else "normal")
    axes.set(xlabel="accuracy, %, the mean over pairs", title=f"{half.name}: merges (bold: this project's)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.3, -0.11), ncol=3)  # below: points are everywhere


def _differences(axes: Any, half: Half, cells: Cells) -> None:
    mine = claims.ours(half)
    configs = [(m.title, (m.name, "", half.rank)) for m in ALONE]
    configs += [(m.title, (m.name, "best", half.rank)) for m in BASELINES]
    configs += [(METHODS[n].title, (n, "best", half.rank)) for n in half.designs[1:]]
    shown = [(title, cells.difference(config, mine)) for title, config in configs if cells.of(*config)]
    shown = sorted([s for s in shown if s[1].pairs], key=lambda s: s[1].value)
    for y, (_, i) in enumerate(shown):
        axes.plot([100 * i.low, 100 * i.high], [y, y], color="C1")
        axes.plot([100 * i.value], [y], "o", color="C1", markersize=4)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(shown)), [fill(title, 46) for title, _ in shown], fontsize=7)
    axes.set(xlabel="points less ours", title="each at its best by validation rows (95 %)")


def _depth(axes: Any, half: Half, cells: Cells) -> None:
    for n, pair in enumerate(half.pairs("final")):
        rows = cells.of(half.designs[0], "ones", half.rank).items()
        for k, shares in enumerate(r["domain_share"] for (p, _), r in rows if p == pair and "domain_share" in r):
            axes.plot([1, 2, 3], shares, "-o", color=f"C{n}", markersize=3, label=None if k else pair)
    axes.set(xticks=[1, 2, 3], xticklabels=["first", "middle", "last"], xlabel="third of the depth")
    axes.set(ylabel="domain's share of the gate", title="the gate over depth, a line a seed")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
