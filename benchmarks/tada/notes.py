"""What a page must say of its cells before any table: what is missing, what is of other settings, what was added."""

from __future__ import annotations

import statistics

from designs import COEFFICIENTS
from plan import PARTS, Half, folder, groups
from results import Cells


def unfinished(half: Half, cells: Cells) -> list[str]:
    """What of the plan is not there, by part."""
    have = {
        (r["cell"]["pair"], r["cell"]["seed"], r["cell"]["rank"], r["cell"]["method"], r["cell"]["at"])
        for r in cells.rows
    }
    told = []
    for part, (_, what) in PARTS.items():
        names = [
            c for g in groups(half) if g.part == part and folder(half.name, part).endswith("final") for c in g.cells
        ]
        left = sum((c.pair, c.seed, c.rank, c.method.name, c.at) not in have for c in names)
        if left:
            told.append(f"{what}: {left} of {len(names)} cells")
    return (
        [f"**Unfinished.** Missing are, of {'; of '.join(told)}. Averages over fewer than six pairs say so.", ""]
        if told
        else []
    )


def other_grids(cells: Cells) -> list[str]:
    """Cells of an earlier round stay until they are removed (worker.py tells them): their best is one of other coefficients."""
    among = [r["among"] for r in cells.rows if "among" in r]
    found = {n: among.count(n) for n in sorted(set(among)) if n != len(COEFFICIENTS)}
    if not found:
        return []
    told = " and ".join(f"{count} among {n}" for n, count in found.items())
    return [
        f"**Other coefficients.** Of {len(among)} cells at their best by validation, {told} pairs of coefficients were chosen, "
        f"not among the {len(COEFFICIENTS)} that are tried now.",
        "",
    ]


def balance(cells: Cells) -> list[str]:
    """What the balance is, and how far it went; nothing where no cell has one."""
    tried = [r["balance"] for r in cells.rows if "balance" in r]
    done = [b for b in tried if "reason" not in b]
    if not tried:
        return []
    told = [
        "Balanced answers (`loralloy.weighting.balance`) are an addition of this project, no part of the paper's method, that "
        "other rules can be given too, and they were: all baselines, and the task adapter alone."
    ]
    if done:
        before, after = (statistics.median(b[n] for b in done) for n in ("before", "after"))
        told.append(
            f"The largest shift of an answer fell from {before:.2f} to {after:.2f} nats (medians of {len(done)} cells)."
        )
    if len(done) < len(tried):
        reasons = sorted({b["reason"] for b in tried if "reason" in b})
        told.append(
            f"{len(tried) - len(done)} of {len(tried)} cells are as they were, unbalanced: {'; '.join(reasons)}."
        )
    return [" ".join(told), ""]


def planned(half: Half) -> int:
    """Cells of the final pairs that there are to compute."""
    return sum(len(g.cells) for g in groups(half) if folder(half.name, g.part).endswith("final"))
