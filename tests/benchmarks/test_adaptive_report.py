"""The report of adaptive merging on made-up cells, whose verdicts are known."""

from __future__ import annotations

import dataclasses
import json

import pytest

from adaptive_pages import LEARNED, SEEDS, made_up, row, verdict


@pytest.fixture
def page(harness):
    rows = made_up(harness.cells)
    return harness.report.build(
        "emoji", {"emoji4": harness.results.Cells("emoji4", rows), "emoji7": harness.results.Cells("emoji7", [])}
    )


def test_verdicts(page):
    _, said, state = verdict(page, "alpha_0")
    assert state == "linear: met, ties: met, dare_ties: missed"
    assert "of 18 triples" in said and "13 are better and 5 worse at 95 %, 0 neither" in said
    _, said, state = verdict(page, "hindsight")
    # all of DARE-TIES is behind; of task arithmetic at b_max 5 the two seeds differ too much
    assert state == "met in 10, not shown in 2, missed in 6 of 18"
    missed, unsure = said.split("; ")[1:3]
    assert "10 of 18" in said and "DARE-TIES, delta b_max 1 -21" in missed and "Task arithmetic" not in missed
    assert "Task arithmetic, delta b_max 5" in unsure and "DARE" not in unsure
    _, said, state = verdict(page, "joint training")
    assert "ties" in said  # chosen by validation: 0.7 against 0.8 or better, less than 10 points by a hair
    assert state.startswith("met on average, not shown at 95 %")
    _, said, state = verdict(page, "collapse")
    assert state == "shown (task arithmetic loses 60.2 [57.7, 62.7] points)" and "cross terms 1.70" in said
    _, said, state = verdict(page, "where finer coefficients pay, TIES")
    assert "layer, 20 a class: +3.0" in said and "at 20 a class at 95 %" in state
    _, said, state = verdict(page, "forgetting")
    assert state == "met"  # 0.6 on the way, 0.69 at the end


def of(values):
    """Points of two seeds."""
    from loralloy.continual.results import Mean

    return Mean.of([v / 100 for v in values])


@pytest.mark.parametrize(
    ("values", "better", "margin"),
    [  # by hand: the half width of two values is 6.353 times their distance
        ((1.0, 1.1), "met", "met"),
        ((1.0, 2.0), "not shown", "not shown"),
        ((-1.0, -1.1), "missed", "met"),
        ((-1.0, -2.0), "not shown", "not shown"),
        ((-2.1, -2.2), "missed", "missed"),
        ((-3.0, -1.5), "not shown", "missed"),
        ((1.0,), "not shown", "not shown"),
    ],
)
def test_what_an_interval_shows(harness, values, better, margin):
    assert harness.claims.judged(of(values)) == better
    assert harness.claims.held(of(values), -0.02) == margin


def test_verdicts_are_counted(harness):
    assert harness.claims.counted(["met", "met"]) == "met"
    assert harness.claims.counted(["met", "not shown", "missed", "not shown"]) == (
        "met in 1, not shown in 2, missed in 1 of 4"
    )


def test_the_page_says_what_is_missing_and_nothing_when_all_is_there(harness):
    plan, cells = harness.plan, harness.cells

    def rows(name):
        bench = plan.BENCHES[name]
        for group in plan.groups(bench, bench.stream()):
            for cell in group.cells:
                settings = {k: v for k, v in dataclasses.asdict(cell).items() if v not in (None, "")}
                yield group.part, json.loads(json.dumps({"cell": settings, "test": {"a": 0.5}}))

    everything = {name: [one for _, one in rows(name)] for name in ("emoji4", "emoji7")}
    found = {name: harness.results.Cells(name, some) for name, some in everything.items()}
    assert harness.checks.unfinished(found) == ""
    odd = row(0.1, rule="ties", space="delta", how="fixed", weight=0.123)  # of a part that the plan no longer has
    more = harness.results.Cells("emoji4", [*everything["emoji4"], odd])
    assert harness.checks.unfinished(found | {"emoji4": more}) == ""
    some = [one for part, one in rows("emoji4") if part != "draws"]
    gone = next(
        n for n, one in enumerate(some) if one["cell"]["how"] == "learned" and one["cell"].get("start") == "zero"
    )
    zeros = sum(one["cell"].get("start") == "zero" for one in some)
    del some[gone]
    told = harness.checks.unfinished(found | {"emoji4": harness.results.Cells("emoji4", some)})
    draws = len(SEEDS) * 6 * len(cells.DRAWS) * (len(cells.B_MAX) + 1)
    whole = len(everything["emoji4"])
    assert told == (
        f"**Unfinished.** Of emoji4's {whole} cells {whole - draws - 1} are there. In part: learned from the poster's start, "
        f"c = 0 ({zeros - 1} of {zeros}). Not begun: the same learned coefficients on two more draws of the buffer's rows "
        f"({draws})."
    )
    none = harness.checks.unfinished({"emoji7": harness.results.Cells("emoji7", [])})
    growth = {cells.cell_name(one["cell"]) for one in everything["emoji7"]}
    assert none.endswith(
        f"Of emoji7's {len(growth)} cells 0 are there. Not begun: growth with the number of domains ({len(growth)})."
    )


def test_the_head_that_is_judged_is_chosen_on_validation_rows(harness):
    """Prototypes are better on test rows (level with joint training), the random head on validation rows."""
    rows = []
    for seed in SEEDS:
        for head, score, seen in (("random", 0.6, 0.7), ("prototypes", 0.8, 0.5)):
            settings = LEARNED | {"rule": "ties", "space": "delta", "head": head}
            rows.append(row(score, seed, validation=seen, **settings))
            rows.append(row(0.8, seed, how="joint", head=head))
    built = harness.report.build(
        "emoji", {"emoji4": harness.results.Cells("emoji4", rows), "emoji7": harness.results.Cells("emoji7", [])}
    )
    state = verdict(built, "joint training")[2]
    assert state.startswith("missed by 10.0 points (random head")


def test_the_tables_hold_means_and_deviations(page, harness):
    text = page[0]
    assert "| Task arithmetic, factors | 51.4 ± 0.3 | 10.0 ± 0.0 | 10.0 ± 0.0 |" in text
    assert "70.2 ± 0.3 (W=0.25)" in text
    assert "| joint training on all domains |  | 80.2 ± 0.3 |" in text
    assert page[2][:4] == b"\x89PNG"


def test_a_weight_beyond_b_max_is_told_as_excluded(harness):
    cells, rows = harness.cells, []
    for seed in SEEDS:
        for weight in cells.GRID:
            rows.append(row(0.5 + 0.05 * weight, seed, rule="ties", space="delta", how="fixed", weight=weight))
        for b_max in cells.B_MAX:
            settings = LEARNED | {"rule": "ties", "space": "delta", "b_max": b_max}
            rows.append(row(0.5 + 0.001 * seed, seed, **settings))
    built = harness.report.build(
        "emoji", {"emoji4": harness.results.Cells("emoji4", rows), "emoji7": harness.results.Cells("emoji7", [])}
    )
    _, said, state = verdict(built, "hindsight")
    assert "0 of 0 triples" in said and "excluded" in said and "b_max 5" in said  # W = 5 is not below 5
    assert state == "not tested: every range excludes the best W"
