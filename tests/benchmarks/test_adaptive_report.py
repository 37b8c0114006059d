"""The report of adaptive merging on made-up cells, whose verdicts are known."""

from __future__ import annotations

import dataclasses
import json

import pytest

NAMES = ("a", "b", "c")
SEEDS = (0, 1)
LEARNED = {"how": "learned", "per_class": 1, "grain": "adapter", "start": "scale", "head": "random", "b_max": 3.0}


def row(test, seed=0, domains=NAMES, head="random", validation=None, **settings):
    scores = dict.fromkeys(NAMES, test) if isinstance(test, float) else test
    cell = {"seed": seed, "domains": list(domains), "head": head, "order": 0, **settings}
    return {
        "cell": cell, "test": scores, "validation": dict.fromkeys(NAMES, validation or 0.5), "device": "cpu", "terms": 10**6,
        "rows_tested": dict.fromkeys(NAMES, 30), "seconds": {"learn": 1.0, "terms": 0.5, "set": 0.1, "all": 2.0},
        "weights": dict.fromkeys(domains, 0.5 + 0.1 * seed), "moved": 0.3, "memory": 10**9,
    }  # fmt: skip


def made_up(cells):
    """W = 0.25 is best and large W collapses; learning is level with the best, but for DARE-TIES, where it is far behind."""
    rows = []
    for seed in SEEDS:
        noise = 0.004 * seed
        rows += [row(0.2, seed, how="base"), row(0.75 + noise, seed, how="own"), row(0.8 + noise, seed, how="joint")]
        for rule in cells.RULES:
            for space in cells.SPACES:
                fall = 0.25 if space == "factors" else 0.05
                for weight in cells.GRID:
                    score = 0.7 + noise - fall * abs(weight - 0.25) if weight < 2 else 0.1
                    rows.append(row(score, seed, rule=rule, space=space, how="fixed", weight=weight))
                for b_max in cells.B_MAX:
                    settings = LEARNED | {"rule": rule, "space": space, "b_max": b_max}
                    better = {"linear": 0.0, "ties": 0.01, "dare_ties": -0.2}[rule]
                    rows.append(
                        row(0.69 + noise * (1 + b_max / 10) + better, seed, validation=0.6 + better, **settings)
                    )
                if space == "factors":
                    cross = {"cross_over_sum": 1.7, "merged": 4.0}
                    rows.append(row(0.1, seed, rule=rule, space=space, how="geometry") | cross | {"test": {}})
        for rule, space in cells.CHOSEN:
            for domains in (("a",), ("a", "b"), ("b",), ("b", "c"), ("c",)):
                rows.append(row(0.6, seed, domains, **LEARNED, rule=rule, space=space))
            for grain, gain in (("adapter", 0.0), ("layer", 0.03)):
                settings = LEARNED | {"rule": rule, "space": space, "per_class": 20, "grain": grain}
                rows.append(row(0.7 + gain + noise * (1 + gain), seed, **settings))
    return rows


@pytest.fixture
def page(harness):
    rows = made_up(harness.cells)
    return harness.report.build(
        "emoji", {"emoji4": harness.results.Cells("emoji4", rows), "emoji7": harness.results.Cells("emoji7", [])}
    )


def verdict(page, words):
    return next(v for v in page[1] if words in v[0])


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


