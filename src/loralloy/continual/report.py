"""The report of a stream: tables on the terminal, the same as Markdown with plots, all figures as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..atomic import atomic_file
from .results import LEARNING, Mean, Results, RunResult

REPORT, FIGURES = "report.md", "results.json"
_WIDE = 8  # domains; more of them do not fit a table


def write_report(results: Results) -> Path:
    """Write ``report.md``, ``results.json`` and, where matplotlib is installed, ``plots/*.png`` into the run's folder."""
    from .plots import draw

    atomic_file(results.folder / FIGURES, json.dumps(results.to_dict(), indent=1) + "\n")
    pictures = draw(results)
    for name, picture in pictures.items():
        atomic_file(results.folder / "plots" / f"{name}.png", picture)
    path = results.folder / REPORT
    atomic_file(path, markdown(results, list(pictures)))
    return path


Table = tuple[str, list[str], list[list[str]]]
"""Title, heads, rows."""


def tables(results: Results, short: bool = False) -> list[Table]:
    """All tables of a report, in order; those for which there is nothing are left out.

    short: coefficients by experience of the first learned strategy of each merge alone.
    """
    found = [final_table(results), metrics_table(results), controls_table(results)]
    runs = poster_runs(results)
    if short:
        first = {run.merge: run for run in reversed(runs) if run.kind == "learned"}
        runs = [run for run in runs if first.get(run.merge) is run]
    found += [experience_table(run) for run in runs] + [costs_table(results)]
    return [table for table in found if table[2]]


def final_table(results: Results) -> Table:
    """Final average accuracy, strategies by merge."""
    merges = [m for m in results.merges if m]
    alone = [s for s in results.strategies if results.of("", s)]
    mixed = [s for s in results.strategies if s not in alone]
    rows = [[s, *(_percent(results.mean(m, s)) if results.of(m, s) else "" for m in merges)] for s in mixed]
    rows += [[s, _percent(results.mean("", s)), *[""] * (len(merges) - 1)] for s in alone]
    if results.runs and merges and (base := _base(results)) is not None:
        rows.append(["base model", f"{100 * base:.1f}", *[""] * (len(merges) - 1)])
    return "Final average accuracy, %" + _over(results), ["strategy", *(merges or ["accuracy"])], rows


def _base(results: Results) -> float | None:
    values = [x for run in results.runs for x in run.base if x is not None]
    return sum(values) / len(values) if values else None


def _over(results: Results) -> str:
    seeds, orders = {run.seed for run in results.runs}, {run.order for run in results.runs}
    said = f"mean over {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    said += f" (of the mean over {len(orders)} orders)" if len(orders) > 1 else ", one order"
    return f" ({said}{', ± standard deviation over seeds' if len(seeds) > 1 else ''})"


def metrics_table(results: Results) -> Table:
    """Every metric of every strategy and merge."""
    heads = ["merge", "strategy", "final", "incremental", "forgetting", "backward", "forward", "cut", "uncut final"]
    names = ("final_accuracy", "incremental_accuracy", "forgetting", "backward_transfer", "forward_transfer")
    rows = []
    for merge, strategy in dict.fromkeys((run.merge, run.strategy) for run in results.runs):
        signed = [_percent(results.mean(merge, strategy, name), i > 2) for i, name in enumerate(names)]
        cut, uncut = (results.mean(merge, strategy, name).value for name in ("cut", "uncut"))
        said = "" if math.isnan(cut) else f"{cut:.3f}"
        rows.append([merge or "-", strategy, *signed, said, "" if math.isnan(uncut) else f"{100 * uncut:.1f}"])
    for column in range(len(heads) - 1, 1, -1):  # what nothing was measured for
        if all(not row[column] for row in rows):
            heads.pop(column)
            for row in rows:
                row.pop(column)
    return "Metrics, % (cut: relative error of the cut to the merged adapter's rank)" + _over(results), heads, rows


def controls_table(results: Results) -> Table:
    """Learned strategies against their controls: the same weight fixed, 1/N, and the best fixed weight in hindsight."""
    heads = ["merge", "strategy", "against", "difference, points (95 % t interval over seeds)", "within its range"]
    rows = []
    for merge, strategy in dict.fromkeys((run.merge, run.strategy) for run in results.runs):
        run = results.of(merge, strategy)[0]
        if run.kind not in LEARNING:
            continue
        b_max = run.settings.get("b_max")
        for other, what in _controls(results, merge, b_max):
            weight = results.of(merge, other)[0].settings.get("weight")
            inside = "" if b_max is None or weight is None else ("yes" if weight < b_max else f"no: W >= {b_max:g}")
            rows.append([merge, strategy, what, _points(results.difference((merge, strategy), (merge, other))), inside])
    return "Against the controls", heads, rows


def _controls(results: Results, merge: str, b_max: float | None) -> list[tuple[str, str]]:
    found = []
    fixed = {r.settings["weight"]: r.strategy for r in results.runs if r.merge == merge and r.kind == "fixed"}
    if b_max is not None and (1 + b_max) / 4 in fixed:
        found.append((fixed[(1 + b_max) / 4], f"fixed W = alpha_0 = {(1 + b_max) / 4:g}"))
    uniform = next((r.strategy for r in results.runs if r.merge == merge and r.kind == "uniform"), None)
    found += [(uniform, "uniform 1/N")] if uniform else []
    best = results.best_fixed(merge)
    if best is not None and len(fixed) > 1:
        weight = results.of(merge, best)[0].settings["weight"]
        found.append((best, f"best of {len(fixed)} fixed W in hindsight: {weight:g}"))
    return found


def poster_runs(results: Results) -> list[RunResult]:
    """One run a merge and learning strategy: the first seed and order, evaluated after every experience."""
    found: dict[tuple[str, str], RunResult] = {}
    for run in results.runs:
        complete = all(run.weights) and len(run.order) <= _WIDE
        if run.kind in LEARNING and complete:
            found.setdefault((run.merge, run.strategy), run)
    return list(found.values())


def experience_table(run: RunResult) -> Table:
    """The poster's table: weights and accuracies of each domain after each experience."""
    names = list(dict.fromkeys(name for weights in run.weights for name in weights))
    heads = ["experience", *(f"w {name}" for name in names), *(f"{name}, %" for name in run.order)]
    rows = []
    for t, weights in enumerate(run.weights):
        shown = [f"{weights[name]:.3f}" if name in weights else "" for name in names]
        accuracy = [_cell(run.matrix[t][j], j <= t) for j in range(len(run.order))]
        rows.append([f"{t + 1} {run.order[t]}", *shown, *accuracy])
    title = f"Coefficients and accuracy by experience: {run.merge}, {run.strategy}, seed {run.seed}"
    return f"{title} (in brackets: domains still to come)", heads, rows


def costs_table(results: Results) -> Table:
    """What an experience costs as adapters grow in number: medians over the learned strategies' runs."""
    heads = [
        "experience",
        "adapters",
        "learn, s",
        "merge, s",
        "evaluate, s",
        "adapters on disk, MiB",
        "peak memory, MiB",
    ]
    rows = []
    steps: dict[int, list[Mapping[str, Any]]] = {}
    for run in results.runs:
        for t, step in enumerate(run.steps, 1):
            if run.kind == "learned" and step:
                steps.setdefault(t, []).append(step)
    for t, found in sorted(steps.items()):
        times = [f"{median(s['seconds'].get(name, 0.0) for s in found):.2f}" for name in ("learn", "merge", "evaluate")]
        sizes = [f"{median(s[name] for s in found) / 2**20:.1f}" for name in ("bytes", "memory")]
        rows.append([str(t), str(len(found[0]["adapters"])), *times, *sizes])
    return (
        "Costs by experience (medians over learned strategies; memory: of the GPU, or of the whole process)",
        heads,
        rows,
    )


def _cell(value: float | None, seen: bool) -> str:
    return "" if value is None else f"{100 * value:.1f}" if seen else f"({100 * value:.1f})"


def _percent(mean: Mean, signed: bool = False) -> str:
    if math.isnan(mean.value):
        return ""
    said = f"{100 * mean.value:{'+' if signed else ''}.1f}"
    return said if math.isnan(mean.deviation) else f"{said} ± {100 * mean.deviation:.1f}"


def _points(mean: Mean) -> str:
    if math.isnan(mean.value):
        return ""
    said = f"{100 * mean.value:+.1f}"
    low, high = (100 * (mean.value + sign * mean.half) for sign in (-1, 1))
    return f"{said} (one seed)" if math.isnan(mean.half) else f"{said} [{low:+.1f}, {high:+.1f}]"


def print_tables(results: Results) -> None:
    """All tables on stdout."""
    from rich.table import Table as Grid
    from rich.text import Text

    from ..console import out

    for title, heads, rows in tables(results, short=True):
        grid = Grid(box=None, pad_edge=False, header_style="dim")
        left = 1 if heads[0] == "strategy" or heads[0] == "experience" else 2
        for n, head in enumerate(heads):
            grid.add_column(Text(head), justify="left" if n < left else "right", overflow="fold")
        for row in rows:
            grid.add_row(*map(Text, row))
        out.print(Text(title, style="bold"), soft_wrap=True)
        out.print(grid)
        out.print()
    if results.missing:
        out.print(f"{results.missing} runs are not finished; the same `loralloy continual run` goes on with them")


def markdown(results: Results, pictures: Sequence[str] = ()) -> str:
    """The report's text; `pictures` are the names of the plots beside it."""
    plan: Mapping[str, Any] = results.plan
    lines = [
        f"# {plan['title'] or 'A stream of ' + str(len(plan['experiences'])) + ' domains'}", "",
        f"Domains: {', '.join(plan['experiences'])}. Made by `loralloy continual run` (loralloy {plan['loralloy']}); metrics are "
        "defined in docs/continual.md.", "",
    ]  # fmt: skip
    if results.missing:
        lines += [f"**{results.missing} runs are not finished.**", ""]
    for title, heads, rows in tables(results):
        lines += [f"## {title}", "", _line(heads), _line(["---"] * len(heads)), *map(_line, rows), ""]
    lines += [line for name in pictures for line in (f"![{name}](plots/{name}.png)", "")]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
