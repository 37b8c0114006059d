"""The tables of a bench's page: the poster's, its controls, buffers and granularities, heads, ranks, the collapse."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

from cells import B_MAX, CHOSEN, FEW, GRAINS, GRID, HEADS, NOISY, RULES, SIZES, SPACES, cell_name
from results import Cells, Mean, Row, difference, final, interval, percent, validation

from pages import table

OF_HEAD = {"random": "random head", "learned": "head of the first domain", "prototypes": "prototypes"}
NAMES = {"linear": "Task arithmetic", "ties": "TIES", "dare_ties": "DARE-TIES"}
WORDS = [(rule, space) for space in SPACES for rule in RULES]
SEEDS = 3  # that a configuration must have to be chosen
ENOUGH = 4  # rows a class from which on the library begins otherwise (loralloy.weighting.learned.config)
LEARNED: dict[str, Any] = {
    "how": "learned",
    "per_class": 1,
    "grain": "adapter",
    "head": "random",
    "rank": None,
    "draw": 0,
}


def alpha_0(b_max: float) -> float:
    """The poster's start: c = b_raw = 0."""
    return (1 + b_max) / 4


def title(rule: str, space: str) -> str:
    return f"{NAMES[rule]}, {space}"


class Bench:
    """The cells of a bench, by what the tables ask of them; all of them merge all domains unless said otherwise."""

    def __init__(
        self,
        cells: Cells,
        names: tuple[str, ...],
        orders: tuple[tuple[str, ...], ...],
        follow: tuple[int, ...] = (1, 20),
        best: tuple[dict[str, Any], ...] = (),
    ) -> None:
        self.cells, self.names, self.orders, self.follow, self.best = cells, names, orders, follow, best

    def start(self, per_class: int) -> str:
        """Where the learner begins in the tables, by rows a class: as the library does, as far as the page has it."""
        return self._few if per_class < ENOUGH else "scale"

    @cached_property
    def _few(self) -> str:
        """Below ENOUGH rows a class: the library's of today where the page has all those cells, else "scale", its own then."""
        learned = [r["cell"] for r in self.cells.rows if "start" in r["cell"] and r["cell"]["per_class"] < ENOUGH]
        today = {cell_name({**c, "start": NOISY}) for c in learned if c["start"] == "scale"}
        return NOISY if today and today <= {cell_name(c) for c in learned if c["start"] == NOISY} else "scale"

    def settings(self, **more: Any) -> dict[str, Any]:
        """Of the tables' learned cells; of any draw where draw is None."""
        settings = {**LEARNED, **more}
        settings.setdefault("start", self.start(settings["per_class"]))
        if settings["draw"] is None:
            del settings["draw"]
        return settings

    def fixed(self, rule: str, space: str, weight: float) -> dict[int, float]:
        return self.cells.by_seed(how="fixed", rule=rule, space=space, weight=weight, domains=self.names, head="random")

    def learned(self, rule: str, space: str, b_max: float = 3.0, **more: Any) -> dict[int, float]:
        """Of draw 0 of the buffer's rows, so that cells of all kinds can be paired; draw=None: the mean over all draws."""
        settings = {"rule": rule, "space": space, "b_max": b_max, "domains": self.names, **more}
        return self.cells.by_seed(**self.settings(**settings))

    def drawn(self, rule: str, space: str, b_max: float = 3.0, start: str | None = None) -> dict[int, float]:
        """The mean over the draws that a seed has, from `start` or else the tables' own."""
        return self.learned(rule, space, b_max, draw=None, **({"start": start} if start else {}))

    def alone(self, how: str, head: str = "random") -> dict[int, float]:
        return self.cells.by_seed(how=how, domains=self.names, head=head)

    def best_fixed(self, rule: str, space: str, below: float = math.inf, by: Any = final) -> float | None:
        """The weight of the grid below a bound whose mean is highest: in hindsight (test rows), or by validation rows."""
        means = {}
        for weight in GRID:
            if weight < below:
                found = self.cells.by_seed(
                    by, how="fixed", rule=rule, space=space, weight=weight, domains=self.names, head="random"
                )
                if found:
                    means[weight] = Mean.of(list(found.values())).value
        return max(means, key=lambda w: means[w]) if means else None

    def chosen(self, **settings: Any) -> tuple[dict[str, Any], float] | None:
        """The learned configuration with the best mean validation accuracy among those of SEEDS seeds or more (of the most, where
        none has so many), and that accuracy.

        Only what the library does by itself or the poster did: other starts are a check of the default (`checks.starts`).
        """
        groups: dict[tuple[tuple[str, Any], ...], set[int]] = {}
        for row in self.cells.find(how="learned", domains=self.names, rank=None, **settings):
            if row["cell"]["start"] in (self.start(row["cell"]["per_class"]), "zero") and row["validation"]:
                key = {k: v for k, v in row["cell"].items() if k not in ("seed", "domains", "order", "draw")}
                groups.setdefault(tuple(sorted(key.items())), set()).add(row["cell"]["seed"])
        least = min(SEEDS, max(map(len, groups.values()), default=0))
        means = {}
        for choice, seeds in groups.items():
            if len(seeds) >= least:
                by = self.cells.by_seed(validation, **dict(choice), domains=self.names, rank=None)
                means[choice] = sum(by.values()) / len(by)
        if not means:
            return None
        best = max(means, key=lambda key: means[key])
        return dict(best), means[best]