def test_a_seed_counts_once_however_many_draws_it_has(harness):
    """Seed 0 has three draws (0.5, 0.6, 0.7), seed 1 one (0.65); only the table's cells have draws."""
    rows = []
    for seed, draws in ((0, (0.5, 0.6, 0.7)), (1, (0.65,))):
        for weight in (0.25, 1.0):
            rows.append(row(0.55 + 0.05 * seed, seed, rule="ties", space="delta", how="fixed", weight=weight))
        for draw, score in enumerate(draws):
            settings = LEARNED | {"rule": "ties", "space": "delta"} | ({"draw": draw} if draw else {})
            rows.append(row(score, seed, **settings))
        rows.append(row(0.7, seed, **LEARNED | {"rule": "ties", "space": "delta", "grain": "layer"}))
        rows.append(row(0.8, seed, how="joint"))
    built = harness.report.build(
        "emoji", {"emoji4": harness.results.Cells("emoji4", rows), "emoji7": harness.results.Cells("emoji7", [])}
    )
    text = built[0]
    table, controls, buffers = (text.split(f"## {heading}")[1].split("## ")[0] for heading in (
        "The poster's table", "Learned against its controls", "Buffer size"
    ))  # fmt: skip
    assert "| 62.5 ± 3.5 |" in table  # of 60 and 65, not of four cells (61.25)
    assert "mean over its draws of the buffer's rows (1 to 3)" in table and "deviation of 10.0 points" in table
    assert "| TIES, delta | 3 | 1 | +5.0 [+5.0, +5.0]" in controls
    assert "| by adapter | 57.5 ± 10.6 |" in buffers  # draw 0: 50 and 65
    assert "| layer - adapter | +12.5" in buffers
    assert "ties: +5.0 [+5.0, +5.0]" in verdict(built, "alpha_0")[1]
    without = [r for r in rows if not r["cell"].get("draw")]
    found = {"emoji4": harness.results.Cells("emoji4", without), "emoji7": harness.results.Cells("emoji7", [])}
    assert "draws of the" not in harness.report.build("emoji", found)[0].split("## The poster's table")[1]


def test_starts_are_compared_where_all_were_run_and_not_chosen_from(harness):
    rows = []
    for seed in (0, 1, 2):
        for start, score in (("scale", 0.5), ("match", 0.52 + 0.002 * seed), ("near", 0.9)):
            for rule in ("ties", "linear"):
                if start != "near" or (rule == "ties" and seed < 2):
                    settings = LEARNED | {"rule": rule, "space": "delta", "start": start}
                    rows.append(row(0.6, seed, validation=score + (0.3 if rule == "linear" else 0.0), **settings))
        rows.append(row(0.8, seed, how="joint"))
    cells = harness.results.Cells("emoji4", rows)
    text, _, _ = harness.report.build("emoji", {"emoji4": cells, "emoji7": harness.results.Cells("emoji7", [])})
    section = text.split("## Where the learner begins")[1]
    assert "Over 2 pairs of a merge and a seed that all of these have: TIES, delta; seeds 0, 1." in section
    assert "| 50.0 ± 0.0 |  |" in section and "| 52.1 ± 0.1 | +2.1 [+0.8, +3.4] |" in section
    assert "| 90.0 ± 0.0 | +40.0 [+40.0, +40.0] |" in section and "match_pull" not in section
    bench = harness.tables.Bench(cells, NAMES, (NAMES,))
    assert bench.chosen(head="random")[0]["start"] == "scale"


def test_more_steps_are_compared_seed_by_seed_and_ranks_have_their_columns(harness):
    rows = []
    many = LEARNED | {"rule": "ties", "space": "delta", "per_class": 20, "grain": "layer"}
    for seed in (0, 1, 2):
        rows.append(row(0.6, seed, validation=0.5, **many))
        long = many | {"start": harness.cells.LONG}
        rows.append(row(0.6 + 0.02 * seed, seed, validation=0.55, **long | ({} if seed else {"grain": "module"})))
        rows.append(row(0.5 + 0.1 * seed, seed, **LEARNED | {"rule": "ties", "space": "delta"}))
        for rank in (8, 32) if seed == 1 else ():
            rows.append(row(0.5 + rank / 100, seed, **LEARNED | {"rule": "ties", "space": "delta", "rank": rank}))
        rows.append(row(0.8, seed, how="joint"))
    cells = harness.results.Cells("emoji4", rows)
    text, _, _ = harness.report.build("emoji", {"emoji4": cells, "emoji7": harness.results.Cells("emoji7", [])})
    section = text.split("## More steps")[1].split("## ")[0]
    assert (
        "| TIES, delta, by layer | 50.0 ± 0.0 | 55.0 ± 0.0 | +5.0 [+5.0, +5.0] | 60.0 ± 0.0 | 63.0 ± 1.4 | +3.0"
        in section
    )
    assert "by module" not in section  # which has none of 60 steps
    section = text.split("## What the cut")[1].split("## ")[0]
    assert "| uncut | rank 8 | rank 32 | 8 - uncut | 32 - uncut |" in section
    assert "| TIES, delta | 60.0 | 58.0 | 82.0 | -2.0 (one seed) | +22.0 (one seed) |" in section
    bench = harness.tables.Bench(cells, NAMES, (NAMES,))
    assert bench.chosen(head="random")[0]["start"] == "scale"


