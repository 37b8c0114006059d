"""One picture a half: differences from ours with intervals, and the domain's share of the gate over depth by pair."""

from __future__ import annotations

import claims
from designs import BASELINES, METHODS
from plan import ALONE, Half
from results import Cells

from pages import png, pyplot


def draw(half: Half, cells: Cells) -> bytes:
    mine = claims.ours(half)
    configs = [(m.title, (m.name, "", half.rank)) for m in ALONE]
    configs += [(m.title, (m.name, "best", half.rank)) for m in BASELINES]
    configs += [(METHODS[n].title, (n, "best", half.rank)) for n in half.designs[1:]]
    shown = [(title, cells.difference(config, mine)) for title, config in configs if cells.of(*config)]
    shown = sorted([s for s in shown if s[1].pairs], key=lambda s: s[1].value)
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(13, 5.2), constrained_layout=True)
    for y, (_, i) in enumerate(shown):
        left.plot([100 * i.low, 100 * i.high], [y, y], color="C0")
        left.plot([100 * i.value], [y], "o", color="C0", markersize=4)
    left.axvline(0, color="black", linewidth=1)
    left.set_yticks(range(len(shown)), [title for title, _ in shown], fontsize=7)
    left.set(xlabel="points less ours", title=f"{half.name}: each at its best by validation rows (95 %)")
    for n, pair in enumerate(half.pairs("final")):
        found = [
            r for (p, _), r in cells.of(half.designs[0], "ones", half.rank).items() if p == pair and "domain_share" in r
        ]
        for row in found:
            right.plot(
                [1, 2, 3],
                row["domain_share"],
                "-o",
                color=f"C{n}",
                markersize=3,
                label=pair if row is found[0] else None,
            )
    right.set(xticks=[1, 2, 3], xticklabels=["first", "middle", "last"], xlabel="third of the depth")
    right.set(ylabel="domain's share of the gate", title="The gate over depth, a line a seed")
    right.grid(alpha=0.3)
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=7)
    return png(figure)
