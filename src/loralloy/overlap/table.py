"""Overlap in the terminal: one table of adapters, pairwise matrices, one table of groups, and what the numbers say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .measure import By, Overlap
from .verdict import ALIGNED, OPPOSED, ORTHOGONAL, SHARED, candidates, max_rank, span, verdict

WIDEST = 12  # adapters whose matrices fit beside their names
PAIRS = 12  # pairs listed where matrices do not fit


def tables(found: Overlap, by: By = "layer") -> Iterator[Any]:
    """Everything that `loralloy inspect A B ...` prints, in order."""
    yield _adapters(found)
    n = len(found.names)
    if n == 2:
        yield _pair(found)
    elif n <= WIDEST:
        yield from _matrices(found)
    else:
        yield _pairs(found)
    yield _groups(found, by)
    yield _words(found)


def _table(title: str, *headings: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, title=Text(title), title_justify="left", title_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right", no_wrap=True)
    return table


def number(value: float | Tensor, digits: int = 3) -> str:
    """A number, or a dash where it is undefined."""
    value = float(value)
    return "–" if value != value else f"{value:.{digits}f}"


def _times(value: float | Tensor, chance: float | Tensor) -> str:
    value, chance = float(value), float(chance)
    return f"{value / chance:.1f}" if chance > 0 and value == value else "–"


def _adapters(found: Overlap) -> Table:
    whole = found.all
    table = _table(
        f"adapters (SAR in the uniform merge, and in that merge cut to rank {max_rank(found)})",
        "", "adapter", "modules", "rank", "stable", "SAR", "cut", "norm of dW", "", left=2,
    )  # fmt: skip
    top = float(whole.norm.nan_to_num().max()) or 1.0
    for i, name in enumerate(found.names):
        bar = Text("█" * round(8 * float(whole.norm[i].nan_to_num()) / top), style="cyan", justify="left")
        table.add_row(
            str(i + 1), Text(name, style="bold"), str(found.modules[name]), span(found.ranks[name]),
            number(whole.stable_rank[i], 2), number(whole.sar[i], 2), number(whole.sar_cut[i], 2),
            number(whole.norm[i], 4), bar,
        )  # fmt: skip
    return table


def _pair(found: Overlap) -> Table:
    whole = found.all
    table = _table("overlap of the two", "measure", "value", "chance", "times chance")
    table.add_row("cosine of dW", number(whole.cosine[0, 1]), "0", "")
    for side, what in (("out", "output directions shared"), ("in", "input directions shared")):
        for weighted, how in ((True, ""), (False, ", unweighted")):
            value, chance = whole.alignment(side, weighted)[0, 1], whole.chance(side, weighted)[0, 1]
            table.add_row(what + how, number(value), number(chance, 4), _times(value, chance))
    for weighted, how in ((True, "by magnitude"), (False, "by count")):
        table.add_row(f"sign conflict {how}", _with_error(found, weighted), "0.5", "")
    return table


def _with_error(found: Overlap, weighted: bool) -> str:
    error = float(found.all.sign_error(weighted)[0, 1])
    said = number(found.all.sign_conflict(weighted)[0, 1])
    return f"{said} ± {error:.4f}" if error > 0 else said


def _style(value: float, kind: str) -> str:
    if kind == "sign conflict":
        return "red bold" if value >= OPPOSED else "" if value < 0.45 else "dim"
    if kind == "cosine":
        return (
            "cyan bold"
            if value >= ALIGNED
            else "red bold"
            if value <= -ORTHOGONAL
            else "dim"
            if value < ORTHOGONAL
            else ""
        )
    return "cyan bold" if value >= SHARED else "dim" if value < SHARED / 2 else ""


def _matrices(found: Overlap) -> Iterator[Table]:

    whole, n = found.all, len(found.names)
    for kind, title, values in (
        ("cosine", "cosine of dW (chance 0)", whole.cosine),
        ("out", f"output directions shared ({_chance(found, 'out')})", whole.alignment("out")),
        ("in", f"input directions shared ({_chance(found, 'in')})", whole.alignment("in")),
        ("sign conflict", "sign conflict by magnitude (chance 0.5)", whole.sign_conflict()),
    ):
        table = _table(title, "", "", *(str(j + 1) for j in range(n - 1)), left=2)
        for i, name in enumerate(found.names):
            row = [Text(number(values[i, j], 2), style=_style(float(values[i, j]), kind)) for j in range(i)]
            table.add_row(str(i + 1), Text(name, style="bold"), *row)
        yield table


def _chance(found: Overlap, side: str) -> str:
    values = _defined(found.all.chance(side))
    return f"chance {span([float(f'{v:.2g}') for v in values])}" if values else "undefined"


def _defined(matrix: Tensor) -> list[float]:
    """The values above the diagonal that are defined."""
    row, column = torch.triu_indices(matrix.shape[0], matrix.shape[1], 1)
    return [v for v in matrix[row, column].tolist() if v == v]


def _pairs(found: Overlap) -> Table:
    whole = found.all
    order = sorted(combinations(range(len(found.names)), 2), key=lambda p: -float(whole.cosine[p].nan_to_num().abs()))
    table = _table(
        f"the {min(PAIRS, len(order))} pairs of largest |cosine|, of {len(order)} (all with --json and --plot)",
        "pair", "", "cosine", "outputs", "inputs", "sign conflict", left=2,
    )  # fmt: skip
    for p in order[:PAIRS]:
        values = (whole.cosine, whole.alignment("out"), whole.alignment("in"), whole.sign_conflict())
        table.add_row(found.names[p[0]], found.names[p[1]], *(number(v[p], 2) for v in values))
    return table


def _groups(found: Overlap, by: By) -> Table:
    two = len(found.names) == 2
    table = _table(
        f"by {by}" + ("" if two else ": mean over pairs, and the largest cosine"),
        by, "cosine", *([] if two else ["largest"]), "outputs", "x chance", "inputs", "x chance", "conflict", "SAR, cut",
    )  # fmt: skip
    for group in [*found.groups(by), found.all]:
        cosine = _defined(group.cosine)
        row = [number(_mean(cosine))] + ([] if two else [number(max(cosine, default=math.nan))])
        for side in ("out", "in"):
            value, chance = _mean(_defined(group.alignment(side))), _mean(_defined(group.chance(side)))
            row += [number(value), _times(value, chance)]
        row += [number(_mean(_defined(group.sign_conflict()))), number(group.sar_cut.nanmean(), 2)]
        table.add_row(Text(str(group.name)), *row, style="bold" if group is found.all else None)
    return table


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _words(found: Overlap) -> Lines:
    remarks = verdict(found)
    lines = Table.grid(padding=(0, 1))
    for remark in remarks:
        lines.add_row("-", Text(remark.text))
    parts: list[Any] = [Text("what the numbers say", style="bold"), lines]
    rules = candidates(remarks)
    if rules:
        parts.append(Text(f"candidates to compare: {', '.join(rules)}"))
    if found.sampled:
        worst = max(_defined(found.all.sign_error()), default=0.0)
        parts.append(
            Text(
                f"signs: {len(found.sampled)} of {len(found.parts)} modules have more than {found.exact_entries:,} entries and "
                f"were sampled by rows (seed {found.seed}); standard error at most {worst:.1g}"
            )
        )
    return Lines(*parts)
