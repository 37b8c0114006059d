"""The report's pictures: coefficients, accuracy and costs by experience, and final accuracy over fixed weights."""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import median
from typing import Any

from .metrics import average_accuracy
from .results import LEARNING, Results, RunResult

_PALETTE = (
    "#1b4965",
    "#e07a2f",
    "#3a8f5c",
    "#b23a48",
    "#7b5ea7",
    "#c9a227",
    "#4aa3c0",
    "#8a5a44",
    "#5f6b73",
    "#d487b5",
)
_GRID, _MUTED = "#e3e7ea", "#7d8790"
_PANELS = 12


def draw(results: Results) -> dict[str, bytes]:
    """Name -> PNG; what there is nothing to draw for is left out, and all where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("Agg")
    drawn = {
        "coefficients": coefficients(results), "accuracy": accuracy(results), "weights": over_weights(results),
        "costs": costs(results),
    }  # fmt: skip
    return {name: picture for name, picture in drawn.items() if picture is not None}


def _figure(panels: int, width: float = 4.6, height: float = 3.2, columns: int = 3) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    columns = min(columns, panels)
    lines = -(-panels // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(width * columns, height * lines + 0.5), squeeze=False, layout="constrained"
    )
    flat = [panel for line in axes for panel in line]
    for panel in flat:
        panel.grid(color=_GRID, lw=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in flat[panels:]:
        panel.set_visible(False)
    return figure, flat[:panels]


def _png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    plt.close(figure)
    return picture.getvalue()


def _experiences(panel: Any, order: Sequence[str]) -> None:
    many = len(order) > 8
    step = max(1, len(order) // 10) if many else 1
    ticks = list(range(0, len(order), step))
    panel.set_xticks(ticks, [str(t + 1) if many else f"{t + 1}\n{order[t]}".strip() for t in ticks], fontsize=8)
    panel.set_xlim(-0.2, len(order) - 0.8)
    panel.set_xlabel("experience", fontsize=9)


def coefficients(results: Results) -> bytes | None:
    """Each adapter's coefficient after each experience: the first seed and order, a panel a merge and learned strategy."""
    runs: dict[tuple[str, str], RunResult] = {}
    for run in results.runs:
        if run.kind == "learned" and any(run.weights):
            runs.setdefault((run.merge, run.strategy), run)
    shown = list(runs.values())[:_PANELS]
    if not shown:
        return None
    figure, panels = _figure(len(shown))
    for panel, run in zip(panels, shown, strict=True):
        many = len(run.order) > len(_PALETTE)
        for j, name in enumerate(run.order):
            points = [(t, w[name]) for t, w in enumerate(run.weights) if name in w]
            colour = _shade(j, len(run.order)) if many else _PALETTE[j]
            panel.plot(*zip(*points, strict=True), color=colour, marker="o", ms=3 if many else 4.5, lw=1.4, label=name)
        _experiences(panel, run.order)
        panel.set_title(f"{run.merge}\n{run.strategy}", fontsize=9)
        low, high = panel.get_ylim()
        panel.set_ylim(min(0.0, low), high + 0.05 * (high - min(0.0, low)))
        panel.set_ylabel("coefficient", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)), fontsize=8, frameon=False)
    return _png(figure)


