"""Means, intervals and paired differences of runs, and the tables made of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from loralloy.continual.report import controls_table, final_table, markdown
from loralloy.continual.results import Mean, Results, RunResult


def result(seed, strategy, accuracy, kind="learned", order=("a", "b"), merge="linear delta", **settings):
    matrix = ((1.0, None), (accuracy, accuracy))
    return RunResult(seed, order, strategy, merge, kind, settings, None, matrix, (0.5, 0.25), ({}, {}))


def results(*runs, missing=0):
    plan = {"title": "", "experiences": ["a", "b"], "loralloy": "0"}
    return Results(Path("nowhere"), plan, runs, missing)


def test_mean_deviation_and_t_interval():
    mean = Mean.of([1.0, 2.0, 3.0])
    assert (mean.value, mean.deviation, mean.n) == (2.0, 1.0, 3)
    assert mean.half == pytest.approx(4.303 / math.sqrt(3))
    many = Mean.of([0.0, 1.0] * 20)
    assert many.half == pytest.approx(2.0227 * many.deviation / math.sqrt(40), rel=1e-3)  # t, 39 degrees of freedom
    one = Mean.of([0.5])
    assert one.value == 0.5 and one.to_dict() == {"mean": 0.5, "deviation": None, "half": None, "n": 1}


def test_orders_are_averaged_within_a_seed():
    found = results(result(0, "l", 0.5), result(0, "l", 0.7, order=("b", "a")), result(1, "l", 0.8))
    assert found.by_seed("linear delta", "l") == {0: pytest.approx(0.6), 1: pytest.approx(0.8)}
    assert found.mean("linear delta", "l").value == pytest.approx(0.7) and found.mean("linear delta", "l").n == 2


def test_differences_are_paired_by_seed():
    found = results(
        *(result(seed, "l", x) for seed, x in enumerate((0.5, 0.7, 0.9))),
        *(result(seed, "f", x, "fixed", weight=1.0) for seed, x in enumerate((0.4, 0.6))),
    )
    difference = found.difference(("linear delta", "l"), ("linear delta", "f"))
    assert (difference.value, difference.n) == (pytest.approx(0.1), 2)
    assert difference.half == pytest.approx(0, abs=1e-9)  # the same in each seed, however seeds differ


def test_controls_say_what_is_out_of_range():
    runs = [result(0, "l", 0.6, b_max=1.0)]
    runs += [result(0, f"W{w}", x, "fixed", weight=w) for w, x in ((0.5, 0.55), (1.0, 0.7), (3.0, 0.2))]
    _, _, rows = controls_table(results(*runs, result(0, "u", 0.65, "uniform")))
    assert [row[2:] for row in rows] == [
        ["fixed W = alpha_0 = 0.5", "+5.0 (one seed)", "yes"],
        ["uniform 1/N", "-5.0 (one seed)", ""],
        ["best of 3 fixed W in hindsight: 1", "-10.0 (one seed)", "no: W >= 1"],
    ]


def test_the_final_table_has_strategies_by_merge_and_the_base():
    found = results(
        result(0, "l", 0.5), result(0, "l", 0.75, merge="ties delta"), result(0, "j", 0.9, "joint", merge="")
    )
    title, heads, rows = final_table(found)
    assert heads == ["strategy", "linear delta", "ties delta"] and "one order" in title
    assert rows == [["l", "50.0", "75.0"], ["j", "90.0", ""], ["base model", "37.5", ""]]
    assert "| l | 50.0 | 75.0 |" in markdown(found)
    assert "**2 runs are not finished.**" in markdown(results(*found.runs, missing=2))
