"""What the benchmark was to show, each line with what was measured and whether it holds. Nothing here chooses a figure."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from designs import BASELINES, DESIGNS, METHODS, NEWER, ablations
from plan import Half
from results import Cells, Interval, best, over_pairs, slopes

MARGIN = 0.036  # the paper's, over DARE-TIES on its language half
LEADS = {"language": 4, "vision": 3}
Config = tuple[str, str, int]


def ours(half: Half) -> Config:
    """The first design under the protocol of the baselines: its coefficients by validation rows."""
    return half.designs[0], "best", half.rank


def free(half: Half) -> list[Config]:
    """Training-free baselines, as they are at their best by validation rows."""
    return [(m.name, "best", half.rank) for m in BASELINES]


def rivals(half: Half, cells: Cells, names: tuple[str, ...] = ()) -> list[Config]:
    return [c for c in free(half) if cells.of(*c) and (not names or c[0] in names)]


def verdicts(half: Half, cells: Cells) -> list[tuple[str, str, str]]:
    """(statement, measured, verdict)."""
    found = [_margin(half, cells), _ties(half, cells)] if half.name == "language" else []
    found += [_leads(half, cells), _average(half, cells), _newer(half, cells)]
    found += [_free(half, cells), _adds(half, cells, "free"), *balanced(half, cells)]
    found += [_part(half, cells, "gate"), _part(half, cells, "removal"), _freeing(half, cells), _depth(half, cells)]
    return [f for f in found if f is not None]


def _top(cells: Cells, mine: Config, others: list[Config]) -> Config | None:
    """The other with the best average; one that lacks a pair or seed of ours has its average over others, and is left out."""
    have = cells.of(*mine).keys()
    whole = [c for c in others if have and have <= cells.of(*c).keys()]
    return best(whole, lambda c: cells.average(*c))  # type: ignore[no-any-return]


def _said(i: Interval, good: bool) -> str:
    """A claim needs its interval: a mean that is right inside an interval that is not is no claim."""
    return "met" if good else "missed" if i.value <= 0 or i.below else "not shown: the interval holds less"


def _both(half: Half, cells: Cells, rival: Config) -> tuple[Interval, str]:
    """The difference of ours, and what is said of it and of ours without validation rows."""
    mine = ours(half)
    i = cells.difference(mine, rival)
    plain = cells.difference((mine[0], "ones", mine[2]), rival)
    said = f"{i.points()} points; ours without validation rows, at weights of 1: {plain.points()}"
    free = cells.difference((mine[0], "free", mine[2]), rival)
    return i, said + (f", at a level chosen without labels: {free.points()}" if free.pairs else "")


def _margin(half: Half, cells: Cells) -> tuple[str, str, str] | None:
    i, said = _both(half, cells, ("dare_ties", "best", half.rank))
    if not i.pairs:
        return None
    return "average against DARE-TIES at its best density: at least +3.6 points", said, _by_margin(i)


def _by_margin(i: Interval) -> str:
    return "met" if i.value >= MARGIN and i.low > 0 else "missed" if i.value < MARGIN else "not shown: interval holds 0"


def _ties(half: Half, cells: Cells) -> tuple[str, str, str] | None:
    i, said = _both(half, cells, ("ties", "best", half.rank))
    return ("above TIES on dW at its best density", said, _said(i, i.above)) if i.pairs else None


def _leads(half: Half, cells: Cells) -> tuple[str, str, str] | None:
    """Ties of means count for nobody."""
    mine = cells.by_pair(*ours(half))
    others = {c: cells.by_pair(*c) for c in rivals(half, cells)}
    if not mine or not others:
        return None
    won = [p for p in mine if all(p in o and mine[p] > o[p] for o in others.values())]  # none without all of them
    need = LEADS[half.name]
    said = f"{len(won)} of {len(mine)}" + (f": {', '.join(won)}" if won else "") + "; means over seeds"
    return f"best of all training-free rules on at least {need} pairs", said, "met" if len(won) >= need else "missed"


def _average(half: Half, cells: Cells) -> tuple[str, str, str] | None:
    top = _top(cells, ours(half), rivals(half, cells))
    if top is None:
        return None
    i, said = _both(half, cells, top)
    return (
        "average above the best training-free rule (in hindsight)",
        f"{METHODS[top[0]].title}: {said}",
        _said(i, i.above),
    )


def _newer(half: Half, cells: Cells) -> tuple[str, str, str] | None:
    top = _top(cells, ours(half), rivals(half, cells, NEWER))
    if top is None:
        return None
    i, said = _both(half, cells, top)
    return "ahead of the best of the newer rules on average", f"{METHODS[top[0]].title}: {said}", _said(i, i.above)


def _free(half: Half, cells: Cells) -> tuple[str, str, str] | None:
    """Nobody has labels: all at the level that the same unlabelled inputs choose."""
    mine = (half.designs[0], "free", half.rank)
    top = _top(cells, mine, [(m.name, "free", half.rank) for m in BASELINES])
    if top is None:
        return None
    i = cells.difference(mine, top)
    what = "without labels, above the best training-free rule at its level (in hindsight)"
    return what, f"{METHODS[top[0]].title}: {i.points()} points", _said(i, i.above)


ADDED = {"free": "a level chosen without labels adds", "balanced": "answers balanced without labels add"}


def _adds(half: Half, cells: Cells, at: str) -> tuple[str, str, str] | None:
    """Does what is done without labels earn its place: over all methods that have both, weights of 1 being the alternative."""
    mine = half.designs[0]
    i = cells.difference((mine, at, half.rank), (mine, "ones", half.rank))
    if not i.pairs:
        return None
    others = [m.name for m in BASELINES if cells.of(m.name, at, half.rank) and cells.of(m.name, "ones", half.rank)]
    gains = [cells.difference((n, at, half.rank), (n, "ones", half.rank)) for n in others]
    said = f"{i.points()} points" + (
        f"; of {len(gains)} baselines it helps {sum(g.value > 0 for g in gains)}" if gains else ""
    )
    return f"{ADDED[at]} to ours at weights of 1", said, _said(i, i.above)


def balanced(half: Half, cells: Cells) -> list[tuple[str, str, str] | None]:
    """Of the balance, which is this project's and which all rules can be given: ours has it, and the others with and without."""
    mine, tuned = (half.designs[0], "balanced", half.rank), (half.designs[0], "tuned", half.rank)
    found = [_adds(half, cells, "balanced")]
    margin = cells.difference(mine, ("dare_ties", "best", half.rank))
    if half.name == "language" and margin.pairs:
        what = "ours balanced, without labels, against DARE-TIES at its best by validation: at least +3.6 points"
        found.append((what, f"{margin.points()} points", _by_margin(margin)))
    top = _top(cells, mine, rivals(half, cells))
    if top is not None:
        i = cells.difference(mine, top)
        what = "ours balanced, without labels, above the best training-free rule at its best by validation"
        found.append(
            (f"{what} (which is not balanced)", f"{METHODS[top[0]].title}: {i.points()} points", _said(i, i.above))
        )
    top = _top(cells, mine, [(m.name, "balanced", half.rank) for m in BASELINES])
    if top is not None:
        i = cells.difference(mine, top)
        said = f"{METHODS[top[0]].title}: {i.points()} points"
        other = _top(cells, tuned, [(m.name, "tuned", half.rank) for m in BASELINES])
        if other is not None:
            said += f"; both at their best by validation first, {METHODS[other[0]].title}: "
            said += cells.difference(tuned, other).points()
        what = "ours balanced, without labels, above the best training-free rule balanced too (in hindsight)"
        found.append((what, said, _said(i, i.above)))
    i = cells.difference(mine, ("task", "balanced", half.rank))
    if i.pairs:
        found.append(
            ("ours balanced above the task adapter alone, balanced too", f"{i.points()} points", _said(i, i.above))
        )
    return found


