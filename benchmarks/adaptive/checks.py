"""What stands beside the tables: draws of the buffer's rows, rows that were not trained on, other starts, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cells import CHOSEN, GRAINS, LONG, SIZES, STARTS, cell_name
from parts import PARTS
from plan import BENCHES, groups
from results import Cells, Mean, difference, final, interval, percent, validation
from tables import LEARNED, WORDS, Bench, title

from loralloy.continual.experience import DomainStream
from pages import table

OF_START = {
    "scale": "the library's: the best on the buffer of up to 6 scales, 0.4 to 1.8 times an adapter's length",
    "scale_pull": "scale, pulled to it 10 times as much",
    "match": "an adapter's length, no search",
    "match_pull": "match, pulled to it 10 times as much",
    "match_still": "match without gradient steps",
    "near": "the best of up to 5 scales, 0.7 to 1.4 times an adapter's length",
    "near_pull": "near, pulled to it 10 times as much",
    "near_still": "near without gradient steps",
}


def drawn(b: Bench) -> str:
    """How many draws the learned figures of the table have, and how far apart those of a seed are."""
    by: dict[tuple[Any, ...], list[float]] = {}
    settings: dict[str, Any] = {k: v for k, v in LEARNED.items() if k != "draw"}
    for row in b.cells.find(**settings, domains=b.names):
        cell = row["cell"]
        by.setdefault((cell["seed"], cell["rule"], cell["space"], cell["b_max"]), []).append(final(row))
    counts = sorted({len(values) for values in by.values()})
    if not counts or counts[-1] < 2:
        return ""
    said = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    spread = [Mean.of(values).deviation ** 2 for values in by.values() if len(values) > 1]
    return (
        f"A seed's learned figure is the mean over its draws of the buffer's rows ({said}), and seeds are averaged after that; "
        f"draws of one seed have a standard deviation of {100 * math.sqrt(sum(spread) / len(spread)):.1f} points."
    )


def untrained(b: Bench) -> list[str]:
    """Coefficients from rows that no adapter was trained on, against those from rows that the adapters know."""
    rows = []
    for rule, space in WORDS:
        for k, grain in ((1, "adapter"), *((5, grain) for grain in GRAINS[:2] if (rule, space) in CHOSEN)):
            same: dict[str, Any] = {"per_class": k, "grain": grain, "draw": None if k == 1 else 0}
            known, new = (b.learned(rule, space, how=how, **same) for how in ("learned", "fresh"))
            gap = difference(new, known)
            if gap.n:
                means = [percent(Mean.of([some[seed] for seed in known if seed in new])) for some in (known, new)]
                rows.append([f"{title(rule, space)}, by {grain}", str(k), *means, interval(gap), str(gap.n)])
    return table(["", "rows a class", "trained on", "not trained on", "not trained on - trained on", "seeds"], rows)


def evened(b: Bench) -> list[str]:
    """Learned merges and joint training with their answers evened out over the buffer's inputs, against the same as they are."""
    rows = []
    for rule, space in CHOSEN:
        for k in SIZES:
            for grain in GRAINS:
                same: dict[str, Any] = {"rule": rule, "space": space, "per_class": k, "grain": grain, "b_max": 3.0}
                even = b.cells.by_seed(how="even_learned", domains=b.names, head="random", **same)
                plain = b.learned(rule, space, per_class=k, grain=grain)
                rows.append((f"{title(rule, space)}, by {grain}", k, plain, even))
    for k in SIZES:
        even = b.cells.by_seed(how="even_joint", domains=b.names, head="random", per_class=k)
        rows.append(("joint training", k, b.alone("joint"), even))
    lines = []
    for said, k, plain, even in rows:
        gap = difference(even, plain)
        if gap.n:
            means = [percent(Mean.of([some[seed] for seed in even if seed in plain])) for some in (plain, even)]
            lines.append([said, str(k), *means, interval(gap), str(gap.n)])
    return table(["", "rows a class", "as they are", "evened out", "evened out - as they are", "seeds"], lines)


