"""The report's page as blocks, from its summary alone; `sections.py` has the later sections."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .blocks import Block, Fold, Heading, Items, Picture, Text, table
from .sections import case, costs, mistakes, routing
from .wording import MISSING, interval, names, percent, signed

Summary = Mapping[str, Any]
TRAINED = ("moe", "smear")  # kinds of method whose gates are trained
SCOPES = {"in_domain": "in domain", "leave_own_out": "own task left out"}


def blocks(summary: Summary, name: str, pictures: Collection[str], command: str = "") -> list[Block]:
    """The whole page. pictures: files that there are, named NAME-part.png."""

    def picture(part: str, alt: str) -> list[Block]:
        file = f"{name}-{part}.png"
        return [Picture(file, alt)] if file in pictures else []

    return [
        Heading(str(summary["title"]), 1),
        *_top(summary, command),
        *_questions(summary["questions"]),
        *_protocols(summary),
        *picture("average", "Average over tasks by method, with 95 % intervals"),
        *_against_own(summary),
        *routing(summary),
        *picture("routes", "Mean weight by own task and adapter, as heat maps"),
        *picture("mass", "By task: routed accuracy minus the own adapter's, against the weight on the own task"),
        *_controls(summary["controls"]),
        *mistakes(summary["mistakes"]),
        *costs(summary["costs"]),
        *picture("cost", "Average accuracy against milliseconds a row"),
        *_metrics(summary["metrics"]),
        *case(summary["case"]),
        *_tasks(summary),
    ]


def _top(summary: Summary, command: str) -> list[Block]:
    suite, index = summary["suite"], summary["suite"]["index"]
    cells = summary["cells"]
    made = cells["planned"] - len(cells["missing"])
    lines = [
        f"{len(summary['tasks'])} tasks in {len(summary['families'])} families; base model {suite['model']}, one "
        f"adapter a task. {made} of {cells['planned']} cells (method, query, scope, seed) are there.",
        "Numbers are percent, differences are points. A row's score is 1 or 0: the likeliest option is the right "
        "one, or, for free text, an exact match. An average is the mean over tasks of each task's mean, so every "
        "task counts alike.",
        f"Intervals are 95 %, by bootstrap over rows within each task ({summary['samples']:,} samples, seed "
        f"{summary['seed']}); they are for these tasks, not for tasks in general. Differences are paired: both "
        "methods on the same rows.",
        f"Seeds ({names([str(s) for s in index['seeds']])}) choose the index's {index['rows']} training rows a "
        "task. A row's score is first averaged over them: seeds answer the same rows, so they are not further "
        "examples.",
        "Queries: **hinted**, the text with its task's hint (the paper's protocol); **raw**, the text alone. "
        "Scopes: **in domain**, and **own task left out**: the task's adapter and rows are withheld.",
        f"`{MISSING}`: not measured. A method whose cells lack a task has no average.",
    ]
    found: list[Block] = [Text(f"Made by `{command}`.")] if command else []
    found.append(Items(tuple(lines)))
    if cells["missing"]:
        found.append(Fold(f"{len(cells['missing'])} cells are missing", (Items(tuple(cells["missing"])),)))
    if summary["remarks"]:
        found.append(Items(tuple(summary["remarks"])))
    return found


def _questions(rows: Sequence[Mapping[str, str]]) -> list[Block]:
    cells = [[r["question"], r["asked"], r["reached"], r["measured"]] for r in rows]
    said = Text(
        "Every line is made from the numbers below. `no figure`: it was to be measured, without a mark to reach. "
        "The time of `loralloy route` is not part of a suite: `benchmarks/route.py` measures it."
    )
    return [Heading("What this says"), said, table(["question", "asked", "reached", "measured"], cells, left=4)]


def _protocols(summary: Summary) -> list[Block]:
    made: list[Block] = [
        Heading("Methods by tasks"),
        Text(
            "**Bold**: the best of its column among methods on as many rows as the others, without the oracle "
            "(perfect selection) and the controls. †: fewer rows; compare it by its differences, which are on "
            "common rows. Space: where adapters are combined: `delta` on dW, `factors` on A and B apart, others "
            "as docs/merging.md says; `-` where none are combined. sd: of the average between seeds. "
            "The base model answers in the prompt format that does best on validation rows, a favour that no other method has. "
            "Where the own task is left out, the prompt still holds the task's hint."
        ),
    ]
    for protocol in summary["protocols"]:
        made += _protocol(summary, protocol)
    return made


AGAINST = {"perfect": "− perfect", "linear": "− routed Linear", "base": "− base", "uniform": "− uniform"}


def _protocol(summary: Summary, protocol: Mapping[str, Any]) -> list[Block]:
    rows = protocol["rows"]
    against = list(protocol["against"])
    linear = next((r["heading"] for r in rows if r["method"] == protocol["against"].get("linear")), None)
    title = f"{SCOPES[protocol['scope']].capitalize()}, {protocol['query']} query"
    main = []
    for r in rows:
        average = interval(r["average"])
        main.append(
            [
                _name(r), r["space"], _rule(r), _rows(r), _seeds(r),
                f"**{average}**" if r["method"] == protocol["best"] else average,
                percent(r["seed_deviation"]) if r["seed_deviation"] is not None else "",
                *(_against(r, name, protocol["against"][name]) for name in against),
            ]
        )  # fmt: skip
    families = list(summary["families"])
    sizes = {f: len(tasks) for f, tasks in summary["families"].items()}
    by_family = [[_name(r), percent(r["average"] and r["average"]["value"])] for r in rows]
    tasks = [t for found in summary["families"].values() for t in found]
    by_task = [[_name(r), percent(r["average"] and r["average"]["value"])] for r in rows]
    for line, task_line, r in zip(by_family, by_task, rows, strict=True):
        line += [_bold(rows, r, "by_family", f) for f in families]
        task_line += [_bold(rows, r, "by_task", t) for t in tasks]
    said = [f"Routed Linear is {linear}."] if linear else []
    if protocol["not_run"]:
        said.append(f"Not run here: {names(protocol['not_run'], 40)}.")
    trained = [r["heading"] for r in rows if r["kind"] in TRAINED]
    if trained:
        said.append(
            f"{names(trained, 40)}: their gates read the whole prompt, the task's hint included, whatever the query."
        )
        if protocol["scope"] == "leave_own_out":
            said.append(
                "They were trained on rows of all tasks, those of the task left out among them, which nothing routed saw."
            )
    heads = [
        "method",
        "space",
        "rule, rank",
        "rows a task",
        "seeds",
        "average [95 %]",
        "sd",
        *(AGAINST[n] for n in against),
    ]
    return [
        Heading(title, 3),
        *([Text(" ".join(said))] if said else []),
        table(heads, main, left=3),
        table(
            ["method", "all", *(f"{f} ({sizes[f]})" for f in families)], by_family, dense=True,
            caption="Mean by family (number of tasks).",
        ),
        Fold(f"{title}: every method by every task", (table(["method", "all", *tasks], by_task, dense=True),)),
    ]  # fmt: skip


def _name(row: Mapping[str, Any]) -> str:
    return row["heading"] + ("" if row["same_rows"] or not row["n"] else " †")


def _rule(row: Mapping[str, Any]) -> str:
    parts = [part for part in (row["parameters"], row["rank"]) if part != "-"]
    return ", ".join(parts) or MISSING


def _rows(row: Mapping[str, Any]) -> str:
    if not row["rows_a_task"]:
        return MISSING
    most, least = row["rows_a_task"]
    return str(most) if most == least else f"{least} to {most}"


def _seeds(row: Mapping[str, Any]) -> str:
    if not row["depends_on_seed"]:
        return "none" if row["found"] else MISSING
    return str(row["found"]) if row["found"] == row["planned"] else f"{row['found']} of {row['planned']}"


def _against(row: Mapping[str, Any], name: str, method: str) -> str:
    return "" if row["method"] == method else signed(row["difference"].get(name))


def _bold(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any], field: str, name: str) -> str:
    """A column's value, bold where it is the best that the caption allows."""
    from .evidence import TOLD

    value = row[field].get(name)
    allowed = [r[field][name] for r in rows if name in r[field] and r["same_rows"] and r["kind"] not in TOLD]
    mine = row["same_rows"] and row["kind"] not in TOLD
    return f"**{percent(value)}**" if mine and value is not None and value == max(allowed) else percent(value)


