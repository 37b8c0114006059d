"""Averages, intervals and differences against the same computed from the cell files by hand; holes stay holes."""

from __future__ import annotations

import json
from statistics import fmean, stdev

import numpy as np
import pytest
from fake_cells import make_cell, write_cells

from loralloy.errors import LoralloyError
from loralloy.evaluation.report import load, summarise
from loralloy.evaluation.report.table import against_own, controls, table
from loralloy.evaluation.suite.cells import cells_of
from loralloy.tasks import load_tasks


@pytest.fixture(scope="module")
def evidence(whole):
    return load(whole, samples=400)


def by_hand(out, gold, method, query, scope):
    """task -> row -> mean over seeds, straight from the files."""
    found: dict[str, dict[str, list[float]]] = {}
    for path in (out / "cells").glob(f"{method}__{query}__{scope}__*.json"):
        for row in json.loads(path.read_text())["rows"]:
            task, answer = gold[row["id"]]
            found.setdefault(task, {}).setdefault(row["id"], []).append(float(row["answer"] == answer))
    return {task: {i: fmean(v) for i, v in rows.items()} for task, rows in found.items()}


def row_of(made, method):
    return next(r for r in made["rows"] if r["method"] == method)


def test_averages(evidence, whole, gold):
    made = table(evidence, "raw", "in_domain")
    for method, query, scope in (
        ("linear", "raw", "in_domain"),
        ("multitask", "any", "in_domain"),
        ("base", "any", "any"),
    ):
        rows = by_hand(whole.out, gold, method, query, scope)
        means = {t: fmean(r.values()) for t, r in rows.items()}
        row = row_of(made, method)
        assert row["by_task"] == pytest.approx(means)
        assert row["average"]["value"] == pytest.approx(fmean(means.values()))
        assert row["by_family"]["commonsense"] == pytest.approx(fmean([means["weather"], means["picks"]]))
        assert row["n"] == 80 and row["rows_a_task"] == [20, 20]
    assert row_of(made, "linear")["found"] == 2 and row_of(made, "ties")["found"] == 1


def test_interval_is_of_rows_within_tasks(evidence, whole, gold):
    """An analytic interval: the tasks' standard errors add in quadrature, over the number of tasks."""
    rows = by_hand(whole.out, gold, "linear", "hinted", "in_domain")
    error = np.sqrt(sum(np.var(list(r.values())) / len(r) for r in rows.values())) / len(rows)
    found = row_of(table(evidence, "hinted", "in_domain"), "linear")["average"]
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert found["low"] < found["value"] < found["high"]


def test_seeds_are_averaged_before_rows_are_drawn(evidence, whole, gold):
    row = row_of(table(evidence, "raw", "in_domain"), "linear")
    per_seed = []
    for seed in (0, 1):
        data = json.loads((whole.out / "cells" / f"linear__raw__in_domain__{seed}.json").read_text())
        right: dict[str, list[float]] = {}
        for r in data["rows"]:
            right.setdefault(r["task"], []).append(float(r["answer"] == gold[r["id"]][1]))
        per_seed.append(fmean(fmean(v) for v in right.values()))
    assert row["seed_deviation"] == pytest.approx(stdev(per_seed))
    assert row["average"]["value"] == pytest.approx(fmean(per_seed))
    assert row["average"]["n"] == 80  # not 160: a seed is no further example


def test_differences_are_on_common_rows(evidence, whole, gold):
    made = table(evidence, "hinted", "in_domain")
    ties, linear = (by_hand(whole.out, gold, m, "hinted", "in_domain") for m in ("ties", "linear"))
    expected = fmean(fmean(v - linear[t][i] for i, v in rows.items()) for t, rows in ties.items())
    row = row_of(made, "ties")
    assert row["difference"]["linear"]["value"] == pytest.approx(expected)
    assert row["difference"]["linear"]["n"] == 32 and not row["same_rows"]
    assert made["best"] != "ties" and made["best"] not in ("perfect", "task_average", "shuffled")
    assert "linear" not in row_of(made, "linear")["difference"]


def test_left_out_scope(evidence):
    made = table(evidence, "raw", "leave_own_out")
    assert {"perfect", "multitask", "ties"}.isdisjoint(r["method"] for r in made["rows"])
    assert {"base", "uniform", "linear"} <= row_of(made, "probe")["difference"].keys()
    assert {"perfect", "multitask", "ties"} == set(made["not_run"])


