"""One picture a page: buffer size by granularity, accuracy over fixed W, and how a stream's costs grow."""

from __future__ import annotations

import io
from typing import Any

from plan import CHOSEN, GRAINS, GRID, SIZES
from results import Cells, Mean
from streams import QUANTITIES, growth_rows
from tables import WORDS, Bench, title

_STYLES = {"adapter": "-o", "layer": "--s", "module": ":^"}


def draw(b: Bench, growing: dict[str, Cells]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    growing = {name: cells for name, cells in growing.items() if cells.rows}
    figure, panels = plt.subplots(1, 2 + bool(growing), figsize=(15 if growing else 11, 4.4), constrained_layout=True)
    left, middle = panels[:2]
    for n, (rule, space) in enumerate(CHOSEN):
        for grain in GRAINS:
            means = [(k, Mean.of(list(b.learned(rule, space, per_class=k, grain=grain).values()))) for k in SIZES]
            means = [(k, m) for k, m in means if m.n]
            if means:
                values = [100 * m.value for _, m in means]
                bars = [100 * m.deviation if m.n > 1 else 0 for _, m in means]
                label = f"{title(rule, space)}, by {grain}"
                left.errorbar(
                    [k for k, _ in means], values, bars, fmt=_STYLES[grain], color=f"C{n}", capsize=2, label=label
                )
    for how, style in (("joint", "k-"), ("own", "k--"), ("seq", "k:")):
        found = Mean.of(list(b.alone(how).values()))
        if found.n:
            name = {"joint": "joint training", "own": "own adapters", "seq": "sequential"}[how]
            left.axhline(100 * found.value, color="black", linestyle=style[1:], linewidth=1, label=name)
    left.set(
        xscale="log",
        xticks=SIZES,
        xticklabels=SIZES,
        xlabel="buffer rows a class and domain",
        ylabel="final accuracy, %",
    )
    left.set_title("Learned coefficients, b_max = 3 (bars: sd over seeds)")
    for rule, space in WORDS:
        means = [(w, Mean.of(list(b.fixed(rule, space, w).values()))) for w in GRID]
        means = [(w, m) for w, m in means if m.n]
        if means:
            colour = f"C{[w[0] for w in WORDS[:3]].index(rule)}"
            middle.plot(
                [w for w, _ in means],
                [100 * m.value for _, m in means],
                "--" if space == "factors" else "-",
                color=colour,
                label=title(rule, space),
            )
    middle.set(xscale="log", xlabel="fixed weight W of every adapter", ylabel="final accuracy, %")
    middle.set_title("The collapse of wrong fixed weights")
    for panel in (left, middle):
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    if growing:
        _grown(panels[2], growing)
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return memory.getvalue()


def _grown(panel: Any, growing: dict[str, Cells]) -> None:
    """Seconds on the left, megabytes on the right."""
    second = panel.twinx()
    for n, (name, cells) in enumerate(growing.items()):
        for (rule, space), style in zip(CHOSEN, ("-o", "--s"), strict=True):
            rows = growth_rows(cells, rule, space)
            if rows:
                x = [count for count, _, _ in rows]
                said = f"{name}, {title(rule, space)}"
                seconds, size = (QUANTITIES[what] for what in ("learning, s", "terms, MB"))
                panel.plot(x, [seconds(r) for _, r, _ in rows], style, color=f"C{n}", label=f"{said}: s")
                second.plot(x, [size(r) for _, r, _ in rows], style[:-1], color=f"C{n + 3}", label=f"{said}: MB")
    panel.set(xlabel="domains", ylabel="learning, s")
    second.set_ylabel("terms, MB")
    panel.set_title("Growth of a stream")
    panel.legend(fontsize=7)
    second.legend(fontsize=7, loc="lower right")
