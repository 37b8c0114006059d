"""Overlap as a picture: the pairwise matrices as heat maps, and how they run over the depth of the model."""

from __future__ import annotations

import io
import math
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..atomic import atomic_file
from .measure import Overlap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = 6  # pairs or adapters drawn one by one; more are drawn as a mean and a band


def draw(found: Overlap, path: str | Path, overwrite: bool = True) -> None:
    """Write a PNG: heat maps over all modules above, lines by layer below (layers only; undefined values are gaps)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n, whole = len(found.names), found.all
    side = max(3.4, 0.5 * n + 1.0)
    figure = plt.figure(figsize=(2 * side + 8.4, 2 * side + 1.8), layout="constrained")
    grid = figure.add_gridspec(4, 3, width_ratios=(side + 0.8, side, 5.2))
    out, inside, signs = whole.alignment("out"), whole.alignment("in"), whole.sign_conflict()
    panels: tuple[tuple[str, str, Tensor, str, tuple[float, float]], ...] = (
        ("cosine of dW", "cosine", whole.cosine, "RdBu_r", _around(whole.cosine, 0.0, 0.5)),
        ("output directions shared", "alignment (0 to 1)", out, "viridis", (0.0, _top(out))),
        ("input directions shared", "alignment (0 to 1)", inside, "viridis", (0.0, _top(inside))),
        ("sign conflict, by magnitude", "share of |dW|·|dW| (chance 0.5)", signs, "PuOr_r", _around(signs, 0.5, 0.25)),
    )
    lines = []
    for i, (title, unit, values, colours, limits) in enumerate(panels):
        row, column = divmod(i, 2)
        axes = figure.add_subplot(grid[2 * row : 2 * row + 2, column])
        image = _heat(axes, values, found.names, colours, limits, labels=column == 0)
        axes.set_title(title, fontsize=11)
        bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02)
        bar.set_label(unit, fontsize=8)
        bar.ax.tick_params(labelsize=8)
        lines.append(figure.add_subplot(grid[i, 2]))
    _depth(found, lines)
    handles, labels = lines[1].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower right", ncols=min(3, len(handles)), fontsize=8, frameon=False)
    figure.suptitle(
        f"Overlap of {n} adapters: all {len(found.parts)} modules together (left) and layer by layer (right)",
        fontsize=13,
    )
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    plt.close(figure)
    atomic_file(path, picture.getvalue(), overwrite)


def _defined(values: Tensor) -> list[float]:
    """Off the diagonal, where defined."""
    return [float(values[p]) for p in combinations(range(values.shape[0]), 2) if values[p] == values[p]]


def _around(values: Tensor, centre: float, least: float) -> tuple[float, float]:
    """Limits that reach as far to both sides; never so narrow that small values look large."""
    reach = max([least, *(abs(v - centre) for v in _defined(values))])
    return centre - reach, centre + reach


def _top(values: Tensor) -> float:
    return max([0.5, *_defined(values)])


def _heat(axes: Axes, values: Tensor, names: list[str], colours: str, limits: tuple[float, float], labels: bool) -> Any:
    """One matrix; the diagonal, which says nothing, is grey, and so is what is undefined."""
    import matplotlib

    n = len(names)
    shown = [[math.nan if i == j else float(values[i, j]) for j in range(n)] for i in range(n)]
    palette = matplotlib.colormaps[colours].with_extremes(bad="#e4e4e4")
    image = axes.imshow(shown, cmap=palette, vmin=limits[0], vmax=limits[1])
    axes.set_xticks(
        range(n), [_short(name) for name in names], rotation=45, ha="right", rotation_mode="anchor", fontsize=8
    )
    axes.set_yticks(range(n), [_short(name) for name in names] if labels else [""] * n, fontsize=8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if n <= 14:
        for i in range(n):
            for j in range(n):
                if i == j:
                    continue
                value = shown[i][j]
                share = (value - limits[0]) / (limits[1] - limits[0])
                red, green, blue, _ = palette(share if value == value else 0.5)
                dark = value == value and 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                said = f"{value:.2f}" if value == value else "–"
                axes.text(j, i, said, ha="center", va="center", fontsize=7.5, color="white" if dark else "#222222")
    return image


def _short(name: str, limit: int = 24) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _depth(found: Overlap, axes: Any) -> None:
    """Lines over layers: one a pair up to six pairs, else the mean with the band from lowest to highest."""
    layers = [g for g in found.groups("layer") if isinstance(g.name, int)]
    depth = [g.name for g in layers]
    pairs = list(combinations(range(len(found.names)), 2))
    for i, side in ((1, "out"), (2, "in")):
        _lines(axes[i], depth, [[float(g.alignment(side)[p]) for g in layers] for p in pairs], _labels(found, pairs))
        chance = [_mean(_defined(g.chance(side))) for g in layers]
        axes[i].plot(depth, chance, color="#888888", ls="--", lw=1, label="chance")
        axes[i].set_ylabel("alignment (0 to 1)")
        axes[i].set_ylim(bottom=0)
    _lines(axes[0], depth, [[float(g.cosine[p]) for g in layers] for p in pairs], _labels(found, pairs))
    axes[0].axhline(0, color="#888888", ls="--", lw=1)
    axes[0].set_ylabel("cosine")
    conflict = [[float(g.sign_conflict()[p]) for g in layers] for p in pairs]
    _lines(axes[3], depth, conflict, _labels(found, pairs))
    axes[3].axhline(0.5, color="#888888", ls="--", lw=1, label="chance")
    axes[3].set_ylabel("share of |dW|·|dW|")
    titles = ("cosine of dW", "output directions shared", "input directions shared", "sign conflict, by magnitude")
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.xaxis.get_major_locator().set_params(integer=True)
        if not layers:
            panel.text(
                0.5, 0.5, "no module is in a numbered layer", ha="center", va="center", transform=panel.transAxes
            )
    axes[3].set_xlabel("layer")


def _labels(found: Overlap, pairs: list[tuple[int, int]]) -> list[str]:
    return [f"{_short(found.names[i], 16)}, {_short(found.names[j], 16)}" for i, j in pairs]


def _mean(values: list[float]) -> float:
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else math.nan


def _lines(axes: Axes, depth: list[Any], rows: list[list[float]], labels: list[str]) -> None:
    if len(rows) <= LINES:
        for row, label in zip(rows, labels, strict=True):
            axes.plot(depth, row, lw=1.4, marker="o", ms=2.5, label=label)
        return
    known = [[v for v in column if v == v] for column in zip(*rows, strict=True)]
    low = [min(c, default=math.nan) for c in known]
    high = [max(c, default=math.nan) for c in known]
    axes.fill_between(depth, low, high, color="#2a7f9e", alpha=0.18, lw=0, label="lowest to highest pair")
    axes.plot(depth, [_mean(c) for c in known], color="#2a7f9e", lw=1.8, marker="o", ms=2.5, label="mean over pairs")
