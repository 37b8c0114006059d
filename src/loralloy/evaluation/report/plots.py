"""The report's pictures, from its summary alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

PICTURES = ("average", "routes", "mass", "cost")
HINTED, RAW, EITHER = "#1b4965", "#e07a2f", "#7d8790"


def pictures(summary: Mapping[str, Any]) -> dict[str, bytes]:
    """Name -> PNG; a picture for which there is nothing to draw is left out. Needs the `plots` extra."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = {"average": average(summary), "routes": routes(summary), "mass": mass(summary), "cost": cost(summary)}
    return {name: data for name, data in drawn.items() if data is not None}


def _png(figure: Any, dpi: int = 110) -> bytes:
    import matplotlib.pyplot as plt

    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi, format="png")
    plt.close(figure)
    return picture.getvalue()


def average(summary: Mapping[str, Any]) -> bytes | None:
    """Average by method with its interval; one panel a scope, one colour a query kind."""
    import matplotlib.pyplot as plt

    scopes = list(dict.fromkeys(p["scope"] for p in summary["protocols"]))
    panels = [[p for p in summary["protocols"] if p["scope"] == scope] for scope in scopes]
    names: dict[str, str] = {}
    for protocol in summary["protocols"]:
        names |= {
            r["method"]: r["heading"] + ("" if r["same_rows"] else " †") for r in protocol["rows"] if r["average"]
        }
    if not names:
        return None
    order = sorted(names, key=lambda m: _rank(panels[0], m))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.4 + 4.0 * len(panels), 1.5 + 0.27 * len(order)), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for panel, scope, found in zip(axes[0], scopes, panels, strict=True):
        for n, protocol in enumerate(found):
            shift = 0.0 if len(found) == 1 else ((len(found) - 1) / 2 - n) * 0.3
            for row in protocol["rows"]:
                if not row["average"] or (n and not row["depends_on_query"]):
                    continue
                a = row["average"]
                y = order.index(row["method"]) + (shift if row["depends_on_query"] else 0.0)
                colour = {"hinted": HINTED, "raw": RAW}[protocol["query"]] if row["depends_on_query"] else EITHER
                panel.plot([100 * a["low"], 100 * a["high"]], [y, y], color=colour, lw=1.6, alpha=0.75)
                panel.plot(100 * a["value"], y, "o", ms=4.5, color=colour)
        panel.set_title(scope.replace("_", " "), fontsize=11)
        panel.set_xlabel("average over tasks, % (95 % interval)", fontsize=9)
        panel.grid(axis="x", color="#e3e7ea", lw=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    axes[0][0].set_yticks(range(len(order)), [names[m] for m in order], fontsize=8.5)
    axes[0][0].set_ylim(-0.7, len(order) - 0.3)
    colours = {"hinted query": HINTED, "raw query": RAW, "depends on no query": EITHER}
    handles = [plt.Line2D([], [], color=c, marker="o", lw=1.6, ms=4.5, label=t) for t, c in colours.items()]
    if any(name.endswith("†") for name in names.values()):
        handles.append(plt.Line2D([], [], lw=0, label="†: fewer rows"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    return _png(figure)


def _rank(protocols: Sequence[Mapping[str, Any]], method: str) -> tuple[float, str]:
    for protocol in protocols:
        for row in protocol["rows"]:
            if row["method"] == method and row["average"]:
                return row["average"]["value"], method
    return -1.0, method


def routes(summary: Mapping[str, Any]) -> bytes | None:
    """Heat maps: own task by the adapter that has the weight; the paper's kernel and the other router with most on own."""
    import matplotlib.pyplot as plt

    chosen = _two_weighers(summary)
    if not chosen:
        return None
    names = list(summary["tasks"])
    order = [t for tasks in summary["families"].values() for t in tasks]
    place = [names.index(t) for t in order]
    queries = list(dict.fromkeys(row["query"] for row in chosen))
    weighers = list(dict.fromkeys(row["weigher"] for row in chosen))
    side = 1.2 + 0.155 * max(12, len(order))
    figure, axes = plt.subplots(
        len(queries), len(weighers), figsize=(side * len(weighers) + 2.6, side * len(queries) + 1.4), squeeze=False,
        layout="constrained", sharex=True, sharey=True,
    )  # fmt: skip
    image = None
    for row in chosen:
        panel = axes[queries.index(row["query"])][weighers.index(row["weigher"])]
        shown = [[row["confusion"][i][j] for j in place] for i in place]
        # the square root shows small weights beside the diagonal
        image = panel.imshow([[v**0.5 for v in line] for line in shown], cmap="magma_r", vmin=0, vmax=1, aspect="auto")
        panel.set_title(
            f"{row['weigher']}, {row['query']} query: {100 * row['all']['own']['mean']:.1f} % on own", fontsize=10
        )
        edge = 0
        for tasks in list(summary["families"].values())[:-1]:
            edge += len(tasks)
            panel.axhline(edge - 0.5, color="#9aa8b3", lw=0.5)
            panel.axvline(edge - 0.5, color="#9aa8b3", lw=0.5)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    for panel in axes[-1]:
        panel.set_xticks(range(len(order)), order, rotation=90, fontsize=7)
        panel.set_xlabel("adapter", fontsize=9)
    for line in axes:
        line[0].set_yticks(range(len(order)), order, fontsize=7)
        line[0].set_ylabel("own task", fontsize=9)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.01, ticks=[0, 0.1**0.5, 0.25**0.5, 0.5**0.5, 1])
    bar.ax.set_yticklabels(["0", "0.1", "0.25", "0.5", "1"], fontsize=8)
    bar.set_label("mean weight (square root scale)", fontsize=9)
    return _png(figure, 95)


def _two_weighers(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The suite's first router, and of the others the one with most weight on the own task in its last query kind."""
    rows = [r for r in summary["routing"] if r["router"] and not r["falls_back"]]
    if not rows:
        return []
    first = rows[0]["weigher"]
    raw = [r for r in rows if r["weigher"] != first and r["query"] == rows[-1]["query"]]
    kept = {first} | ({max(raw, key=lambda r: r["all"]["own"]["mean"])["weigher"]} if raw else set())
    return [r for r in rows if r["weigher"] in kept]


def mass(summary: Mapping[str, Any]) -> bytes | None:
    """By task: routed accuracy minus the own adapter's against the mean weight on the own task."""
    import matplotlib.pyplot as plt

    by_method = {(r["method"], r["query"]): r for r in summary["routing"]}
    found = [f for f in summary["against_own"] if (f["method"], f["query"]) in by_method]
    if not found:
        return None
    queries = list(dict.fromkeys(f["query"] for f in found))
    methods = list(dict.fromkeys(f["method"] for f in found))
    figure, axes = plt.subplots(
        1, len(queries), figsize=(5.4 * len(queries) + 0.6, 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    colours, marks = (RAW, HINTED, "#4c9a6a", "#8a5fa8"), "os^D"
    named: dict[str, list[tuple[float, float, str]]] = {}
    least = 100.0
    for f in found:
        panel, n = axes[0][queries.index(f["query"])], methods.index(f["method"])
        route = by_method[f["method"], f["query"]]["by_task"]
        shown = [t for t in f["tasks"] if t in route]
        x = [100 * route[t]["own"]["mean"] for t in shown]
        y = [100 * f["tasks"][t]["difference"]["value"] for t in shown]
        panel.scatter(x, y, s=22, color=colours[n % 4], marker=marks[n % 4], alpha=0.75, lw=0, label=f["heading"])
        far = sorted(range(len(shown)), key=lambda i: -abs(y[i]))[:5] if n == 0 else []
        named[f["query"]] = named.get(f["query"], []) + [(x[i], y[i], shown[i]) for i in far if y[i]]
        least = min(least, *x)
    for panel, query in zip(axes[0], queries, strict=True):
        panel.axhline(0, color="#7d8790", lw=0.9)
        panel.set_title(f"{query} query", fontsize=11)
        panel.set_xlabel("mean weight on the own task, %", fontsize=9)
        panel.set_xlim(max(-3.0, least - 8), 108)
        panel.set_xticks([x for x in range(0, 101, 20) if x >= max(-3.0, least - 8)])
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#eceff1", lw=0.7)
        panel.set_axisbelow(True)
    for panel, query in zip(axes[0], queries, strict=True):
        _labels(panel, named.get(query, []))
    axes[0][0].set_ylabel("accuracy minus the own adapter's, points", fontsize=9)
    legend: dict[str, Any] = {}  # a method may be in one panel alone
    for panel in axes[0]:
        handles, labels = panel.get_legend_handles_labels()
        legend.update(zip(labels, handles, strict=True))
    figure.legend(
        list(legend.values()), list(legend), loc="outside upper center", ncols=len(methods), fontsize=9, frameon=False
    )
    return _png(figure)


def cost(summary: Mapping[str, Any]) -> bytes | None:
    """Average accuracy against milliseconds a row, in-domain under the suite's first query kind."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    protocol = next((p for p in summary["protocols"] if p["scope"] == "in_domain"), None)
    ms = {c["method"]: c["total_ms"] or 0.0 for c in summary["costs"]}
    rows = [r for r in protocol["rows"] if r["average"] and ms.get(r["method"], 0) > 0] if protocol else []
    if not rows or protocol is None:
        return None
    figure, panel = plt.subplots(figsize=(8.6, 5.4), layout="constrained")
    kinds = {"routed": RAW, "perfect": "#4c9a6a"}
    for r in rows:
        a, x = r["average"], ms[r["method"]]
        colour = kinds.get(r["kind"], EITHER)
        panel.plot([x, x], [100 * a["low"], 100 * a["high"]], color=colour, lw=1, alpha=0.5)
        panel.plot(x, 100 * a["value"], "o" if r["same_rows"] else "v", ms=6, color=colour, alpha=0.9)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    _labels(panel, [(ms[r["method"]], 100 * r["average"]["value"], r["heading"]) for r in rows])
    panel.set_xlabel("milliseconds a row: weigh, merge and answer (embedding apart)", fontsize=9)
    panel.set_ylabel(f"average over tasks, % (in domain, {protocol['query']} query)", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#eceff1", lw=0.7)
    panel.set_axisbelow(True)
    for text, colour in (("routed", RAW), ("own adapter", "#4c9a6a"), ("others", EITHER)):
        panel.plot([], [], "o", color=colour, label=text)
    if any(not r["same_rows"] for r in rows):
        panel.plot([], [], "v", color=EITHER, label="fewer rows")
    figure.legend(fontsize=8.5, frameon=False, loc="outside upper center", ncols=4)
    return _png(figure)


def _labels(panel: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside points, moved up where they would lie on one another."""
    panel.figure.canvas.draw()
    taken: list[tuple[float, float, float, float]] = []
    for x, y, text in sorted(points, key=lambda p: (p[0], p[1])):
        px, py = panel.transData.transform((x, y))
        width = 5.2 * len(text)
        for step in (0, 9, -9, 18, -18, 27, -27, 36, -36, 45, -45, 54):
            box = (px + 7, py + step - 5, px + 7 + width, py + step + 5)
            if all(box[2] < t[0] or box[0] > t[2] or box[3] < t[1] or box[1] > t[3] for t in taken):
                break
        taken.append(box)
        panel.annotate(
            text, (x, y), xytext=(6, step * 72 / panel.figure.dpi - 2.5), textcoords="offset points", fontsize=7,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#b5bec5", "shrinkB": 2} if abs(step) > 9 else None,
        )  # fmt: skip