def _against_own(summary: Summary) -> list[Block]:
    made: list[Block] = []
    for found in summary["against_own"]:
        rows = [
            [
                task, r["family"], percent(r.get("majority")), percent(r.get("base")), percent(r["perfect"]),
                percent(r["routed"]),
                f"**{signed(r['difference'])}**" if task in found["holm"] else signed(r["difference"]),
                f"{r['p']:.4f}", f"{r['p_holm']:.4f}",
            ]
            for task, r in found["tasks"].items()
        ]  # fmt: skip
        heads = ["task", "family", "majority", "base", "own adapter", "routed", "routed − own [95 %]", "p", "p (Holm)"]
        title = f"{found['heading']}, {found['query']} query: {len(found['better'])} tasks better, {len(found['worse'])} worse"
        made.append(
            Fold(
                f"{title} (interval excludes 0), {len(found['holm'])} of them after Holm",
                (table(heads, rows, left=2, caption=f"Over all tasks: {signed(found['overall'])}."),),
            )
        )
    if not made:
        return []
    said = Text(
        "p by a paired permutation test on rows; Holm's correction is for the number of tasks. **Bold**: the "
        "corrected p is below 0.05. Of intervals that are 95 % each, about one in twenty excludes 0 by chance "
        "alone."
    )
    return [Heading("Routed Linear against the task's own adapter, by task"), said, *made]