def poster(b: Bench) -> list[str]:
    learned = [f"learned b_max={m:g}" for m in sorted(B_MAX)]
    heads = [
        "rule, space",
        "W=1",
        "W=3",
        "W=5",
        *learned,
        "1/N",
        "best fixed W (hindsight)",
        "fixed W chosen on validation",
    ]
    rows = []
    for rule, space in WORDS:
        row = [title(rule, space)] + [percent(Mean.of(list(b.fixed(rule, space, w).values()))) for w in (1.0, 3.0, 5.0)]
        row += [percent(Mean.of(list(b.drawn(rule, space, m).values()))) for m in sorted(B_MAX)]
        uniform = round(1 / len(b.names), 4)
        row.append(percent(Mean.of(list(b.fixed(rule, space, uniform).values()))))
        for by in (final, validation):
            weight = b.best_fixed(rule, space, by=by) if b.cells.find(how="fixed", rule=rule, space=space) else None
            row.append(
                ""
                if weight is None
                else f"{percent(Mean.of(list(b.fixed(rule, space, weight).values())))} (W={weight:g})"
            )
        rows.append(row)
    return table(heads, rows)


def against_alpha_0(b: Bench, start: str | None = None) -> list[tuple[str, str, float, Mean]]:
    """(rule, space, b_max, learned - fixed W = alpha_0), one sample a class."""
    return [
        (rule, space, m, difference(b.drawn(rule, space, m, start=start), b.fixed(rule, space, alpha_0(m))))
        for rule, space in WORDS for m in sorted(B_MAX)
    ]  # fmt: skip


def against_best(b: Bench, start: str | None = None) -> list[tuple[str, str, float, float, bool, Mean]]:
    """(rule, space, b_max, W, whether the best W of all lies within (0, b_max), learned - best fixed W within it)."""
    found = []
    for rule, space in WORDS:
        best = b.best_fixed(rule, space)
        for m in sorted(B_MAX):
            weight = b.best_fixed(rule, space, m)
            if best is not None and weight is not None:
                d = difference(b.drawn(rule, space, m, start=start), b.fixed(rule, space, weight))
                found.append((rule, space, m, weight, best < m, d))
    return found


def controls(b: Bench) -> list[str]:
    zero = {(r, s, m): d for r, s, m, d in against_alpha_0(b, "zero")}
    best = {(r, s, m): (w, inside, d) for r, s, m, w, inside, d in against_best(b)}
    rows = []
    for rule, space, m, d in against_alpha_0(b):
        weight, inside, versus = best.get((rule, space, m), (math.nan, True, Mean.of([])))
        said = f"{interval(versus)} (W={weight:g}{'' if inside else '; the best of all is not below b_max'})"
        rows.append(
            [title(rule, space), f"{m:g}", f"{alpha_0(m):g}", interval(d), interval(zero[rule, space, m]), said]
        )
    heads = ["rule, space", "b_max", "alpha_0", "learned - fixed W = alpha_0", "from c = 0 - fixed W = alpha_0",
             "learned - best fixed W in (0, b_max), hindsight"]  # fmt: skip
    return table(heads, rows)


def others(b: Bench) -> list[str]:
    rows = [
        ["base model", "", percent(Mean.of(list(b.alone("base").values())))],
        ["own adapter of each domain (told the domain)", "", percent(Mean.of(list(b.alone("own").values())))],
        ["joint training on all domains", "", percent(Mean.of(list(b.alone("joint").values())))],
        ["sequential fine-tuning (mean over orders)", "", percent(Mean.of(list(b.alone("seq").values())))],
    ]
    for k in FEW:
        found = b.cells.mean(how="few", per_class=k, domains=b.names)
        rows.append(
            [
                f"one adapter trained on as many rows as a buffer of {k} a class holds (the first of each domain), 60 steps",
                "",
                percent(found),
            ]
        )
    kinds = (("search", "black-box search (LoraHub's objective)"), ("entropy", "entropy, no labels (AdaMerging)"),
             ("regmean", "closed form (after RegMean), no labels"))  # fmt: skip
    for how, name in kinds:
        settings = {
            tuple(row["cell"].get(k) for k in ("rule", "space", "per_class", "grain")) for row in b.cells.find(how=how)
        }
        for rule, space, k, grain in sorted(settings, key=str):
            found = b.cells.mean(how=how, rule=rule, space=space, per_class=k, grain=grain, domains=b.names)
            rows.append(
                [f"{name}{', by ' + grain if grain else ''}, {k} rows a class", title(rule, space), percent(found)]
            )
    return table(["", "rule, space", "final accuracy"], [r for r in rows if r[2]])


