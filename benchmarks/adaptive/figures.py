"""One picture a page: buffer size by granularity, accuracy over fixed W, and how a stream's costs grow."""

from __future__ import annotations

from typing import Any

from cells import CHOSEN, GRAINS, GRID, SIZES
from results import Cells, Mean
from streams import QUANTITIES, growth_rows
from tables import WORDS, Bench, title

from pages import png, pyplot

_STYLES = {"adapter": "-o", "layer": "--s", "module": ":^"}


def draw(b: Bench, growing: dict[str, Cells]) -> bytes:
    growing = {name: cells for name, cells in growing.items() if cells.rows}
    figure, panels = pyplot().subplots(
        1, 2 + bool(growing), figsize=(16 if growing else 11, 5.4), constrained_layout=True
    )
    left, middle = panels[:2]
    one_seed = False
    for n, (rule, space) in enumerate(CHOSEN):
        for grain in GRAINS:
            means = [(k, Mean.of(list(b.learned(rule, space, per_class=k, grain=grain).values()))) for k in SIZES]
            means = [(k, m) for k, m in means if m.n]
            if means:
                # a little apart, so that their bars can be told
                x = [k * 1.03 ** (n * len(GRAINS) + GRAINS.index(grain) - 2.5) for k, _ in means]
                values = [100 * m.value for _, m in means]
                bars = [100 * m.deviation for _, m in means]  # nan, which draws none, for one seed
                label = f"{title(rule, space)}, by {grain}"
                left.errorbar(x, values, bars, fmt=_STYLES[grain], color=f"C{n}", capsize=2, markersize=5, label=label)
                for at, value, (_, m) in zip(x, values, means, strict=True):
                    if m.n == 1:
                        left.plot(
                            at,
                            value,
                            _STYLES[grain][-1],
                            color="white",
                            markeredgecolor=f"C{n}",
                            markersize=5,
                            zorder=3,
                        )
                        one_seed = True
    for how, style in (("joint", "k-"), ("own", "k--"), ("seq", "k:")):
        found = Mean.of(list(b.alone(how).values()))
        if found.n:
            name = {"joint": "joint training", "own": "own adapters", "seq": "sequential"}[how]
            left.axhline(100 * found.value, color="black", linestyle=style[1:], linewidth=1, label=name)
    left.set(xscale="log", xlim=(SIZES[0] / 1.4, SIZES[-1] * 1.4), xlabel="buffer rows a class and domain")
    left.set_xticks(SIZES, SIZES)
    left.set_ylabel("final accuracy, %")
    left.set_title(
        f"Learned coefficients, b_max = 3 (bars: sd over seeds{'; hollow: one seed' if one_seed else ''})", fontsize=10
    )
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
    some = (0.1, 0.25, 0.5, 1, 2, 5)
    middle.set_xticks(some, some)
    middle.set_title("The collapse of wrong fixed weights", fontsize=10)
    for panel in (left, middle):
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            _legend(panel)
    if growing:
        _grown(panels[2], growing)
    return png(figure)


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
    every = sorted({n for cells in growing.values() for merge in CHOSEN for n, _, _ in growth_rows(cells, *merge)})
    panel.set(xlabel="domains", ylabel="learning, s", xticks=every)
    second.set_ylabel("terms, MB")
    for axis in (panel, second):
        axis.set_ylim(bottom=0)  # else the noise of what hardly grows looks like a mountain
    panel.set_title("Growth of a stream", fontsize=10)
    panel.grid(alpha=0.3)
    _legend(panel, second)


def _legend(panel: Any, *others: Any) -> None:
    """Of all these axes, below the panel, where it hides nothing."""
    found = [of.get_legend_handles_labels() for of in (panel, *others)]
    handles, labels = ([item for pair in found for item in pair[i]] for i in (0, 1))
    panel.legend(handles, labels, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
