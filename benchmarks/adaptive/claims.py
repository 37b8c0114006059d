"""What the benchmark was to show, each statement with what was measured and whether it holds. Nothing here chooses a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cells import CHOSEN, FEW, GRAINS, SIZES
from results import Cells, Mean, difference, final, high, interval, low, percent
from streams import QUANTITIES, growth_rows, line, measured
from tables import OF_HEAD, WORDS, Bench, against_alpha_0, against_best, title

MARGIN = 0.02  # of "not worse than the best fixed weight"
NEAR = {"text": 0.05, "images": 0.10}  # of joint training
FORGET = 0.05
COLLAPSE = 0.10  # below the best weight


def verdicts(b: Bench, kind: str, growing: dict[str, Cells]) -> list[tuple[str, str, str]]:
    """(statement, measured, verdict)."""
    found = [
        better(b),
        within(b),
        near_joint(b, kind),
        past_sequential(b),
        past_few(b),
        forgetting(b),
        falls(b),
        *finer(b),
    ]
    found += [grows(name, cells) for name, cells in growing.items() if cells.rows]
    return [f for f in found if f is not None]


def judged(mean: Mean, bar: float = 0.0) -> str:
    """Whether a figure is above `bar`: "met" where its 95 % interval is, "missed" where that is below, else "not shown"."""
    if mean.n > 1 and low(mean) > bar:
        return "met"
    return "missed" if mean.n > 1 and high(mean) < bar else "not shown"


def held(mean: Mean, bar: float) -> str:
    """Whether a margin is kept: "met" where the 95 % interval does, "missed" where the mean does not, else "not shown"."""
    return "missed" if mean.value < bar else "met" if mean.n > 1 and low(mean) >= bar else "not shown"


def counted(states: Sequence[str]) -> str:
    """ "met" if all are; else how many of each."""
    met, unsure, missed = (list(states).count(s) for s in ("met", "not shown", "missed"))
    return "met" if met == len(states) else f"met in {met}, not shown in {unsure}, missed in {missed} of {len(states)}"


def better(b: Bench) -> tuple[str, str, str] | None:
    """Per rule (both spaces, all b_max), paired by seed."""
    rows = [r for r in against_alpha_0(b) if r[3].n]
    if not rows:
        return None
    said, verdict = [], []
    for rule in dict.fromkeys(r[0] for r in rows):
        seeds: dict[int, list[float]] = {}
        for _, space, m, _ in (r for r in rows if r[0] == rule):
            fixed = b.fixed(rule, space, (1 + m) / 4)
            for seed, value in b.drawn(rule, space, m).items():
                if seed in fixed:
                    seeds.setdefault(seed, []).append(value - fixed[seed])
        mean = Mean.of([sum(v) / len(v) for v in seeds.values()])
        said.append(f"{rule}: {interval(mean)}")
        verdict.append(f"{rule}: {judged(mean)}")
    states = [judged(r[3]) for r in rows]
    up, down, unsure = (states.count(s) for s in ("met", "missed", "not shown"))
    said.append(
        f"of {len(rows)} triples of rule, space and b_max {up} are better and {down} worse at 95 %, {unsure} neither"
    )
    return (
        "learned coefficients against fixed W = alpha_0, one row a class: better",
        "; ".join(said),
        ", ".join(verdict),
    )


def within(b: Bench) -> tuple[str, str, str] | None:
    rows = [r for r in against_best(b) if r[5].n > 1]
    if not rows:
        return None
    asked = [r for r in rows if r[4]]
    states = [held(r[5], -MARGIN) for r in asked]
    out = [r for r in rows if not r[4]]
    said = f"{states.count('met')} of {len(asked)} triples of rule, space and b_max whose range holds the best W "
    said += "are within 2 points"
    ways = (("missed", "missed (the mean is not)"), ("not shown", "not shown (the mean is, the interval is not)"))
    for state, words in ways:
        these = [r for r, s in zip(asked, states, strict=True) if s == state]
        told = ", ".join(f"{title(r[0], r[1])} b_max {r[2]:g} {interval(r[5])}" for r in these)
        said += f"; {words}: {told}" if these else ""
    if out:
        said += "; excluded (the best W is not below b_max): " + ", ".join(
            f"{title(r[0], r[1])} b_max {r[2]:g}" for r in out
        )
    state = counted(states) if asked else "not tested: every range excludes the best W"
    text = "not worse than the best fixed W in hindsight by more than 2 points (95 %)"
    return text, said, state


def near_joint(b: Bench, kind: str) -> tuple[str, str, str] | None:
    """Each head's chosen configuration against joint training, and against the best joint training. Validation rows choose the
    configuration, and the head that the verdict is of; the joint training it is held to is the best on test rows."""
    joints = {head: b.alone("joint", head) for head in ("random", "learned", "prototypes")}
    joints = {head: cells for head, cells in joints.items() if cells}
    if not joints:
        return None
    strongest = max(joints, key=lambda h: Mean.of(list(joints[h].values())).value)
    said, gaps = [], []
    for head in joints:
        choice = b.chosen(head=head)
        if choice is None:
            continue
        settings = choice[0]
        cells = b.cells.by_seed(**settings, domains=b.names, rank=None)
        for rival in dict.fromkeys((head, strongest)):
            gap = difference(cells, joints[rival])
            told = ", ".join(f"{settings[k]}" for k in ("rule", "space") if k in settings)
            told += (
                f", b_max {settings['b_max']:g}, by {settings['grain']}, {settings['per_class']} a class, {gap.n} seeds"
            )
            said.append(
                f"{OF_HEAD[head]} ({told}): {percent(Mean.of(list(cells.values())))}, {interval(gap)} to joint training "
                f"({OF_HEAD[rival]})"
            )
            if rival == strongest:
                gaps.append((choice[1], head, gap))
    if not gaps:
        return None
    _, head, gap = max(gaps, key=lambda found: found[0])
    limit = NEAR[kind]
    state = {"met": "met", "not shown": "met on average, not shown at 95 %"}.get(
        held(gap, -limit), f"missed by {100 * (-limit - gap.value):.1f} points"
    )
    text = "best adaptive configuration (with its head chosen on validation rows) within "
    text += f"{100 * limit:.0f} points of joint training"
    return text, "; ".join(said), f"{state} ({OF_HEAD[head]}, against joint training with {OF_HEAD[strongest]})"


def past_sequential(b: Bench) -> tuple[str, str, str] | None:
    """The configuration that validation rows choose, over all heads, against one adapter trained on each domain in turn."""
    sequence = b.alone("seq")
    choices = [c for head in ("random", "learned", "prototypes") if (c := b.chosen(head=head)) is not None]
    if not sequence or not choices:
        return None
    settings, _ = max(choices, key=lambda choice: choice[1])
    cells = b.cells.by_seed(**settings, domains=b.names, rank=None)
    gap, both = difference(cells, sequence), [s for s in cells if s in sequence]
    means = (percent(Mean.of([of[s] for s in both])) for of in (cells, sequence))
    said = (
        "{} against {}, ".format(*means)
        + f"{interval(gap)} ({gap.n} seeds; orders averaged; it keeps no rows, and one adapter)"
    )
    if settings["head"] != "random" and (like := b.chosen(head="random")) is not None:  # the head it was trained under
        same = b.cells.by_seed(**like[0], domains=b.names, rank=None)
        said += f"; under its own random head {percent(Mean.of(list(same.values())))}, {interval(difference(same, sequence))}"
    return "best adaptive configuration above sequential fine-tuning of one adapter", said, judged(gap)


def past_few(b: Bench) -> tuple[str, str, str] | None:
    """What validation rows choose of merges learned from 20 rows a class, against an adapter trained on as many alone."""
    trained = b.cells.by_seed(how="few", per_class=FEW[-1], domains=b.names)
    choice = b.chosen(head="random", per_class=FEW[-1])
    if not trained or choice is None:
        return None
    cells = b.cells.by_seed(**choice[0], domains=b.names, rank=None)
    gap, both = difference(cells, trained), [s for s in cells if s in trained]
    means = (percent(Mean.of([of[s] for s in both])) for of in (cells, trained))
    told = f"{title(choice[0]['rule'], choice[0]['space'])}, by {choice[0]['grain']}: "
    text = f"a merge learned from {FEW[-1]} rows a class above one adapter trained on as many rows alone"
    return text, told + "{} against {}, ".format(*means) + f"{interval(gap)} ({gap.n} seeds)", judged(gap)


def forgetting(b: Bench) -> tuple[str, str, str] | None:
    found = {k: v["forgetting"] for k, v in measured(b).items()}
    ours = {k: v for k, v in found.items() if k[0].startswith("learned") and v.n}
    if not ours:
        return None
    said = "; ".join(f"{k[0]}{', ' + title(k[1], k[2]) if k[1] else ''}: {percent(v)}" for k, v in found.items())
    worst = max(ours.values(), key=lambda v: v.value)
    state = counted([held(Mean(-v.value, v.deviation, v.half, v.n), -FORGET) for v in ours.values()])
    return "forgetting below 5 points", said, state if state == "met" else f"{state} (worst {percent(worst)})"


def falls(b: Bench) -> tuple[str, str, str] | None:
    """Task arithmetic in factors space at large W, beside the same in delta space."""
    rows, shown = [], []
    for rule, space in WORDS:
        one, five = (Mean.of(list(b.fixed(rule, space, w).values())) for w in (1.0, 5.0))
        three, best = Mean.of(list(b.fixed(rule, space, 3.0).values())), b.best_fixed(rule, space)
        if best is None:
            continue
        top = Mean.of(list(b.fixed(rule, space, best).values()))
        cross = [
            row["cross_over_sum"]
            for row in b.cells.find(how="geometry", rule=rule, space=space, domains=b.names)
            if "cross_over_sum" in row
        ]
        told = f", cross terms {sum(cross) / len(cross):.2f} of the sum's norm" if cross else ""
        large = max((3.0, three), (5.0, five), key=lambda found: found[1].value)[0]
        rows.append((rule, space, difference(b.fixed(rule, space, best), b.fixed(rule, space, large))))
        at = f"W=1 {percent(one)}, W=3 {percent(three)}, W=5 {percent(five)}"
        shown.append(f"{title(rule, space)}: best {percent(top)} at W={best:g}, {at}{told}")
    if not rows:
        return None
    lost = {r[:2]: r[2] for r in rows}
    drop = lost.get(("linear", "factors"), Mean.of([]))
    state = "shown" if judged(drop, COLLAPSE) == "met" else "not shown"
    return (
        "collapse of wrong fixed weights (factors space, W = 3, 5)",
        "; ".join(shown),
        f"{state} (task arithmetic loses {interval(drop).replace('+', '')} points)",
    )


def finer(b: Bench) -> list[tuple[str, str, str]]:
    """From which buffer size on finer coefficients are better than one an adapter."""
    found = []
    for rule, space in CHOSEN:
        said, pays = [], {}
        for grain in GRAINS[1:]:
            diffs = [
                (k, difference(b.learned(rule, space, per_class=k, grain=grain), b.learned(rule, space, per_class=k)))
                for k in SIZES
            ]
            diffs = [(k, d) for k, d in diffs if d.n]
            said += [f"{grain}, {k} a class: {interval(d)}" for k, d in diffs]
            sure = [k for k, d in diffs if d.n > 1 and low(d) > 0]
            ahead = [k for k, d in diffs if all(e.value > 0 for j, e in diffs if j >= k)]
            if diffs:
                average = f"on average from {ahead[0]} a class on" if ahead else "at no size on average"
                surely = f"at {', '.join(map(str, sure))} a class" if sure else "nowhere"
                pays[grain] = f"{grain}: {average}, {surely} at 95 %"
        if said:
            found.append(
                (f"where finer coefficients pay, {title(rule, space)}", "; ".join(said), "; ".join(pays.values()))
            )
    return found


def grows(name: str, cells: Cells) -> tuple[str, str, str]:
    said, straight, learns = [], [], []
    for rule, space in CHOSEN:
        rows = growth_rows(cells, rule, space)
        if len(rows) < 3:
            continue
        for what in ("learning, s", "peak GPU memory, MB", "terms, MB"):
            values = [QUANTITIES[what](row) for _, row, _ in rows]
            slope, _, r2 = line([n for n, _, _ in rows], values)
            if not math.isnan(r2):
                said.append(f"{title(rule, space)}, {what}: {slope:.3g} a domain, R² {r2:.3f}")
                # what hardly grows need not be a line
                straight.append(r2 > 0.9 or max(values) < 1.5 * min(values))
        n, row, fixed = rows[-1]
        share = row["moved"] / row["start_scale"] if row.get("start_scale") else math.nan
        learns.append(share > 0.1)  # of where it began: with many domains all coefficients are small
        said.append(
            f"{title(rule, space)}, {n} domains: a coefficient moved by up to {100 * share:.0f} % of its start; learned "
            f"{100 * final(row):.1f} %, fixed " + ", ".join(f"W={w:g} {100 * v:.1f}" for w, v in sorted(fixed.items()))
        )
    state = (
        "too few cells"
        if not straight
        else f"{'linear' if all(straight) else 'not linear throughout'}, coefficients {'move' if all(learns) else 'do not move'}"
    )
    return (
        f"growth to {name}'s domains: coefficients still learn; time and memory grow linearly",
        "; ".join(said) or f"{len(cells.rows)} of its cells, fewer than three sizes of either rule",
        state,
    )


def verdict_lines(b: Bench, kind: str, growing: dict[str, Cells]) -> list[str]:
    """A paragraph a statement: the verdict, then what was measured."""
    lines = []
    for what, found, verdict in verdicts(b, kind, growing):
        lines += [f"- **{what[0].upper() + what[1:]}**: *{verdict}*. {found[0].upper() + found[1:]}.", ""]
    return lines
