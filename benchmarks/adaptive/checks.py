"""What stands beside the tables: draws of the buffer's rows, rows that were not trained on, other starts, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cells import CHOSEN, GRAINS, NOISY, SIZES, cell_name
from parts import PARTS
from plan import BENCHES, groups
from results import Cells, Mean, difference, final, interval, percent, validation
from tables import WORDS, Bench, title

from loralloy.continual.experience import DomainStream
from pages import table

OF_START = {
    "scale": "the best on the buffer of up to 6 scales, 0.4 to 1.8 times an adapter's length; what the library does from 4 rows "
    "a class on, and did with fewer when the pages were begun",
    "scale_pull": "scale, pulled to it 10 times as much",
    "match": "an adapter's length, no search",
    "match_pull": "match, pulled to it 10 times as much",
    "match_still": "match without gradient steps",
    "near": "the best of up to 5 scales, 0.7 to 1.4 times an adapter's length",
    "near_noise": "near, under a likelihood by which one answer of ten is by chance; what the library does with fewer than 4 "
    "rows a class",
    "near_pull": "near, pulled to it 10 times as much",
    "near_still": "near without gradient steps",
}


def drawn(b: Bench) -> str:
    """How many draws the table's learned figures have, and how far apart those of a seed are; a sentence after another."""
    by: dict[tuple[Any, ...], list[float]] = {}
    for row in b.cells.find(**b.settings(draw=None), domains=b.names):
        by.setdefault(_run(row)[:-1], []).append(final(row))
    counts = sorted({len(values) for values in by.values()})
    if not counts or counts[-1] < 2:
        return ""
    said = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f" With one row a class a seed's learned figure is the mean over its draws of the buffer's rows ({said}), and "
        f"seeds are averaged after that; draws of one seed have a standard deviation of {_spread(by)} points."
    )


def _run(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which of the table's learned runs a cell is: the draw last."""
    return tuple(row["cell"].get(k, 0) for k in ("seed", "rule", "space", "b_max", "draw"))


def _spread(by: Mapping[Any, Sequence[float]]) -> str:
    """The standard deviation over a seed's draws, in points, pooled; nothing where none has two."""
    several = [Mean.of(list(values)).deviation ** 2 for values in by.values() if len(values) > 1]
    return f"{100 * math.sqrt(sum(several) / len(several)):.1f}" if several else ""


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
                even = b.cells.by_seed(how="even_learned", domains=b.names, head="random", start=b.start(k), **same)
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
    """Validation accuracy by start of the learner, each against "scale", and under label noise against the same without, over the
    runs that both have: of every merge, seed, draw of the buffer's rows and b_max."""
    by: dict[str, dict[tuple[Any, ...], float]] = {}
    for start in OF_START:
        for row in b.cells.find(**b.settings(draw=None, start=start, domains=b.names)):
            if row["validation"]:
                by.setdefault(start, {})[_run(row)] = validation(row)
    rows = []
    for start, other in [*((start, "scale") for start in by if start != "scale"), (NOISY, "near")]:
        both = sorted(by.get(start, {}).keys() & by.get(other, {}).keys())
        if not both:
            continue

        def grouped(start: str, depth: int, both: Sequence[tuple[Any, ...]] = both) -> dict[Any, list[float]]:
            values: dict[Any, list[float]] = {}
            for key in both:
                values.setdefault(key[:depth], []).append(by[start][key])
            return values

        def of(start: str, grouped: Any = grouped) -> dict[int, float]:
            return {key[0]: sum(some) / len(some) for key, some in grouped(start, 1).items()}

        runs, draws = f"{len(both)} of {len({key[0] for key in both})} seeds", len({key[4] for key in both})
        means = [percent(Mean.of(list(of(s).values()))) for s in (other, start)]
        lowest = [f"{100 * min(by[s][key] for key in both):.1f}" for s in (other, start)]
        apart = [_spread(grouped(s, 4)) for s in (other, start)]
        said = f"{start}: {OF_START[start]}" if other == "scale" else start
        rows.append([said, other, f"{runs}, {draws} draw{'s' * (draws > 1)}", *means,
                     interval(difference(of(start), of(other))), *lowest, *apart])  # fmt: skip
    heads = ["start", "against", "runs", "that", "this", "this - that", "lowest run, that", "lowest run, this",
             "draws apart, that", "draws apart, this"]  # fmt: skip
    more = _today(b)
    return [f"scale: {OF_START['scale']}.", "", *table(heads, rows), *more] if rows else []


def _today(b: Bench) -> list[str]:
    """What the library does below ENOUGH rows a class against "scale", where it is not one row and one coefficient an adapter."""
    rows = []
    for k, grain in ((1, "layer"), (2, "adapter"), (2, "layer")):
        by: dict[int, list[float]] = {}
        for rule, space in CHOSEN:
            shared = b.settings(b_max=3.0, per_class=k, grain=grain, rule=rule, space=space, domains=b.names)
            new, old = (b.cells.by_seed(validation, **{**shared, "start": s}) for s in (NOISY, "scale"))
            for seed in new.keys() & old.keys():
                by.setdefault(seed, []).append(new[seed] - old[seed])
        if by:
            gap = Mean.of([sum(some) / len(some) for some in by.values()])
            rows.append([f"by {grain}", str(k), interval(gap), str(gap.n)])
    said = f"{NOISY} against scale elsewhere, b_max = 3, one draw, {' and '.join(title(*merge) for merge in CHOSEN)} averaged:"
    return (
        [said, "", *table(["coefficients", "rows a class", "validation, this - that", "seeds"], rows)] if rows else []
    )


def beside(b: Bench, start: str, ours: str, other: str) -> list[str]:
    """What the library does from ENOUGH rows a class on, and another start in its place. ours, other: their names."""
    rows = []
    for rule, space in CHOSEN:
        for k in SIZES:
            for grain in GRAINS:
                shared = b.settings(b_max=3.0, per_class=k, grain=grain, rule=rule, space=space, domains=b.names)
                said = []
                for value in (validation, final):
                    one, two = (b.cells.by_seed(value, **{**shared, "start": s}) for s in ("scale", start))
                    both = [seed for seed in one if seed in two]
                    said += [percent(Mean.of([some[s] for s in both])) for some in (one, two)]
                    said += [interval(difference(two, one))]
                if both:
                    rows.append([f"{title(rule, space)}, by {grain}", f"{k}", *said, f"{len(both)}"])
    names = [
        f"{rows_of}{some}" for rows_of in ("validation, ", "test, ") for some in (ours, other, f"{other} - {ours}")
    ]
    return table(["", "rows a class", *names, "seeds"], rows)


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
