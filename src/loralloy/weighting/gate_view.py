"""Gates to look at: a table by projection and depth, and a picture of both."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import atomic_file, check_free
from ..errors import LoralloyError
from ..layerwise import layer_of
from ..weights import Weights
from .contrasts import projection_of

if TYPE_CHECKING:
    from rich.table import Table

_THIRDS = ("first third", "middle", "last third")


def by_projection(weights: Weights, modules: Sequence[str]) -> list[dict[str, Any]]:
    """One row a projection: its modules, and each adapter's mean weight in all layers and in each third of the depth."""
    layers = [layer for m in modules if (layer := layer_of(m)) is not None]
    low, high = min(layers, default=0), max(layers, default=0)
    rows: list[dict[str, Any]] = []
    for kind in dict.fromkeys(map(projection_of, modules)):
        mine = [m for m in modules if projection_of(m) == kind]
        thirds: list[list[str]] = [[], [], []]
        for m in mine:
            layer = layer_of(m)
            if layer is not None:
                thirds[min(2, 3 * (layer - low) // max(1, high - low))].append(m)
        rows.append({
            "projection": kind, "modules": len(mine),
            "weights": {
                name: {"all": _mean(weights, name, mine)} | {
                    third: _mean(weights, name, part) for third, part in zip(_THIRDS, thirds, strict=True)
                }
                for name in weights.names
            },
        })  # fmt: skip
    return rows


def _mean(weights: Weights, name: str, modules: Sequence[str]) -> float | None:
    values = [weights.of(name, m) for m in modules]
    return sum(values) / len(values) if values else None


def table(weights: Weights, modules: Sequence[str]) -> Table:
    """:func:`by_projection`, to print."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False)
    for title in ("projection", "modules", "adapter", "weight", *_THIRDS):
        made.add_column(title)
    for row in by_projection(weights, modules):
        head = [row["projection"].split(".*.")[-1], str(row["modules"])]
        for name, means in row["weights"].items():
            cells = ["-" if means[key] is None else f"{means[key]:.3f}" for key in ("all", *_THIRDS)]
            made.add_row(*(Text(text) for text in (*head, name, *cells)))
            head = ["", ""]
    return made


def draw(weights: Weights, modules: Sequence[str], path: str | Path, overwrite: bool = False) -> None:
    """Save a picture (PNG): each adapter's weight by layer, one line a projection, and their mean.

    Raises LoralloyError without matplotlib, for another ending, and for an existing file without `overwrite`.
    """
    path = Path(path)
    check_picture(path, overwrite)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = weights.names
    figure, all_axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 4), sharey=True, squeeze=False)
    kinds = list(dict.fromkeys(projection_of(m) for m in modules if layer_of(m) is not None))
    colours = matplotlib.colormaps["tab10" if len(kinds) <= 10 else "tab20"]
    layers = sorted({layer for m in modules if (layer := layer_of(m)) is not None})
    for axes, name in zip(all_axes[0], names, strict=True):
        for n, kind in enumerate(kinds):
            mine = sorted((layer_of(m), m) for m in modules if projection_of(m) == kind and layer_of(m) is not None)
            label = kind.split(".*.")[-1]
            axes.plot(
                [a for a, _ in mine], [weights.of(name, m) for _, m in mine], color=colours(n % 20), lw=1, label=label
            )
        means = [_mean(weights, name, [m for m in modules if layer_of(m) == layer]) for layer in layers]
        axes.plot(layers, means, color="black", lw=2.5, label="mean")
        axes.axhline(1, color="grey", lw=0.6, ls=":")
        axes.set_title(name)
        axes.set_xlabel("layer")
    all_axes[0][0].set_ylabel("weight")
    all_axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)
    atomic_file(path, picture.getvalue(), overwrite)


def check_picture(path: Path, overwrite: bool) -> None:
    """Raise LoralloyError where :func:`draw` could not write, before any work."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise LoralloyError("--plot draws a picture, which needs matplotlib: pip install 'loralloy[plots]'")
    if path.suffix.lower() != ".png":
        raise LoralloyError(f"--plot {path} is not a PNG file; give a name that ends in .png")
    check_free(path.absolute(), overwrite)