def _controls(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    if not rows:
        return []
    shown = [
        [r["routed_heading"], r["heading"], SCOPES[r["scope"]], r["query"], signed(r["difference"])]
        for r in rows
    ]  # fmt: skip
    said = Text(
        "Routed composition minus the same with other weights: each task's average weights (told the task), or "
        "the weights of another query (of any task, or of the same one). An interval around 0 means that the "
        "weights of a single query matter no more than the control's."
    )
    heads = ["routed", "control", "scope", "query", "routed − control [95 %]"]
    return [Heading("Controls: does it matter that weights are per query?"), said, table(heads, shown, left=4)]


def _metrics(found: Mapping[str, Any]) -> list[Block]:
    columns = {
        "accuracy": "accuracy", "accuracy_per_byte": "per byte", "exact_match": "exact match", "f1": "F1",
        "rouge_l": "ROUGE-L", "bleu": "BLEU",
    }  # fmt: skip
    if not found["rows"]:
        return []
    rows = [[r["heading"], r["query"] or "any", *(percent(r[name]) for name in columns)] for r in found["rows"]]
    said = [
        "In domain, mean over tasks. Per byte: each option's log-likelihood divided by its length. Exact match, F1, "
        f"ROUGE-L and BLEU (of sentences) are of the tasks with free text: {names(found['free_text']) or 'none'}."
    ]
    said += [found["remark"]] if found["remark"] else []
    shown = table(["method", "query", *columns.values()], rows, left=2)
    return [Heading("Other metrics"), Text(" ".join(said)), Fold("Every method under every metric", (shown,))]


def _tasks(summary: Summary) -> list[Block]:
    rows = [
        [name, t["family"], t["kind"], t["licence"] or MISSING, t["data"] or MISSING]
        for name, t in summary["tasks"].items()
    ]
    return [
        Heading("Tasks"),
        Text(
            "Rows, questions and answers of the tasks are not part of this report; each task file says where its "
            "data comes from."
        ),
        Fold(
            f"{len(rows)} tasks, their licences and sources",
            (table(["task", "family", "answers", "licence", "data"], rows, left=5),),
        ),
    ]