def test_by_task_and_controls(evidence, whole, gold):
    linear = next(m for m in whole.methods if m.name == "linear")
    found = against_own(evidence, linear, "raw")
    own, routed = (
        by_hand(whole.out, gold, "perfect", "any", "in_domain"),
        by_hand(whole.out, gold, "linear", "raw", "in_domain"),
    )
    for task, row in found["tasks"].items():
        assert row["difference"]["value"] == pytest.approx(fmean(routed[task][i] - v for i, v in own[task].items()))
        assert row["p_holm"] >= row["p"]
        assert (task in found["better"]) == (row["difference"]["low"] > 0)
        assert (task in found["worse"]) == (row["difference"]["high"] < 0)
    rows = controls(evidence)
    assert {(r["control"], r["routed"]) for r in rows} == {("task_average", "linear"), ("shuffled", "linear")}
    assert len(rows) == 8 and all(r["difference"] for r in rows)


def test_missing_cells_are_holes(suite, tmp_path):
    write_cells(suite, skip={"linear__raw__in_domain__1", "multitask__any__in_domain__any"})
    evidence = load(suite, samples=200)
    assert evidence.missing == ["linear__raw__in_domain__1", "multitask__any__in_domain__any"]
    made = table(evidence, "raw", "in_domain")
    row = row_of(made, "linear")
    assert (row["found"], row["planned"]) == (1, 2) and row["average"]
    gone = row_of(made, "multitask")
    assert gone["average"] is None and gone["by_task"] == {} and gone["difference"] == {}


def test_a_cell_without_a_task_has_no_average(suite):
    write_cells(suite)
    path = suite.out / "cells" / "selection__raw__in_domain__0.json"
    data = json.loads(path.read_text())
    for seed in (0, 1):
        cut = data | {"seed": seed, "rows": [r for r in data["rows"] if r["task"] != "names"]}
        path.with_name(f"selection__raw__in_domain__{seed}.json").write_text(json.dumps(cut))
    evidence = load(suite, samples=200)
    row = row_of(table(evidence, "raw", "in_domain"), "selection")
    assert row["average"] is None and set(row["by_task"]) == {"weather", "claims", "picks"}
    assert any("selection (raw, in domain) has no row of names" in remark for remark in evidence.remarks)


def test_seeds_with_other_rows_are_said(suite):
    write_cells(suite)
    path = suite.out / "cells" / "linear__raw__in_domain__1.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"rows": data["rows"][:-3]}))
    assert any("linear (raw, in domain): its seeds have 77 and 80 rows" in r for r in load(suite, samples=200).remarks)


def test_other_cells_are_left_out_by_name(suite):
    write_cells(suite)
    tasks = load_tasks(suite.fields.tasks)
    cell = next(c for c in cells_of(suite) if c.name == "ties__raw__in_domain__0")
    data = make_cell(cell, suite, tasks)
    (suite.out / "cells" / "older__raw__in_domain__0.json").write_text(json.dumps(data))
    cell.path(suite.out).write_text(json.dumps(data | {"settings": data["settings"] | {"step": 0.2}}))
    evidence = load(suite, samples=200)
    said = " ".join(evidence.remarks)
    assert "the suite has no such cell: older__raw__in_domain__0" in said
    assert "other settings, rows, index or code than the suite now has: ties__raw__in_domain__0" in said
    assert evidence.missing == ["ties__raw__in_domain__0"]
    for change in ({"rows_a_task": 3}, {"made_of": {"engine": 0}}, {"made_of": {"index": [1, "raw", "exact"]}}):
        cell.path(suite.out).write_text(json.dumps(data | change))  # of other rows, code or index
        assert load(suite, samples=200).missing == ["ties__raw__in_domain__0"]
    cell.path(suite.out).write_text(json.dumps(data | {"made_of": {"base": "b", "bank": "new", "data": "d"}}))
    old = next(c for c in cells_of(suite) if c.name == "ties__hinted__in_domain__0").path(suite.out)
    old.write_text(json.dumps(json.loads(old.read_text()) | {"made_of": {"base": "b", "bank": "old", "data": "d"}}))
    assert "2 different kinds of bank" in " ".join(load(suite, samples=200).remarks)


def test_no_cells(suite, tmp_path):
    with pytest.raises(LoralloyError, match=r"no cells there; run `loralloy evaluate suite.yaml`"):
        load(suite)
    (suite.out / "cells").mkdir(parents=True)
    with pytest.raises(LoralloyError, match=r"cells: no cells \("):
        load(suite)
    (suite.out / "cells" / "else__any__any__any.json").write_text("{}")
    with pytest.raises(LoralloyError, match="1 cells, none of which is the suite's"):
        load(suite)
    (suite.out / "cells" / "base__any__any__any.json").write_text("{}")
    with pytest.raises(LoralloyError, match="not a cell of version 1"):
        load(suite)


def test_cells_folder_itself(whole):
    assert load(whole, whole.out / "cells", 200).missing == []


def test_other_data(suite):
    write_cells(suite)
    path = suite.out / "cells" / "base__any__any__any.json"
    path.write_text(path.read_text().replace("names/test/3", "names/test/999"))
    with pytest.raises(LoralloyError, match="which the tasks do not have"):
        summarise(load(suite, samples=200), suite.out)