def _part(half: Half, cells: Cells, part: str) -> tuple[str, str, str] | None:
    """gate: without removal, against neither; removal: without gates, against neither. All at weights of 1, cut to r."""
    name = half.designs[0]
    alone = f"{name}~no_removal" if part == "gate" else f"{name}~removal"
    i = cells.difference((alone, "ones", half.rank), (f"{name}~nothing", "ones", half.rank))
    without = f"{name}~uniform" if part == "gate" else f"{name}~no_removal"
    on_top = cells.difference((name, "ones", half.rank), (without, "ones", half.rank))
    if not i.pairs:
        return None
    said = f"alone {i.points()} points; on top of the other part {on_top.points()}"
    what = "the gate alone adds" if part == "gate" else "conflict removal alone adds"
    return what, said, _said(i, i.above)


def _freeing(half: Half, cells: Cells) -> tuple[str, str, str] | None:
    """Ours against the same design without it, at weights of 1, and both balanced; nothing for a design that frees nothing."""
    mine = METHODS[half.designs[0]]
    same = [
        m.name
        for m in DESIGNS
        if replace(m, name="", title="") == replace(mine, name="", title="", common=0, common_of="all")
    ]
    if not mine.common or not same:
        return None
    found = [cells.difference((mine.name, at, half.rank), (same[0], at, half.rank)) for at in ("ones", "balanced")]
    if not found[0].pairs:
        return None
    said = f"{found[0].points()} points" + (f"; both balanced {found[1].points()}" if found[1].pairs else "")
    return "freeing the domain adapter of common directions adds", said, _said(found[0], found[0].above)


def _depth(half: Half, cells: Cells) -> tuple[str, str, str] | None:
    found = slopes(cells.of(half.designs[0], "ones", half.rank).values())
    if not found:
        return None
    i = over_pairs(found)
    agree = [r["slope"][3] for r in cells.of(half.designs[0], "ones", half.rank).values() if "slope" in r]
    agree = [a for a in agree if a is not None and not math.isnan(a)]
    said = f"slope of log(q_domain / q_task), last layer less first: {i.value:+.2f} [{i.low:+.2f}, {i.high:+.2f}]"
    said += f"; rises on {sum(sum(v) > 0 for v in found.values())} of {len(found)} pairs"
    said += f"; halves of the inputs agree {sum(agree) / len(agree):.2f}" if agree else ""
    return "domain dominance grows with depth", said, "it does" if i.above else "it falls" if i.below else "not seen"


def ablation_rows(half: Half, cells: Cells) -> list[tuple[str, float, Interval]]:
    """(title, average, difference from the design at weights of 1)."""
    name = half.designs[0]
    found: list[tuple[str, float, Interval]] = []
    plain: Any = (name, "ones", half.rank)
    for m in ablations(METHODS[name]):
        config = (m.name, "ones", half.rank)
        if cells.of(*config):
            found.append((m.title, cells.average(*config), cells.difference(config, plain)))
    return found