def starts(b: Bench) -> list[str]:
    """Mean validation accuracy by start of the learner, over the merges and seeds that all starts have; b_max = 3."""
    by: dict[str, dict[tuple[int, str, str], float]] = {}
    for start in ("scale", *STARTS):
        for row in b.cells.find(**{**LEARNED, "start": start, "b_max": 3.0, "domains": b.names}):
            if row["validation"]:
                key = (row["cell"]["seed"], row["cell"]["rule"], row["cell"]["space"])
                by.setdefault(start, {})[key] = validation(row)
    if "scale" not in by or len(by) < 2:
        return []
    shared = set.intersection(*(set(found) for found in by.values()))
    if not shared:
        return []

    def of(start: str) -> dict[int, float]:
        values: dict[int, list[float]] = {}
        for key in shared:
            values.setdefault(key[0], []).append(by[start][key])
        return {seed: sum(some) / len(some) for seed, some in values.items()}

    rows = []
    for start in (start for start in OF_START if start in by):
        gap = "" if start == "scale" else interval(difference(of(start), of("scale")))
        rows.append([f"{start}: {OF_START[start]}", percent(Mean.of(list(of(start).values()))), gap])
    merges = [title(*merge) for merge in WORDS if any(key[1:] == merge for key in shared)]
    seeds = sorted({key[0] for key in shared})
    said = f"Over {len(shared)} pairs of a merge and a seed that all of these have: {'; '.join(merges)}; seeds "
    lines = [f"{said}{', '.join(map(str, seeds))}.", ""]
    return lines + table(["start", "validation accuracy", "- scale"], rows)


def longer(b: Bench) -> list[str]:
    """Four times as many steps beside the library's."""
    rows = []
    for rule, space in CHOSEN:
        for grain in GRAINS[1:]:
            shared = {**LEARNED, "b_max": 3.0, "per_class": SIZES[-1], "grain": grain, "rule": rule, "space": space}
            said = []
            for value in (validation, final):
                few, many = (
                    b.cells.by_seed(value, **{**shared, "start": s, "domains": b.names}) for s in ("scale", LONG)
                )
                both = [seed for seed in few if seed in many]
                said += [percent(Mean.of([some[s] for s in both])) for some in (few, many)]
                said += [interval(difference(many, few))]
            if both:
                rows.append([f"{title(rule, space)}, by {grain}", *said, f"{len(both)}"])
    names = ("validation, 60 steps", "240", "240 - 60", "test, 60 steps", "240", "240 - 60")
    return table(["", *names, "seeds"], rows)


# -- what is missing ---------------------------------------------------------------------------------------------------


def planned(name: str, stream: DomainStream) -> dict[str, str]:
    """The cells of a bench: name -> part."""
    return {cell.name: group.part for group in groups(BENCHES[name], stream) for cell in group.cells}


def unfinished(found: Mapping[str, Cells]) -> str:
    """Which parts of which bench have cells missing; nothing when all are there."""
    lines = []
    for name, cells in found.items():
        plan = planned(name, BENCHES[name].stream())
        there = {cell_name(row["cell"]) for row in cells.rows} & plan.keys()
        if len(there) == len(plan):
            continue
        begun: list[str] = []
        not_begun: list[str] = []
        for part in PARTS:
            all_of = {cell for cell, its in plan.items() if its == part}
            what, have = PARTS[part].what.partition(" (")[0], len(all_of & there)
            if have < len(all_of):
                (begun if have else not_begun).append(
                    f"{what} ({have} of {len(all_of)})" if have else f"{what} ({len(all_of)})"
                )
        said = [f"Of {name}'s {len(plan)} cells {len(there)} are there."]
        said += [f"In part: {'; '.join(begun)}."] if begun else []
        said += [f"Not begun: {'; '.join(not_begun)}."] if not_begun else []
        lines.append(" ".join(said))
    return f"**Unfinished.** {' '.join(lines)}" if lines else ""
