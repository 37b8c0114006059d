"""Scores of cells: seeds averaged, tasks counted alike, rows paired; by hand."""

from __future__ import annotations

import json

import pytest

from loralloy.errors import LoralloyError
from loralloy.evaluation.suite.results import Key, Results, terminal_tables
from loralloy.tasks import load_tasks


@pytest.fixture(scope="module")
def tasks(small):
    return load_tasks(small / "tasks")


def cell(tasks, method, wrong, query=None, scope=None, seed=None, rows=4, weights=None):
    """A cell that answers right but for the rows numbered `wrong` (by task)."""
    made = []
    for task in tasks:
        for n, e in enumerate(task.examples("test", rows)):
            other = next(o for o in e.options if o != e.answer)
            answer = other if n in wrong.get(task.name, ()) else e.answer
            scores = [0.0 if o == answer else -1.0 for o in e.options]
            made.append({"id": e.id, "task": e.task, "answer": answer, "weights": weights, "scores": scores})
    return {
        "version": 1, "method": method, "heading": method.upper(), "space": "delta", "query": query, "scope": scope,
        "seed": seed, "seconds": {"weigh": 1.0, "compose": 2.0, "answer": 3.0}, "peak_bytes": 7 + (seed or 0),
        "cache": {"hits": 6, "misses": 2, "answers": 4}, "adapter_bytes": {"mean": 10.0, "max": 10, "n": 2}, "rows": made,
    }  # fmt: skip


@pytest.fixture(scope="module")
def results(tasks):
    return Results(
        [
            cell(tasks, "base", {"spam": [0, 1], "weather": [0]}),
            cell(tasks, "linear", {"spam": [0]}, "raw", "in_domain", 0, weights={"spam": 0.75, "weather": 0.25}),
            cell(tasks, "linear", {"spam": [0, 3]}, "raw", "in_domain", 1, weights={"spam": 0.75, "weather": 0.25}),
            cell(tasks, "ties", {"cooking": [1]}, "raw", "in_domain", 0, rows=2),
        ],
        tasks,
    )


def key(results, method):
    return results.find(method, "raw", "in_domain")


def test_scores(results):
    assert key(results, "base") == Key("base", None, None) and key(results, "linear") == Key(
        "linear", "raw", "in_domain"
    )
    assert results.find("linear", "hinted", "in_domain") is None
    assert results.by_task(key(results, "base")) == {"cooking": 1.0, "spam": 0.5, "weather": 0.75}
    assert results.average(key(results, "base")) == pytest.approx(0.75)
    spam = results.scores(key(results, "linear"))["spam"]
    assert spam == {"spam/test/0": 0.0, "spam/test/1": 1.0, "spam/test/2": 1.0, "spam/test/3": 0.5}  # mean of two seeds
    assert results.by_task(key(results, "linear"), "accuracy_per_byte")["spam"] == 0.625
    assert results.scores(key(results, "linear"), "rouge_l") == {}  # no free text here


def test_differences_are_over_common_rows(results):
    pairs = results.paired(key(results, "ties"), key(results, "base"))
    assert {t: len(a) for t, (a, _) in pairs.items()} == {"cooking": 2, "spam": 2, "weather": 2}
    d = results.difference(key(results, "ties"), key(results, "base"))
    assert d.value == pytest.approx((-0.5 + 1.0 + 0.5) / 3) and d.low <= d.value <= d.high and d.n == 6
    same = results.difference(key(results, "base"), key(results, "base"))
    assert (same.low, same.value, same.high) == (0, 0, 0)
    by_task = results.by_task_difference(key(results, "ties"), key(results, "base"))
    assert {t: x.difference.value for t, x in by_task.items()} == {"cooking": -0.5, "spam": 1.0, "weather": 0.5}
    assert all(x.p <= x.p_holm <= 1 for x in by_task.values())


def test_routing_and_costs(results):
    import math

    routing = results.routing(key(results, "linear"))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert routing == pytest.approx({"top1": 1 / 3, "own": (0.75 + 0.25) / 3, "used": 2, "entropy": entropy})
    assert results.routing(key(results, "base")) is None
    costs = results.costs(key(results, "linear"))
    assert costs == pytest.approx({
        "weigh": 2 / 24, "compose": 4 / 16, "answer": 6 / 16, "merge": 1.0, "hit_rate": 0.75, "adapter_bytes": 10.0,
        "peak_bytes": 8.0,
    })  # fmt: skip


def test_plain_data_and_tables(results):
    from rich.console import Console

    data = results.to_dict()
    assert json.loads(json.dumps(data)) == data and [r["method"] for r in data["results"]] == ["base", "linear", "ties"]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in terminal_tables(results, ["base", "linear", "ties"], ["raw"], ["in_domain"]):
        console.print(table)
    text = console.export_text()
    assert "0.750" in text and "LINEAR" in text and "0.33" in text


def test_refused(tasks, results, tmp_path):
    with pytest.raises(LoralloyError, match="no cells to score"):
        Results([], tasks)
    with pytest.raises(LoralloyError, match="no cells there"):
        Results.load(tmp_path, tasks)
    few = Results([cell(tasks, "base", {})], tasks[:1])
    with pytest.raises(LoralloyError, match="answers 'spam/test/0', which the tasks do not have"):
        few.scores(Key("base", None, None))
    with pytest.raises(LoralloyError, match="no row in common"):
        some = cell(tasks, "a", {}, rows=1)
        rest = cell(tasks, "b", {}, rows=2)
        rest["rows"] = [r for r in rest["rows"] if r["id"].endswith("1")]
        Results([some, rest], tasks).paired(Key("a", None, None), Key("b", None, None))
    with pytest.raises(LoralloyError, match="no cell of"):
        results.scores(Key("none", None, None))


def test_tasks_that_one_method_lacks_are_left_out(tasks):
    few = cell(tasks, "few", {})
    few["rows"] = [row for row in few["rows"] if row["task"] != "weather"]
    made = Results([cell(tasks, "all", {"weather": [0, 1, 2, 3]}), few], tasks)
    a, b = Key("all", None, None), Key("few", None, None)
    assert set(made.paired(a, b)) == set(made.paired(b, a)) == {"cooking", "spam"}
    assert made.difference(a, b).value == 0
