"""Table 3: methods by tasks under each protocol, their averages, and paired differences."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from ...stats import Difference
from ..suite.method import Method, Query, Scope
from ..suite.results import Key
from .evidence import TOLD, Evidence, is_linear

Advance = Callable[[], None]


def protocols(evidence: Evidence) -> list[tuple[Query, Scope]]:
    """The suite's (query, scope), in-domain first."""
    fields = evidence.suite.fields
    scopes = sorted(fields.scopes, key=lambda scope: scope != "in_domain")
    return [(query, scope) for scope in scopes for query in fields.queries]


RIVALS = ("moe", "smear", "arrow", "logo", "fusion", "mixture", "adapter_soup", "multitask")


def table(evidence: Evidence, query: Query, scope: Scope, advance: Advance | None = None) -> dict[str, Any]:
    """One protocol's rows: a method the suite runs under it, with its average (None where cells are missing).

    `leads`: for each routed Linear the rivals with a higher average, else the next below, with the paired difference.
    """
    rows = []
    linear = next(iter(evidence.linear()), None)
    against = {"linear": linear} | ({"perfect": evidence.first("perfect")} if scope == "in_domain" else {})
    if scope == "leave_own_out":
        against |= {"base": evidence.first("base"), "uniform": evidence.first("uniform")}
    for method in evidence.methods:
        if plans := evidence.plans(method, query, scope):
            rows.append(_row(evidence, method, query, scope, len(plans), against))
        if advance:
            advance()
    full = max((row["rows_a_task"][0] for row in rows if row["rows_a_task"]), default=0)
    for row in rows:
        row["same_rows"] = bool(row["rows_a_task"]) and row["rows_a_task"][0] >= full
    free = [r for r in rows if r["average"] and r["same_rows"] and r["kind"] not in TOLD]
    best = max(free, key=lambda r: r["average"]["value"], default=None)
    return {
        "query": query, "scope": scope, "rows": rows, "best": best and best["method"],
        "against": {name: m.name for name, m in against.items() if m},
        "leads": _leads(evidence, query, scope, free),
        "rivals_missing": [r["heading"] for r in rows if r["kind"] in RIVALS and not (r["average"] and r["same_rows"])],
        "not_run": [m.title() for m in evidence.methods if not evidence.plans(m, query, scope)],
    }  # fmt: skip


def _leads(evidence: Evidence, query: Query, scope: Scope, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    methods = {m.name: m for m in evidence.methods}
    rivals = sorted((r for r in rows if r["kind"] in RIVALS), key=lambda r: -r["average"]["value"])
    for row in (r for r in rows if r["linear"]):
        ahead = [r for r in rivals if r["average"]["value"] > row["average"]["value"]]
        own = evidence.key(methods[row["method"]], query, scope)
        named: list[dict[str, Any]] = []
        for r in ahead or rivals[:1]:
            delta = evidence.difference(evidence.key(methods[r["method"]], query, scope), own)
            gains = {t: r["by_task"][t] - v for t, v in row["by_task"].items() if t in r["by_task"]}
            top = sorted(gains, key=lambda t: -gains[t])[:3]
            named.append(
                {
                    "heading": r["heading"], "average": r["average"]["value"], "difference": delta and plain(delta),
                    "gains": {t: gains[t] for t in top},
                },
            )  # fmt: skip
        found.append(
            {"heading": row["heading"], "average": row["average"]["value"], "ahead": bool(ahead), "rivals": named}
        )
    return found


def _row(
    evidence: Evidence, method: Method, query: Query, scope: Scope, plans: int, against: dict[str, Method | None]
) -> dict[str, Any]:
    found = evidence.results.find(method.name, query, scope)
    key = evidence.key(method, query, scope)
    row: dict[str, Any] = {
        "method": method.name, "heading": method.title(), "kind": method.kind, "source": method.source,
        "space": method.space, "rule": method.rule,
        "parameters": parameters(method),
        "linear": is_linear(method), "rank": method.rank,
        "depends_on_query": "query" in method.depends,
        "depends_on_seed": "seed" in method.depends,
        "planned": plans, "found": len(evidence.results.of(found)) if found else 0,
        "rows_a_task": None, "n": 0, "average": None, "seed_deviation": None, "by_family": {}, "by_task": {},
        "difference": {},
    }  # fmt: skip
    if found is not None:
        row["by_task"] = evidence.results.by_task(found)
        sizes = [len(rows) for rows in evidence.results.scores(found).values()]
        row["rows_a_task"], row["n"] = [max(sizes), min(sizes)], sum(sizes)
    if key is None:
        return row
    row["average"] = plain(evidence.average(key))
    row["seed_deviation"] = evidence.seed_deviation(key)
    row["by_family"] = {f: fmean(row["by_task"][t] for t in tasks) for f, tasks in evidence.families.items()}
    for name, other in against.items():
        if (delta := evidence.difference(key, evidence.key(other, query, scope))) is not None:
            row["difference"][name] = plain(delta)
    return row


def parameters(method: Method) -> str:
    """The rule with the parameters that the suite sets; its defaults are in docs/merging.md."""
    rule = method.settings.get("rule")
    if not isinstance(rule, dict):
        return method.rule
    given = ", ".join(f"{name} {value}" for name, value in rule.items() if name != "name" and value is not None)
    return f"{rule['name']} ({given})" if given else str(rule["name"])


def plain(found: Difference) -> dict[str, float | int]:
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n}


