"""Routes, error types, costs and questions: rules and marks by hand."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloy.errors import LoralloyError
from loralloy.evaluation.report import load
from loralloy.evaluation.report.costs import costs
from loralloy.evaluation.report.mistakes import analyse, rates, within
from loralloy.evaluation.report.questions import answers
from loralloy.evaluation.report.routes import quality, row_metrics
from loralloy.evaluation.report.tags import read_overrides, tag
from loralloy.tasks import Example, Task


@pytest.fixture(scope="module")
def evidence(whole):
    return load(whole, samples=200)


@pytest.mark.parametrize(
    "weights,expected",
    [
        ({"a": 1.0}, (1.0, 1.0, 0.0, 1.0, 0.0)),
        ({"a": 0.5, "b": 0.5}, (1.0, 0.5, math.log(2), 2.0, 0.0)),
        ({"a": 0.2, "b": 0.8, "c": 0.0}, (0.0, 0.2, -0.2 * math.log(0.2) - 0.8 * math.log(0.8), 2.0, 0.0)),
        ({"b": 1.0}, (0.0, 0.0, 0.0, 1.0, 0.0)),
        ({}, (0.0, 0.0, 0.0, 0.0, 1.0)),
    ],
)
def test_a_row_of_weights(weights, expected):
    found = row_metrics(weights, "a")
    assert tuple(found[m] for m in ("top1", "own", "entropy", "used", "base")) == pytest.approx(expected)


def test_quality_over_seeds(evidence, whole):
    rows = quality(evidence)
    assert [(r["weigher"], r["query"]) for r in rows][:4] == [
        ("the paper's kernel", "hinted"), ("probe", "hinted"), ("probe, base if unlike > 0.9", "hinted"),
        ("nearest mean task embedding", "hinted"),
    ]  # fmt: skip
    row = next(r for r in rows if (r["method"], r["query"]) == ("linear", "raw"))
    by_seed = []
    for seed in (0, 1):
        data = json.loads((whole.out / "cells" / f"linear__raw__in_domain__{seed}.json").read_text())["rows"]
        by_seed.append(fmean(r["weights"].get(r["task"], 0.0) for r in data))  # every task has as many rows
    assert row["all"]["own"]["mean"] == pytest.approx(fmean(by_seed))
    assert row["all"]["own"]["sd"] == pytest.approx(abs(by_seed[0] - by_seed[1]) / math.sqrt(2))
    assert [sum(line) for line in row["confusion"]] == pytest.approx([1.0] * 4)
    place = list(evidence.tasks).index("names")
    assert row["confusion"][place][place] == pytest.approx(row["by_task"]["names"]["own"]["mean"])
    assert 0 <= row["overlaps"]["in_family"] <= 1 and all(p["task"] != p["other"] for p in row["overlaps"]["pairs"])
    careful = next(r for r in rows if (r["method"], r["query"]) == ("careful", "raw"))
    assert careful["falls_back"] and careful["all"]["base"]["mean"] > 0


def example(raw, answer="x", options=(), task="t"):
    return Example(f"{task}/test/0", task, raw, raw, raw, answer, options)


def task(name="t", family="", labels=("x", "y"), columns=1):
    fields = {"labels": list(labels)} if labels else {"options": "choices"}
    return Task.from_dict(
        {
            "version": 1, "name": name, "family": family, "answer": "label", "source": {"path": "none.jsonl"},
            "columns": [{"name": f"c{i}"} for i in range(columns)], **fields,
        }
    )  # fmt: skip


NLI = task(family="nli", labels=("entailment", "neutral", "contradiction"), columns=2)


@pytest.mark.parametrize(
    "row,of,expected",
    [
        (example("she left"), task(), set()),
        (example("before she left, and after that"), task(), {"temporal"}),
        (example("after and after"), task(), set()),  # one word twice
        (example("boil water", task="story_cloze"), task("story_cloze"), {"temporal"}),
        (example("it is not so"), task(), {"negation"}),
        (example("it isn't"), task(), {"negation"}),
        (example("a notable knot"), task(), set()),
        (example("why"), task(family="commonsense"), {"commonsense"}),
        (example("word " * 80), task(), {"long_context"}),
        (example("word " * 79), task(), set()),
        (example("fine", "neutral"), task(labels=("neutral", "good")), {"ambiguity"}),
        (example("q", "the red car", ("the red car", "the red bus")), task(labels=()), {"ambiguity"}),
        (
            example("q", "the red car", ("the red car", "car the red")),
            task(labels=()),
            set(),
        ),  # an order, not a choice of words
        (example("q", "a cow", ("a cow", "the red bus")), task(labels=()), set()),
        (example("p\nq", "neutral"), NLI, {"entailment"}),
        (example("the cat sat\nthe cat sat", "contradiction"), NLI, {"entailment"}),
        (example("the cat sat\nquite another thing here", "contradiction"), NLI, set()),
        (example("the cat sat\nthe cat sat", "entailment"), NLI, set()),
    ],
)
def test_rules(row, of, expected):
    assert tag(row, of) == expected


def test_overrides(tmp_path, whole, evidence):
    plain = analyse(evidence)
    some = "weather/test/0"
    path = tmp_path / "tags.csv"
    path.write_text(f"id,tag,note\n{some},ambiguity,unclear\n{some},long_context,\npicks/test/1,none,\n")
    assert read_overrides(path, evidence.results.examples) == {
        some: {"ambiguity", "long_context"},
        "picks/test/1": frozenset(),
    }
    made = analyse(evidence, path)
    counts = {t["name"]: t["rows"] for t in made["types"]}
    before = {t["name"]: t["rows"] for t in plain["types"]}
    assert made["overridden"] == 2 and plain["overridden"] == 0
    assert counts["long_context"] == before["long_context"] + 1
    assert counts["commonsense"] == before["commonsense"] - 2  # both rows were of that family


@pytest.mark.parametrize(
    "text,says",
    [
        ("id;tag\n", "has the columns id and tag"),
        ("id,tag\nnowhere/test/0,negation\n", "line 2: 'nowhere/test/0' is no test row"),
        ("id,tag\nweather/test/0,irony\n", "line 2: tag 'irony' is not known; give temporal"),
        ("id,tag\nweather/test/0,none\nweather/test/0,negation\n", "has 'none' and other tags"),
    ],
)
def test_wrong_overrides(tmp_path, evidence, text, says):
    path = tmp_path / "tags.csv"
    path.write_text(text)
    with pytest.raises(LoralloyError, match=says):
        read_overrides(path, evidence.results.examples)
    with pytest.raises(LoralloyError, match="cannot be read as a CSV"):
        read_overrides(tmp_path / "none.csv", [])


def test_error_rates():
    errors = {"a": {f"a{i}": float(i < 6) for i in range(20)}, "b": {f"b{i}": 1.0 for i in range(4)}}
    tags = {f"a{i}": frozenset({"negation"}) for i in range(5)} | {"b0": frozenset({"negation"})}
    found = rates(errors, tags, "negation", 0, 300)
    assert (found["n"], found["with"], found["without"]) == (6, 1.0, pytest.approx((1 + 3) / 18))
    assert found["tasks"] == 1  # b has one row with the type: too few
    assert found["within"]["value"] == pytest.approx(1.0 - 1 / 15)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(5, 30), st.integers(5, 30))
def test_within_is_the_difference_of_means(k, m, n1, n2):
    a, b = [float(i < min(k, n1)) for i in range(n1)], [float(i < min(m, n2)) for i in range(n2)]
    found = within([(a, b)], 0, 200)
    assert found["value"] == pytest.approx(fmean(a) - fmean(b))
    assert found["low"] - 1e-9 <= found["value"] <= found["high"] + 1e-9


def test_within_interval_against_theory():
    a, b = [1.0] * 30 + [0.0] * 70, [1.0] * 50 + [0.0] * 50
    found = within([(a, b)], 0, 4000)
    error = 1.96 * np.sqrt(0.3 * 0.7 / 100 + 0.25 / 100)
    assert (found["low"], found["high"]) == pytest.approx((-0.2 - error, -0.2 + error), abs=0.02)


def test_costs(evidence):
    rows = {r["method"]: r for r in costs(evidence)}
    assert rows["ties"]["hit_rate"] == 0.5 and rows["ties"]["merge_ms"] == pytest.approx(40.0)
    assert rows["ties"]["added_bytes"] == rows["ties"]["peak_bytes"] - 600_000_000 == 104_000_000
    linear = rows["linear"]
    assert (linear["cells"], linear["rows"], linear["reused"]) == (8, 8 * 80, 0.25)
    assert linear["ms"]["weigh"] == pytest.approx(1.0) and linear["merge_ms"] is None
    # a quarter of the rows was taken over: the time is that of the others
    assert linear["ms"]["answer"] == pytest.approx(15.0 / 0.75)
    assert linear["answers_a_second"] == pytest.approx(1000 / (1.0 + 15.0 / 0.75))
    assert rows["majority"]["answers_a_second"] is None and rows["majority"]["peak_bytes"] is None


def ask(**fields):
    empty = {"routing": [], "against_own": [], "protocols": [], "controls": []}
    return answers(empty | fields)


def route(router, query, top1, own):
    return {
        "router": router,
        "falls_back": False,
        "query": query,
        "weigher": "w",
        "all": {"top1": {"mean": top1}, "own": {"mean": own}},
    }


@pytest.mark.parametrize(
    "row,reached",
    [
        (route("paper", "hinted", 0.97, 0.90), "yes"),
        (route("paper", "hinted", 0.97, 0.8999), "no"),
        (route("paper", "raw", 0.5, 0.5), "no figure"),
        (route("probe", "raw", 0.88, 0.82), "yes"),
        (route("probe", "raw", 0.87, 0.82), "no"),
    ],
)
def test_routing_marks(row, reached):
    assert ask(routing=[row])[0].reached == reached


@pytest.mark.parametrize(
    "value,low,reached,says",
    [(-0.01, -0.02, "yes", ""), (-0.01, -0.021, "no", "the interval is not"), (-0.03, -0.04, "no", "")],
)
def test_own_adapter_mark(value, low, reached, says):
    found = {
        "heading": "routed", "query": "raw", "overall": {"value": value, "low": low, "high": 0.0}, "tasks": {"a": {}, "b": {}},
        "better": ["a"], "worse": [], "holm": [],
    }  # fmt: skip
    answer = ask(against_own=[found])[0]
    assert answer.reached == reached and says in answer.measured and "better: a (after Holm: none)" in answer.measured


def test_unseen_mark_wants_the_whole_interval():
    def row(low):
        difference = {"base": {"value": 0.05, "low": low, "high": 0.1}}
        return {
            "linear": True,
            "heading": "routed",
            "difference": difference,
            "kind": "routed",
            "rule": "linear",
            "average": None,
            "space": "delta",
        }

    for low, reached in ((0.001, "yes"), (-0.001, "no")):
        protocol = {"scope": "leave_own_out", "query": "raw", "rows": [row(low)], "leads": []}
        assert ask(protocols=[protocol])[0].reached == reached


def test_questions_of_the_small_suite(evidence, whole):
    from loralloy.evaluation.report import summarise

    summary = summarise(evidence, whole.out)
    said = {a["question"]: a for a in summary["questions"]}
    rules = said["TIES, Cat, Magnitude prune, and three newer rules"]
    assert rules["reached"] == "no" and rules["measured"] == "the paper's: ties; newer: none"
    best = said["routed, linear against trained routers, Fusion, Mixture, SMEAR, multi-task, raw query"]
    averages = {r["method"]: r["average"]["value"] for r in summary["protocols"][1]["rows"] if r["average"]}
    ahead = max(averages["moe_soft"], averages["multitask"]) > averages["linear"]
    assert best["reached"] == ("no" if ahead else "yes")


def test_the_shipped_overrides_are_readable():
    path = Path(__file__).parents[3] / "examples" / "suite" / "error_tags.csv"
    with open(path, newline="") as file:
        ids = {row["id"] for row in csv.DictReader(file)}
    assert set(read_overrides(path, ids)) == ids and ids
