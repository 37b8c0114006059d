"""Sections of the report's page: retrieval quality, error analysis, efficiency, the case study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import Block, Fold, Heading, Items, Text, table
from .routes import METRICS
from .wording import MISSING, mean_sd, names, number, percent, share, signed, size


def routing(summary: Mapping[str, Any]) -> list[Block]:
    rows = summary["routing"]
    if not rows:
        return []
    heads = ["weigher", "query", "seeds", "own top-1, %", "on own, %", "entropy, nats", "adapters used", "to base, %"]

    def cells(found: Mapping[str, Any]) -> list[str]:
        return [
            mean_sd(found["top1"], 100, 1), mean_sd(found["own"], 100, 1), mean_sd(found["entropy"]),
            mean_sd(found["used"], 1, 1), mean_sd(found["base"], 100, 1),
        ]  # fmt: skip

    top = [[r["weigher"], r["query"], str(len(r["seeds"])), *cells(r["all"])] for r in rows]
    made: list[Block] = [
        Heading("Retrieval quality"),
        Text(
            "In domain: is the query's own task found, and how much weight does it get? Mean over tasks, ± the "
            "standard deviation between seeds of the index. "
            + "; ".join(
                f"{name}: {METRICS[key]}" for name, key in (("top-1", "top1"), ("used", "used"), ("to base", "base"))
            )
            + ". Query `prompt`: the method reads the prompt, which holds the hint."
        ),
        table(heads, top, left=2),
    ]
    for r in rows:
        made.append(_by_task(r, heads, cells))
    settings: list[str] = []
    for r in rows:
        if (chosen := r["settings"]) and r["router"] != "paper" and not r["falls_back"]:
            said = ", ".join(
                f"{k} {_short(v)}" for k, v in chosen.items() if k not in ("router", "leave-one-out chose")
            )
            settings += [f"{r['weigher']}, {r['query']} query, on the first seed's index: {said}."] if said else []
    made += [Items(tuple(settings))] if settings else []
    overlaps = [
        r for r in rows if r["query"] == "raw" and r["router"] and not r["falls_back"] and r["overlaps"]["pairs"]
    ]
    items: list[str] = []
    for r in overlaps:
        stays = r["overlaps"]["in_family"]
        said = f"{r['weigher']}, raw query: of the weight on other tasks {share(stays)} stays in the query's family; "
        said += "most goes from "
        said += "; ".join(f"{p['task']} to {p['other']} ({share(p['mass'])})" for p in r["overlaps"]["pairs"][:8])
        items.append(said + ".")
    return [*made, Items(tuple(items))] if items else made


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _by_task(row: Mapping[str, Any], heads: Sequence[str], cells: Any) -> Block:
    body = [[task, *cells(found)] for task, found in row["by_task"].items()]
    body += [[task, *([MISSING] * 5)] for task in row["missing"]]
    return Fold(f"By task: {row['weigher']}, {row['query']} query", (table(["task", *heads[3:]], body),))


def mistakes(found: Mapping[str, Any]) -> list[Block]:
    if not found:
        return []
    types = found["types"]
    legend = [[t["heading"], t["rule"], str(t["rows"]), str(t["tasks"])] for t in types]
    rows = []
    for m in found["methods"]:
        cells = []
        for t in types:
            r = m["types"][t["name"]]
            cells.append(MISSING if r["with"] is None else f"{percent(r['with'])} / {percent(r['without'])}")
        rows.append([m["heading"], *cells])
    inside = [[m["heading"], *(signed(m["types"][t["name"]]["within"]) for t in types)] for m in found["methods"]]
    used = {t["heading"]: max((m["types"][t["name"]]["tasks"] for m in found["methods"]), default=0) for t in types}
    heads = ["method", *(t["heading"] for t in types)]
    caught = Text(
        "The paper's six types were annotated by hand on wrong answers of four data sets. Here a rule tags every "
        f"row, right or wrong, of {found['rows']:,} ({found['untagged']:,} have no type; {found['overridden']:,} "
        "are tagged by the reader's file). Rules find words and forms, not causes: a negation that does not "
        "matter is tagged as one that does, a story without the listed words is missed, commonsense is a whole "
        "family. Tags of one's own go into a CSV (`id,tag`), see `loralloy report --tags`."
    )
    return [
        Heading("Error analysis"),
        caught,
        table(["type", "rule", "rows", "tasks"], legend, left=2),
        table(
            heads, rows,
            caption="Error rate with the type / without it, over all rows, in domain. It mixes the type with how hard its tasks "
            "are.",
        ),
        table(
            heads, inside,
            caption="The same within tasks: error with the type minus error without it, in points [95 %], over tasks that have "
            "at least 5 rows of both (" + ", ".join(f"{name}: {n}" for name, n in used.items()) + ").",
        ),
    ]  # fmt: skip


def costs(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    if not rows:
        return []
    devices = sorted({d for r in rows for d in r["devices"]})
    body = [
        [
            r["heading"], r["space"], _how(r), number(r["ms"]["weigh"]), number(r["ms"]["compose"]), number(r["ms"]["answer"]),
            number(r["merge_ms"], 1), f"{r['merges']:,}" if r["merges"] else MISSING,
            share(r["hit_rate"]), share(r["reused"]), size(r["adapter_bytes"]), size(r["peak_bytes"]), size(r["added_bytes"]),
            number(r["answers_a_second"], 1),
        ]
        for r in rows
    ]  # fmt: skip
    heads = [
        "method", "space", "rule, rank", "weigh, ms", "compose, ms", "answer, ms", "a merge, ms", "merges",
        "cache hits", "reused", "bytes", "peak memory", "added", "answers/s",
    ]  # fmt: skip
    said = Text(
        f"Over all cells of a method, on {names(devices) or 'no device'}. ms: a row, in batches; a row is scored "
        "against all of its options. Weigh is without embedding. A merge: seconds of composing over merges that were "
        "made (weights are rounded to a step, equal ones are merged once). Reused: rows that the same process had "
        "answered before under the same composition; they count in no time of composing and answering. Bytes: of a "
        "merged adapter in the bank's dtype; live composition merges nothing. Added: the largest peak of a cell over "
        "what was on the GPU before it (model, adapters, cached merges). Cells ran side by side on one device, so "
        "times compare methods; they are no times of a machine of one's own."
    )
    return [Heading("Efficiency"), said, table(heads, body, left=3)]


def _how(row: Mapping[str, Any]) -> str:
    parts = [part for part in (row.get("parameters", row["rule"]), row["rank"]) if part != "-"]
    return ", ".join(parts) or MISSING


def case(found: Mapping[str, Any] | None) -> list[Block]:
    if not found:
        return []
    made: list[Block] = [
        Heading("Case study: where can I buy a tennis ball?"),
        Text(
            f"The paper's question, in the form of `{found['task']}`, with {found['model']} in "
            f"{found['dtype'].removeprefix('torch.')} and the index of seed {found['seed']}. Scores are "
            "log-likelihoods of whole options in nats; the choice is the largest. One question shows how the "
            "parts work together; it is no evidence for a rule."
        ),
    ]
    weights = found["forms"][0]["weights"]
    made.append(
        table(
            ["weigher", "query", "weights"],
            [[w["weigher"], w["query"], ", ".join(f"{n} {v:.3f}" for n, v in w["weights"].items())] for w in weights], left=3,
        )
    )  # fmt: skip
    words = {
        "paper": "The paper's two options (the first is right)",
        "ours": "In CommonsenseQA's form; these five options are ours, not the paper's (the first is meant)",
    }
    for form in found["forms"]:
        # long options get a letter each, said above the table
        short = {o: o if max(map(len, form["options"])) <= 20 else "ABCDEFGH"[i] for i, o in enumerate(form["options"])}
        rows = [
            [
                s["heading"],
                s["space"],
                _how(s),
                s["query"] or "any",
                _choice(s, short),
                *(f"{v:.2f}" for v in s["scores"]),
            ]
            for s in form["strategies"]
        ]
        right = sum(s["choice"] == form["answer"] for s in form["strategies"])
        title = f"{words[form['name']]}: {right} of {len(rows)} choose it"
        if any(o != s for o, s in short.items()):
            title += ". " + " ".join(f"{s}: {o}" for o, s in short.items())
        heads = ["strategy", "space", "rule, rank", "query", "choice", *short.values()]
        made += [Text(title), table(heads, rows, left=5)]
    return made


def _choice(row: Mapping[str, Any], short: Mapping[str, str]) -> str:
    other = "" if row["per_byte"] == row["choice"] else f" (per byte: {short[row['per_byte']]})"
    return short[row["choice"]] + other