def _shade(j: int, n: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"](j / max(1, n - 1))


def accuracy(results: Results) -> bytes | None:
    """Average accuracy of the domains seen, by experience: a panel a merge; mean over seeds and orders.

    The best fixed weight in hindsight, 1/N, the best strategies that learn, and (dashed) those that merge nothing.
    """
    merges = [m for m in results.merges if m] or results.merges
    if not merges:
        return None
    alone = [s for s in results.strategies if results.of("", s)]
    learning = [s for s in results.strategies if any(r.kind in LEARNING for r in results.runs if r.strategy == s)]
    top = max(1, len(_PALETTE) - len(alone))
    if len(learning) > top:
        learning = sorted(learning, key=lambda s: -max(_known(results.mean(m, s).value) for m in merges))[:top]
    colours = dict(zip([*learning, *alone], _PALETTE, strict=False))
    figure, panels = _figure(len(merges))
    drawn: dict[str, Any] = {}
    for panel, merge in zip(panels, merges, strict=True):
        best = results.best_fixed(merge)
        lines = [(best, "best fixed W in hindsight", {"color": _MUTED, "lw": 1.4})] if best else []
        uniform = next((r.strategy for r in results.runs if r.kind == "uniform" and r.merge == merge), None)
        lines += [(uniform, "uniform 1/N", {"color": "#b8c0c6", "lw": 1.4})] if uniform else []
        lines += [(s, s, {"color": colours[s], "lw": 1.6}) for s in learning if results.of(merge, s)]
        lines += [(s, s, {"color": colours.get(s, _MUTED), "lw": 1.3, "ls": "--"}) for s in alone]
        for strategy, label, style in lines:
            runs = results.of(merge, strategy) or results.of("", strategy)
            size = len(runs[0].order)
            curve = [100 * sum(average_accuracy(run.matrix, t) for run in runs) / len(runs) for t in range(size)]
            drawn.setdefault(label, panel.plot(range(size), curve, marker="o", ms=4, **style)[0])
        orders = {run.order for run in results.runs}
        _experiences(panel, next(iter(orders)) if len(orders) == 1 else [""] * len(results.runs[0].order))
        panel.set_title(merge or "one adapter", fontsize=10)
        panel.set_ylabel("average accuracy (seen), %", fontsize=9)
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return _png(figure)


def _known(value: float) -> float:
    return -1.0 if value != value else value  # nan


def over_weights(results: Results) -> bytes | None:
    """Final accuracy over the fixed weight W, with what learning reached beside it: a panel a merge."""
    curves: dict[str, list[tuple[float, str]]] = {}
    for run in results.runs:
        if run.kind == "fixed" and (point := (run.settings["weight"], run.strategy)) not in curves.setdefault(
            run.merge, []
        ):
            curves[run.merge].append(point)
    curves = {merge: sorted(points) for merge, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    figure, panels = _figure(len(curves))
    names = [s for s in results.strategies if any(r.kind in LEARNING for r in results.runs if r.strategy == s)]
    for panel, (merge, points) in zip(panels, curves.items(), strict=True):
        means = [results.mean(merge, s) for _, s in points]
        panel.errorbar(
            [w for w, _ in points], [100 * m.value for m in means],
            [0 if m.n < 2 else 100 * m.deviation for m in means], color=_MUTED, marker="o", ms=4, lw=1.4, label="fixed W",
        )  # fmt: skip
        for n, strategy in enumerate(s for s in names[: len(_PALETTE)] if results.of(merge, s)):
            value = 100 * results.mean(merge, strategy).value
            panel.axhline(
                value,
                color=_PALETTE[names.index(strategy) % len(_PALETTE)],
                lw=1.4,
                ls=(0, (4, 1 + n % 3)),
                label=strategy,
            )
        panel.set_title(merge, fontsize=10)
        panel.set_xlabel("W of every adapter", fontsize=9)
    panels[0].set_ylabel("final average accuracy, %", fontsize=9)
    found = {label: h for p in panels for h, label in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return _png(figure)


def costs(results: Results) -> bytes | None:
    """Seconds of learning and merging, and bytes of all adapters, by experience: learned strategies, all seeds and orders."""
    points: dict[str, dict[int, list[float]]] = {}
    size: dict[int, list[float]] = {}
    for run in results.runs:
        for t, step in enumerate(run.steps):
            if run.kind == "learned" and step.get("seconds"):
                points.setdefault("learn", {}).setdefault(t, []).append(step["seconds"].get("learn", 0.0))
                points.setdefault("merge", {}).setdefault(t, []).append(step["seconds"].get("merge", 0.0))
                size.setdefault(t, []).append(step["bytes"] / 2**20)
    if not points:
        return None
    figure, panels = _figure(2, columns=2)
    for n, (name, found) in enumerate(points.items()):
        panels[0].plot(
            sorted(found), [median(found[t]) for t in sorted(found)], marker="o", ms=4, color=_PALETTE[n], label=name
        )
    panels[0].set_ylabel("seconds (median)", fontsize=9)
    panels[0].legend(fontsize=8, frameon=False)
    panels[1].plot(sorted(size), [median(size[t]) for t in sorted(size)], marker="o", ms=4, color=_PALETTE[2])
    panels[1].set_ylabel("adapters merged, MiB on disk", fontsize=9)
    for panel in panels:
        count = max(size) + 1
        _experiences(panel, [""] * count)
        panel.set_ylim(bottom=0)
    return _png(figure)