def buffers(b: Bench) -> list[str]:
    lines = []
    for rule, space in CHOSEN:
        rows = []
        for grain in GRAINS:
            cells = [b.learned(rule, space, per_class=k, grain=grain) for k in SIZES]
            rows.append([f"by {grain}", *(percent(Mean.of(list(c.values()))) for c in cells)])
        for grain in GRAINS[1:]:
            gaps = [
                difference(b.learned(rule, space, per_class=k, grain=grain), b.learned(rule, space, per_class=k))
                for k in SIZES
            ]
            rows.append([f"{grain} - adapter", *map(interval, gaps)])
        for grain in GRAINS[1:]:
            of = {"rule": rule, "space": space, "b_max": 3.0, "domains": b.names}
            rows.append([f"{grain} - adapter, validation rows", *(
                interval(difference(*(
                    b.cells.by_seed(validation, **b.settings(per_class=k, grain=g, **of)) for g in (grain, "adapter")
                )))
                for k in SIZES
            )])  # fmt: skip
        weight = b.best_fixed(rule, space, by=validation)
        if weight is not None:
            fixed = b.fixed(rule, space, weight)
            for grain in GRAINS:
                gaps = [difference(b.learned(rule, space, per_class=k, grain=grain), fixed) for k in SIZES]
                rows.append([f"{grain} - fixed W={weight:g}", *map(interval, gaps)])
        if any(any(row[1:]) for row in rows):
            lines += [
                f"{title(rule, space)} space, b_max = 3:",
                "",
                *table(["coefficients", *(f"{k} a class" for k in SIZES)], rows),
            ]
    return lines


def heads(b: Bench) -> list[str]:
    rows = []
    for head in HEADS:
        for how, said in (("own", "own adapter of each domain"), ("joint", "joint training")):
            found = b.alone(how, head)
            rows.append([f"{OF_HEAD[head]}: {said}", "", percent(Mean.of(list(found.values())))] if found else None)
        of_head = b.cells.find(how="learned", head=head, domains=b.names, b_max=3.0, rank=None)
        own = [r["cell"] for r in of_head if r["cell"]["start"] == b.start(r["cell"]["per_class"])]
        settings = {tuple(cell.get(k) for k in ("rule", "space", "per_class", "grain")) for cell in own}
        for rule, space, k, grain in sorted(settings, key=str):
            if head == "random" and (k not in (1, 20) or (rule, space) not in CHOSEN or grain == "module"):
                continue
            cells = b.learned(rule, space, per_class=k, grain=grain, head=head)
            rows.append(
                [
                    f"{OF_HEAD[head]}: coefficients by {grain}, {k} a class",
                    title(rule, space),
                    percent(Mean.of(list(cells.values()))),
                ]
            )
    return table(["head", "rule, space", "final accuracy"], [r for r in rows if r])


def collapse(b: Bench) -> list[str]:
    rows = []
    for rule, space in WORDS:
        found = b.cells.find(how="geometry", rule=rule, space=space, domains=b.names)
        if not found:
            continue

        def of(key: str, found: list[Row] = found) -> str:
            values = [row[key] for row in found if row.get(key) is not None]
            return f"{sum(values) / len(values):.2f}" if values else ""

        accuracies = [percent(Mean.of(list(b.fixed(rule, space, w).values()))) for w in (0.25, 1.0, 3.0, 5.0)]
        lengths = [1 / row["merged"] for row in found if row.get("merged")]
        matching = f"{sum(lengths) / len(lengths):.2f}" if lengths else ""
        means = {w: Mean.of(list(b.fixed(rule, space, w).values())) for w in GRID}
        best = max((w for w in GRID if means[w].n), key=lambda w: means[w].value, default=None)
        rows.append(
            [title(rule, space), of("cross_over_sum"), of("merged"), matching, f"{best:g}" if best else "", *accuracies]
        )
    heads = ["rule, space", "cross / sum", "norm at W=1 / an adapter's", "W of an adapter's norm", "best W (hindsight)"]
    return table([*heads, "W=0.25", "W=1", "W=3", "W=5"], rows)


def ranks(b: Bench) -> list[str]:
    every = (row["cell"].get("rank") for row in b.cells.find(how="learned", domains=b.names))
    found = sorted({rank for rank in every if isinstance(rank, int)})
    rows = []
    for rule in RULES:
        cells = [b.learned(rule, "delta", rank=rank) for rank in (None, *found)]
        cells[0] = {seed: value for seed, value in cells[0].items() if any(seed in some for some in cells[1:])}
        if any(cells[1:]):
            cut = [difference(some, cells[0]) for some in cells[1:]]
            rows.append(
                [title(rule, "delta"), *(percent(Mean.of(list(c.values()))) for c in cells), *map(interval, cut)]
            )
    return table(["rule, space", "uncut", *(f"rank {r}" for r in found), *(f"{r} - uncut" for r in found)], rows)