def test_merges_are_held_against_training_on_their_rows_alone(harness):
    rows = [row(0.8, seed, how="joint") for seed in range(3)]
    for seed in range(3):
        usual = LEARNED | {"rule": "ties", "space": "delta"}
        rows.append(row(0.9, seed, validation=0.9, **usual))  # of one row a class: of no concern here
        rows.append(row(0.6 + 0.01 * seed, seed, validation=0.6, **usual | {"per_class": 20, "grain": "layer"}))
        rows.append(row(0.7, seed, validation=0.5, **usual | {"per_class": 20}))
        rows += [row(score, seed, how="few", per_class=k) for k, score in ((5, 0.3), (20, 0.4))]
    found = {"emoji4": harness.results.Cells("emoji4", rows), "emoji7": harness.results.Cells("emoji7", [])}
    built = harness.report.build("emoji", found)
    _, said, state = verdict(built, "on as many rows alone")
    assert (
        said == "TIES, delta, by layer: 61.0 ± 1.0 against 40.0 ± 0.0, +21.0 [+18.5, +23.5] (3 seeds)"
        and state == "met"
    )
    assert "| one adapter trained on 5 rows a class of each domain alone, 60 steps |  | 30.0 ± 0.0 |" in built[0]


def test_a_configuration_is_chosen_by_validation_rows_among_those_of_three_seeds(harness):
    def best(*some):
        rows = [
            row(0.6, seed, validation=score, **LEARNED | {"rule": "ties", "space": "delta", **more})
            for score, seeds, more in some
            for seed in seeds
        ]
        return harness.tables.Bench(harness.results.Cells("emoji4", rows), NAMES, (NAMES,)).chosen(head="random")[0]

    usual, layer, long = (0.5, range(5), {}), {"grain": "layer"}, {"start": harness.cells.LONG}
    assert best(usual, (0.6, range(3), layer))["grain"] == "layer"
    assert best(usual, (0.6, range(2), layer))["grain"] == "adapter", "two seeds are too few"
    assert best((0.5, range(2), {}), (0.6, range(2), layer))["grain"] == "layer", "where none has three"
    assert best(usual, (0.9, range(5), long))["start"] == "scale", "not a default"


def test_growth_of_other_adapters_stays_and_that_of_the_page_s_own_does_not(harness, tmp_path, capsys, monkeypatch):
    """text20 has adapters of its own; emoji7's are emoji4's, which may have been trained again."""
    docs, cells = tmp_path / "docs", tmp_path / "cells"
    docs.mkdir()
    every = [json.loads(json.dumps(one)) for one in made_up(harness.cells)]
    plan = harness.plan
    bench = plan.BENCHES["emoji7"]
    cell = next(c for g in plan.groups(bench, bench.stream()) for c in g.cells if c.how == "learned")
    grown = row(0.6, **{k: v for k, v in dataclasses.asdict(cell).items() if v not in (None, "")})
    words = ["emoji", "--docs", str(docs), "--cells", str(cells), "--write"]

    def written():
        assert harness.report.main(words) == 0
        kept = json.loads((docs / "adaptive-emoji.json").read_text())["cells"]["emoji7"]
        return len(kept), "no new cells of emoji7: the 1 that adaptive-emoji.json has stay" in capsys.readouterr().out

    for name, some in (("emoji4", every), ("emoji7", [grown])):
        (cells / name).mkdir(parents=True)
        for n, one in enumerate(some):
            (cells / name / f"{n}.json").write_text(json.dumps(one))
    assert written() == (1, False)
    assert "too few cells*. 1 of its cells, fewer than three sizes" in (docs / "adaptive-emoji.md").read_text()
    (cells / "emoji7/0.json").unlink()
    with monkeypatch.context() as m:
        m.setitem(harness.report.BENCHES, "emoji7", dataclasses.replace(bench, share="others"))
        assert written() == (1, True)
    assert written() == (0, False)
    assert written() == (0, False)


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


