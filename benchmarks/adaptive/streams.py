"""The path over experiences (forgetting, transfer, coefficients), and how a stream's costs grow with its domains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cells import CHOSEN, SIZES
from results import Cells, Mean, Row, final, percent
from tables import OF_HEAD, Bench, title

from loralloy.continual.metrics import Metrics
from pages import table

METRICS = ("final_accuracy", "incremental_accuracy", "forgetting", "backward_transfer", "forward_transfer")
Config = tuple[str, str, str, dict[str, Any]]


def configs(b: Bench) -> list[Config]:
    """(name, rule, space, settings of the cells) of what is followed over the experiences."""
    found: list[Config] = []
    for rule, space in CHOSEN:
        for k in b.follow:
            found.append((f"learned, {k} a class", rule, space, b.settings(per_class=k, b_max=3.0)))
        found.append(("fixed W=1", rule, space, {"how": "fixed", "weight": 1.0, "head": "random"}))
    settings = b.settings(per_class=SIZES[-1], b_max=3.0, grain="layer")
    found.append((f"learned, by layer, {SIZES[-1]} a class", *CHOSEN[0], settings))
    for chosen in b.best:
        settings = b.settings(**{k: v for k, v in chosen.items() if k not in ("rule", "space")})
        said = "" if settings["grain"] == "adapter" else f", by {settings['grain']}"
        said += f", {settings['per_class']} a class"
        said += "" if settings["b_max"] == 3 else f", b_max = {settings['b_max']:g}"
        said += "" if settings["head"] == "random" else f", {OF_HEAD[settings['head']]} (first order)"
        found.append((f"learned{said}", chosen["rule"], chosen["space"], settings))
    for rule, space in CHOSEN:
        settings = b.settings(per_class=5, b_max=3.0, head="prototypes")
        found.append(("learned, 5 a class, head of prototypes (first order)", rule, space, settings))
    return found


def path(b: Bench, config: Config, seed: int, order: Sequence[str]) -> list[Row] | None:
    """The cells after each experience; None where one is missing."""
    rows = []
    for t in range(1, len(order) + 1):
        names = tuple(n for n in b.names if n in order[:t])
        found = b.cells.find(**{**config[3], "rule": config[1], "space": config[2], "domains": names, "seed": seed})
        if not found:
            return None
        rows.append(found[0])
    return rows


def _metrics(
    matrix: Sequence[dict[str, float]], base: dict[str, float] | None, order: Sequence[str]
) -> dict[str, float]:
    """Without a base, under a head that was trained with an adapter, there is no forward transfer."""
    found = Metrics.of([[row[n] for n in order] for row in matrix], [(base or {}).get(n, 0.0) for n in order])
    return {name: getattr(found, name) for name in METRICS if base is not None or name != "forward_transfer"}


def measured(b: Bench) -> dict[tuple[str, str, str], dict[str, Mean]]:
    """(name, rule, space) -> each metric over seeds, orders averaged within a seed; sequential fine-tuning too."""
    result = {}
    for config in [*configs(b), ("sequential fine-tuning", "", "", {})]:
        head = config[3].get("head", "random")
        of = "random" if head == "learned" else head
        bases = {row["cell"]["seed"]: row["test"] if of == head else None for row in b.cells.find(how="base", head=of)}
        by: dict[int, list[dict[str, float]]] = {}
        for seed, base in bases.items():
            for n, order in enumerate(b.orders):
                if not config[3]:
                    found = b.cells.find(how="seq", seed=seed, order=n)
                    matrix = found[0]["matrix"] if found else None
                else:
                    rows = path(b, config, seed, order)
                    matrix = rows and [row["test"] for row in rows]
                if matrix:
                    by.setdefault(seed, []).append(_metrics(matrix, base, order))
        if by:
            result[config[:3]] = {
                name: Mean.of([sum(m[name] for m in some) / len(some) for some in by.values() if name in some[0]])
                for name in METRICS
            }
    return result


def path_table(b: Bench) -> list[str]:
    rows = []
    for (name, rule, space), found in measured(b).items():
        values = [percent(found[m], m.endswith("transfer")) for m in METRICS]
        rows.append([name, title(rule, space) if rule else "", *values, str(found["final_accuracy"].n)])
    return table(["", "rule, space", "final", "incremental", "forgetting", "backward", "forward", "seeds"], rows)


def coefficients(b: Bench) -> list[str]:
    """The poster's table: weights and accuracies after each experience, the first order, means over seeds."""
    lines: list[str] = []
    order = b.orders[0]
    for config in configs(b):
        if config[3]["how"] != "learned":
            continue
        seeds = [row["cell"]["seed"] for row in b.cells.find(how="base", head="random")]
        paths = [p for p in (path(b, config, seed, order) for seed in seeds) if p]
        if not paths:
            continue
        rows = []
        for t in range(len(order)):
            weights = [_mean([p[t]["weights"].get(n) for p in paths]) for n in order]
            scores = [_mean([p[t]["test"].get(n) for p in paths]) for n in order]
            rows.append(
                [f"{t + 1} {order[t]}", *("" if w is None else f"{w:.2f}" for w in weights),
                 *(("" if s is None else f"{100 * s:.1f}" if j <= t else f"({100 * s:.1f})") for j, s in enumerate(scores))]
            )  # fmt: skip
        bound = "" if "b_max" in config[0] else ", b_max = 3"
        said = f"{title(config[1], config[2])} space, {config[0]}{bound}, {len(paths)} seeds"
        lines += [f"{said} (in brackets: domains still to come):", ""]
        lines += table(["experience", *(f"w {n}" for n in order), *(f"{n}, %" for n in order)], rows)
    return lines


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


