"""What the table is asked, what was measured, and whether the figure is reached: every word of it from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...merging import RULES
from .wording import names, percent, points, share

MARGIN = -0.02
HINTED = {"top1": 0.97, "own": 0.90}
RAW = {"top1": 0.88, "own": 0.82}
AIM = 0.92
BEST = "best average, or who wins"
CLASSIC = ("linear", "cat", "ties", "magnitude_prune", "dare_linear", "dare_ties", "svd")


class Answer(NamedTuple):
    """One line: `reached` is "yes", "no", "-" (not measured) or "no figure"."""

    question: str
    asked: str
    measured: str
    reached: str


def answers(summary: Mapping[str, Any]) -> list[Answer]:
    """The questions of the retrieval paper's replication, answered from a report's summary."""
    found = [*_routing(summary["routing"])]
    for found_own in summary["against_own"]:
        found.append(_own(found_own))
    for protocol in summary["protocols"]:
        if protocol["scope"] == "in_domain":
            found += _best(protocol)
    for protocol in summary["protocols"]:
        if protocol["scope"] == "leave_own_out":
            found += _unseen(protocol)
    return found + _controls(summary["controls"]) + [_rules(summary["protocols"])]


def _routing(rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
    found = []
    for row in rows:
        if row["router"] is None or row["falls_back"]:
            continue
        paper = row["router"] == "paper"
        bar = HINTED if row["query"] == "hinted" else RAW
        values = {name: row["all"][name]["mean"] for name in bar}
        asked = f"top-1 at least {share(bar['top1'])}, on own at least {share(bar['own'])}"
        if paper and row["query"] == "raw":
            bar, asked = {}, "as it is"
        elif row["query"] == "raw":
            asked += f"; aim: top-1 {share(AIM)}"
        reached = "yes" if all(values[name] >= bar[name] for name in bar) else "no"
        words = f"top-1 {share(values['top1'])}, on own {share(values['own'])}"
        if bar is RAW:
            words += f" (aim {'reached' if values['top1'] >= AIM else 'missed'})"
        found.append(
            Answer(f"routing, {row['query']} query: {row['weigher']}", asked, words, reached if bar else "no figure")
        )
    return found


def _own(found: Mapping[str, Any]) -> Answer:
    d = found["overall"]
    rows = found["tasks"]
    words = f"{points(d)} over {len(rows)} tasks"
    for side in ("better", "worse"):
        if found[side]:
            strong = [t for t in found[side] if t in found["holm"]]
            words += f"; {side}: {names(found[side], 40)}"
            words += f" (after Holm: {names(strong, 40) or 'none'})"
    if not found["better"] and not found["worse"]:
        words += "; no task with an interval that excludes 0"
    reached = "yes" if d["low"] >= MARGIN else "no"
    if reached == "no" and d["value"] >= MARGIN:
        words += "; the mean is within 2 points, the interval is not"
    return Answer(
        f"{found['heading']} against perfect selection, {found['query']} query", "not worse by more than 2 points (95 %)",
        words, reached,
    )  # fmt: skip


def _best(protocol: Mapping[str, Any]) -> list[Answer]:
    """Routed Linear against trained routers and fixed compositions, by average; and who wins where it does not."""
    found = []
    for lead in protocol["leads"]:
        question = (
            f"{lead['heading']} against trained routers, Fusion, Mixture, SMEAR, multi-task, {protocol['query']} query"
        )
        rivals = lead["rivals"]
        if not rivals:
            found.append(Answer(question, BEST, "-", "-"))
            continue
        said = [f"{r['heading']} {percent(r['average'])} (difference {points(r['difference'])})" for r in rivals]
        words = f"{percent(lead['average'])}; {'ahead of it' if lead['ahead'] else 'the next'}: {'; '.join(said)}"
        if lead["ahead"]:
            gains = ", ".join(f"{t} ({100 * v:+.0f})" for t, v in rivals[0]["gains"].items())
            words += f". {rivals[0]['heading']} gains most on {gains}"
        missing = protocol["rivals_missing"]
        words += f". Not in this comparison: {', '.join(missing)}" if missing else ""
        verdict = "no" if lead["ahead"] else "yes, of those run" if missing else "yes"
        found.append(Answer(question, BEST, words, verdict))
    return found


def _unseen(protocol: Mapping[str, Any]) -> list[Answer]:
    found = []
    rows = [r for r in protocol["rows"] if r["linear"]]
    for row in rows:
        question = f"own task left out, {protocol['query']} query: {row['heading']} against the base model"
        delta = row["difference"].get("base")
        if delta is None:
            found.append(Answer(question, "better on average", "-", "-"))
            continue
        words = points(delta)
        if uniform := row["difference"].get("uniform"):
            words += f"; against uniform {points(uniform)}"
        found.append(Answer(question, "better on average", words, "yes" if delta["low"] > 0 else "no"))
    return found


def _controls(rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
    found = []
    for control in dict.fromkeys(row["control"] for row in rows):
        mine = [r for r in rows if r["control"] == control]
        parts = [
            f"{r['query']}, {r['scope'].replace('_', ' ')}: {points(r['difference']) if r['difference'] else '-'}"
            for r in mine
        ]
        question = f"does it matter whose weights a query gets? routed minus {mine[0]['heading']}"
        found.append(
            Answer(question, "stated", "; ".join(parts), "no figure" if any(r["difference"] for r in mine) else "-")
        )
    return found


def _rules(protocols: Sequence[Mapping[str, Any]]) -> Answer:
    """Which rules stand in the in-domain tables."""
    there: dict[str, set[str]] = {}
    for protocol in protocols:
        for row in protocol["rows"] if protocol["scope"] == "in_domain" else ():
            rule = row["rule"].split("(")[0]
            if row["kind"] == "routed" and row["average"] and rule in RULES:
                there.setdefault(rule, set()).add(row["space"])
    # TIES or another classic rule in a space of part 2 is one of its newer rules
    newer = [r for r in there if r not in CLASSIC]
    newer += [f"{r} in {s} space" for r in there if r in CLASSIC for s in there[r] if s not in ("delta", "factors")]
    paper = [r for r in ("ties", "cat", "magnitude_prune") if r in there]
    words = f"the paper's: {names(paper) or 'none'}; newer: {names(newer) or 'none'}"
    return Answer(
        "TIES, Cat, Magnitude prune, and three newer rules", "in the same table", words,
        "yes" if len(paper) == 3 and len(newer) >= 3 else "no",
    )  # fmt: skip