def test_the_command_writes_pages_and_makes_them_again(harness, tmp_path, monkeypatch, capsys):
    cells = tmp_path / "cells/emoji4"
    cells.mkdir(parents=True)
    odd = row(0.1, rule="ties", space="delta", how="fixed", weight=0.123)  # of a part that the plan no longer has
    for n, one in enumerate([*made_up(harness.cells), odd]):
        (cells / f"{n}.json").write_text(json.dumps(one | {"correct": {"a": "01"}}))
    docs = tmp_path / "docs"
    docs.mkdir()
    words = ["emoji", "--docs", str(docs), "--write"]
    assert harness.report.main([*words, "--cells", str(cells.parent)]) == 0
    assert "emoji: collapse" in capsys.readouterr().out
    first = (docs / "adaptive-emoji.md").read_text()
    assert sorted(p.name for p in docs.iterdir()) == [f"adaptive-emoji.{e}" for e in ("json", "md", "png")]
    kept = (docs / "adaptive-emoji.json").read_text()
    assert '"correct"' not in kept and "0.123" not in kept
    assert "**Unfinished.** Of emoji4's" in first and "growth with the number of domains (" in first
    assert harness.report.main([*words, "--again"]) == 0
    assert (docs / "adaptive-emoji.md").read_text() == first


def test_cells_are_added_to_those_of_the_page_where_the_adapters_are_the_same(harness, tmp_path, capsys):
    from loralloy.errors import LoralloyError

    docs, cells = tmp_path / "docs", tmp_path / "cells/emoji4"
    docs.mkdir()
    cells.mkdir(parents=True)
    every = [json.loads(json.dumps(one)) for one in made_up(harness.cells)]
    alone = [one for one in every if one["cell"]["how"] in ("own", "joint")]
    late = [one for one in every if one["cell"]["how"] == "learned"][-3:]
    words = ["emoji", "--docs", str(docs), "--write", "--cells", str(cells.parent)]

    def lay(some):
        for path in cells.glob("*.json"):
            path.unlink()
        for n, one in enumerate(some):
            (cells / f"{n}.json").write_text(json.dumps(one))

    lay(every)
    assert harness.report.main(words) == 0
    whole = (docs / "adaptive-emoji.md").read_text()
    lay([one for one in every if one not in late])
    assert harness.report.main(words) == 0
    part = (docs / "adaptive-emoji.md").read_text()
    assert part != whole
    seeds = {one["cell"]["seed"] for one in late}
    same = [one for one in alone if one["cell"]["seed"] in seeds]
    lay([*late, *same])
    assert harness.report.main([*words, "--add"]) == 0
    assert (docs / "adaptive-emoji.md").read_text() == whole

    lay(late)
    with pytest.raises(LoralloyError, match=r"nothing shows that .* is of the page's adapters; run.py --beside"):
        harness.report.main([*words, "--add"])
    other = json.loads(json.dumps(same))
    domain = next(iter(other[0]["test"]))
    other[0]["test"][domain] += 0.01
    lay([*late, *other])
    with pytest.raises(LoralloyError, match="is not what the page has: other adapters"):
        harness.report.main([*words, "--add"])
    assert (docs / "adaptive-emoji.md").read_text() == whole


def test_what_a_page_lacks_altogether_is_added_and_a_timed_bench_is_of_one_run(harness):
    joined = harness.results.joined
    every = made_up(harness.cells)
    first, second = ([one for one in every if one["cell"]["seed"] == seed] for seed in SEEDS)
    assert len(joined(first, second, "x")) == len(every)  # the page has nothing of that seed to compare with
    assert joined(first, [], "x") == first
    growth = [one for one in every if one["cell"]["how"] == "learned"]
    assert joined(growth, growth[:2], "x") == growth[:2] and joined(growth, [], "x") == growth