# -- growth ------------------------------------------------------------------------------------------------------------


def growth_rows(cells: Cells, rule: str, space: str) -> list[tuple[int, Row, dict[float, float]]]:
    """(number of domains, the learned cell, accuracy of fixed weights) in order."""
    found = []
    for row in cells.find(how="learned", rule=rule, space=space, seed=0):
        names = tuple(row["cell"]["domains"])
        fixed = {
            r["cell"]["weight"]: final(r)
            for r in cells.find(how="fixed", rule=rule, space=space, seed=0, domains=names)
        }
        found.append((len(names), row, fixed))
    return sorted(found, key=lambda item: item[0])


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Least squares: slope, intercept, and R^2 (nan for fewer than three points or a flat line)."""
    n = len(x)
    mx, my = sum(x) / n, sum(y) / n
    sxx = sum((a - mx) ** 2 for a in x)
    syy = sum((b - my) ** 2 for b in y)
    if n < 3 or not sxx or not syy:
        return math.nan, my, math.nan
    sxy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return sxy / sxx, my - sxy / sxx * mx, sxy**2 / (sxx * syy)


QUANTITIES = {
    "making the terms, s": lambda r: r["seconds"]["terms"],
    "learning, s": lambda r: r["seconds"]["learn"],
    "setting the merge, s": lambda r: r["seconds"]["set"],
    "terms, MB": lambda r: r["terms"] / 1e6,
    "peak GPU memory, MB": lambda r: r.get("memory", math.nan) / 1e6,
}


def growth(cells: Cells) -> list[str]:
    lines: list[str] = []
    for rule, space in CHOSEN:
        rows = growth_rows(cells, rule, space)
        if len(rows) < 2:
            continue
        shown = []
        for n, row, fixed in rows:
            low, high = min(row["weights"].values()), max(row["weights"].values())
            uniform = next((v for w, v in fixed.items() if abs(w - 1 / n) < 1e-3), math.nan)
            known = (final(row), fixed.get(1.0, math.nan), uniform)
            scores = ["" if math.isnan(v) else f"{100 * v:.1f}" for v in known]
            costs = ["" if math.isnan(f(row)) else f"{f(row):.3g}" for f in QUANTITIES.values()]
            shown.append([str(n), *costs, *scores, f"{low:.2f} to {high:.2f}", f"{row['moved']:.2f}"])
        fits = []
        for name, f in QUANTITIES.items():
            slope, _, r2 = line([n for n, _, _ in rows], [f(row) for _, row, _ in rows])
            if not math.isnan(r2):
                fits.append(f"{name}: {slope:.3g} a domain (R² {r2:.3f})")
        heads = ["domains", *QUANTITIES, "learned, %", "W=1, %", "1/N, %", "coefficients", "moved"]
        lines += [
            f"{title(rule, space)} space, learned by adapter, one row a class, b_max = 3:",
            "",
            *table(heads, shown),
        ]
        lines += [f"Straight lines: {'; '.join(fits)}.", ""] if fits else []
    return lines