def against_own(evidence: Evidence, method: Method, query: Query) -> dict[str, Any] | None:
    """A routed method against the task's own adapter, task by task, beside majority and base; None without both.

    `better`, `worse`: tasks whose 95 % interval excludes 0; `holm`: those that stay so when p is adjusted for all tasks.
    """
    keys: dict[str, Key | None] = {
        name: evidence.key(m, query, "in_domain")
        for name, m in (
            ("majority", evidence.first("majority")), ("base", evidence.first("base")),
            ("perfect", evidence.first("perfect")), ("routed", method),
        )
    }  # fmt: skip
    own, routed = keys["perfect"], keys["routed"]
    if own is None or routed is None:
        return None
    means = {name: evidence.results.by_task(key) for name, key in keys.items() if key}
    rows: dict[str, dict[str, Any]] = {}
    for task, found in evidence.by_task(routed, own).items():
        d = found.difference
        rows[task] = {
            "family": evidence.tasks[task].family,
            **{name: by_task[task] for name, by_task in means.items()},
            "difference": plain(d), "p": found.p, "p_holm": found.p_holm,
        }  # fmt: skip
    better = [t for t, r in rows.items() if r["difference"]["low"] > 0]
    worse = [t for t, r in rows.items() if r["difference"]["high"] < 0]
    return {
        "method": method.name, "heading": method.title(), "query": query, "tasks": rows, "better": better, "worse": worse,
        "holm": [t for t in better + worse if rows[t]["p_holm"] < 0.05],
        "overall": plain(evidence.difference(routed, own)) if evidence.difference(routed, own) else None,  # type: ignore[arg-type]
    }  # fmt: skip


def controls(evidence: Evidence) -> list[dict[str, Any]]:
    """Routed composition minus its controls, which differ from it in nothing but whose weights a query gets."""
    rows = []
    for control in evidence.of_kind("task_average", "shuffled"):
        mates = [m for m in evidence.of_kind("routed") if _core(m) == _core(control)]
        if not mates:
            continue
        for query, scope in protocols(evidence):
            if not evidence.plans(control, query, scope):
                continue
            delta = evidence.difference(evidence.key(mates[0], query, scope), evidence.key(control, query, scope))
            rows.append(
                {
                    "control": control.name,
                    "heading": control.title(),
                    "routed": mates[0].name,
                    "query": query,
                    "routed_heading": mates[0].title(),
                    "scope": scope,
                    "difference": plain(delta) if delta else None,
                }
            )
    return rows


def _core(method: Method) -> dict[str, Any]:
    return {k: v for k, v in method.settings.items() if k not in ("kind", "among")}


def metrics(evidence: Evidence, scope: Scope = "in_domain") -> dict[str, Any]:
    """The other metrics: options by log-likelihood per byte, free text by exact match, F1, ROUGE-L and BLEU."""
    from ...errors import LoralloyError

    names = ["accuracy", "accuracy_per_byte", "exact_match", "f1", "rouge_l", "bleu"]
    rows: list[dict[str, Any]] = []
    remark = ""
    for query in evidence.suite.fields.queries:
        for method in evidence.methods:
            key = evidence.key(method, query, scope)
            if (
                key is None
                or not evidence.plans(method, query, scope)
                or (key.query is None and rows_have(rows, method))
            ):
                continue
            values: dict[str, float | None] = {}
            for name in names:
                try:
                    by_task = evidence.results.by_task(key, name)
                except LoralloyError as error:
                    remark, by_task = str(error), {}
                values[name] = fmean(by_task.values()) if by_task else None
            rows.append({"method": method.name, "heading": method.title(), "query": key.query, **values})
    closed = [t.name for t in evidence.tasks.values() if t.labels or t.options is not None]
    return {"rows": rows, "free_text": [t for t in evidence.tasks if t not in closed], "remark": remark}


def rows_have(rows: list[dict[str, Any]], method: Method) -> bool:
    return any(row["method"] == method.name for row in rows)
