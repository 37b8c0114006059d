"""What the adaptive report compares and chooses by: draws, starts, steps, few rows, validation rows."""

from __future__ import annotations

import pytest

from adaptive_pages import LEARNED, NAMES, row, verdict


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


def test_starts_are_compared_run_by_run_and_only_the_library_s_are_chosen_from(harness):
    rows = []
    for seed in (0, 1, 2):
        for start, score in (("scale", 0.5), ("match", 0.52 + 0.002 * seed), ("near", 0.9), ("near_noise", 0.95)):
            for rule in ("ties", "linear"):
                if not start.startswith("near") or (rule == "ties" and seed < 2):
                    settings = LEARNED | {"rule": rule, "space": "delta", "start": start}
                    rows.append(row(0.6, seed, validation=score + (0.3 if rule == "linear" else 0.0), **settings))
        rows.append(row(0.8, seed, how="joint"))
    again = LEARNED | {"rule": "ties", "space": "delta", "draw": 1}
    rows += [row(0.6, 0, validation=0.4, **again), row(0.6, 0, validation=0.9, **again | {"start": "near"})]
    rows += [row(0.6, 2, validation=0.9, **LEARNED | {"rule": "linear", "space": "delta", "start": "near_noise"})]
    cells = harness.results.Cells("emoji4", rows)
    text, _, _ = harness.report.build("emoji", {"emoji4": cells, "emoji7": harness.results.Cells("emoji7", [])})
    section = text.split("## Where the learner begins")[1]
    assert "| 6 of 3 seeds, 1 draw | 65.0 ± 0.0 | 67.2 ± 0.2 | +2.2 [+1.7, +2.7] | 50.0 | 52.0 |" in section
    assert "| 3 of 2 seeds, 2 draws | 47.5 ± 3.5 | 90.0 ± 0.0 | +42.5 [+10.7, +74.3] | 40.0 | 90.0 |" in section
    assert (
        "| near_noise | near | 2 of 2 seeds, 1 draw | 90.0 ± 0.0 | 95.0 ± 0.0 | +5.0 [+5.0, +5.0] | 90.0 | 95.0 |"
        in section
    )
    assert "match_pull" not in section
    assert "from 0.4 to 1.8 times" in text.split("## The poster's table")[1].split("## ")[0]
    bench = harness.tables.Bench(cells, NAMES, (NAMES,))
    assert bench.start(1) == "scale", "near_noise is not there for all"
    assert bench.chosen(head="random")[0]["start"] == "scale", "all others are a check alone"


def test_the_tables_begin_as_the_library_does_where_a_page_has_those_cells(harness):
    """All that is learned from fewer than four rows a class, or none of it; with more rows and from c = 0 it is as it was."""
    rows, few = [], LEARNED | {"rule": "ties", "space": "delta"}
    layer, fresh, zero = few | {"per_class": 2, "grain": "layer"}, few | {"how": "fresh"}, few | {"start": "zero"}
    for seed in (0, 1, 2):
        for start, score in (("scale", 0.5), (harness.cells.NOISY, 0.7), ("near", 0.9)):
            rows += [row(score + 0.1 * draw, seed, **few | {"start": start, "draw": draw}) for draw in (0, 1)]
            if start != "near":
                checked = 0.6 if start == "scale" else 0.62 + 0.01 * seed
                rows += [row(score - 0.01, seed, validation=checked, **of | {"start": start}) for of in (layer, fresh)]
                rows.append(row(score, seed, validation=0.55, **few | {"per_class": 2, "start": start}))
        rows += [row(0.3, seed, **zero), row(0.4, seed, **few | {"per_class": 20})]
        rows.append(row(0.6, seed, how="fixed", rule="ties", space="delta", weight=1.0, head="random"))
    bench = harness.tables.Bench(harness.results.Cells("emoji4", rows), NAMES, (NAMES,))
    assert (bench.start(1), bench.start(2), bench.start(5)) == (harness.cells.NOISY, harness.cells.NOISY, "scale")
    assert bench.drawn("ties", "delta") == pytest.approx({0: 0.75, 1: 0.75, 2: 0.75})
    assert bench.learned("ties", "delta") == pytest.approx({0: 0.7, 1: 0.7, 2: 0.7})
    assert bench.learned("ties", "delta", per_class=20) == pytest.approx({0: 0.4, 1: 0.4, 2: 0.4})
    assert bench.chosen(head="random")[0] == layer | {"start": harness.cells.NOISY}
    text, _, _ = harness.report.build("emoji", {"emoji4": bench.cells, "emoji7": harness.results.Cells("emoji7", [])})
    table = text.split("## The poster's table")[1].split("## ")[0]
    assert "from 0.7 to 1.4 times" in table and "one answer of ten" in table and "75.0 ± 0.0" in table
    controls = text.split("## Learned against its controls")[1].split("## ")[0]
    assert "| +15.0 [+15.0, +15.0] | -30.0 [-30.0, -30.0] |" in controls
    assert "| 75.0 ± 0.0 | 69.0 ± 0.0 | -6.0 [-6.0, -6.0] |" in text.split("## Rows that no adapter")[1]
    starts = text.split("## Where the learner begins")[1].split("## ")[0]
    assert "| by adapter | 2 | +0.0 [+0.0, +0.0] | 3 |" in starts
    assert "| by layer | 2 | +3.0 [+0.5, +5.5] | 3 |" in starts and "| by layer | 1 |" not in starts
    assert "| layer - adapter, validation rows |  | +8.0 [+5.5, +10.5] |  |  |" in text.split("## Buffer size")[1]
    for i, one in enumerate(rows):
        if one["cell"].get("how") == "fresh" and one["cell"]["start"] == harness.cells.NOISY:
            lacking = harness.results.Cells("emoji4", rows[:i] + rows[i + 1 :])
    assert harness.tables.Bench(lacking, NAMES, (NAMES,)).start(1) == "scale", "one is not there"


def test_more_steps_and_noise_are_compared_seed_by_seed_and_ranks_have_their_columns(harness):
    rows = []
    many = LEARNED | {"rule": "ties", "space": "delta", "per_class": 20, "grain": "layer"}
    for seed in (0, 1, 2):
        rows.append(row(0.6, seed, validation=0.5, **many))
        long = many | {"start": harness.cells.LONG}
        rows.append(row(0.6 + 0.02 * seed, seed, validation=0.55, **long | ({} if seed else {"grain": "module"})))
        rows.append(row(0.61, seed, validation=0.48, **many | {"start": harness.cells.NOISY_MORE}))
        rows.append(row(0.5 + 0.1 * seed, seed, **LEARNED | {"rule": "ties", "space": "delta"}))
        for rank in (8, 32) if seed == 1 else ():
            rows.append(row(0.5 + rank / 100, seed, **LEARNED | {"rule": "ties", "space": "delta", "rank": rank}))
        rows.append(row(0.8, seed, how="joint"))
    cells = harness.results.Cells("emoji4", rows)
    text, _, _ = harness.report.build("emoji", {"emoji4": cells, "emoji7": harness.results.Cells("emoji7", [])})
    section = text.split("## More steps")[1].split("## ")[0]
    assert (
        "| TIES, delta, by layer | 20 | 50.0 ± 0.0 | 55.0 ± 0.0 | +5.0 [+5.0, +5.0] | 60.0 ± 0.0 | 63.0 ± 1.4 | +3.0"
        in section
    )
    assert "by module" not in section  # which has none of 60 steps
    section = text.split("## Label noise with more rows")[1].split("## ")[0]
    assert (
        "| 20 | 50.0 ± 0.0 | 48.0 ± 0.0 | -2.0 [-2.0, -2.0] | 60.0 ± 0.0 | 61.0 ± 0.0 | +1.0 [+1.0, +1.0] | 3 |"
        in section
    )
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
    assert "as a buffer of 5 a class holds (the first of each domain), 60 steps |  | 30.0 ± 0.0 |" in built[0]


def test_the_chosen_configuration_is_followed_over_the_experiences(harness):
    """Under the head of the first domain along the first order alone, and without forward transfer: it has no base."""
    order, rows = ("a", "b", "c"), [row(0.3, seed, how="base") for seed in range(3)]
    chosen = {"rule": "dare_ties", "space": "delta", "b_max": 5.0, "per_class": 1, "grain": "adapter"}
    lead = {"rule": "linear", "space": "delta", "b_max": 3.0, "per_class": 20, "grain": "layer", "head": "learned"}
    for seed in range(3):
        for t, score in ((1, 0.9), (2, 0.8), (3, 0.7)):
            rows.append(row(score - 0.01 * seed, seed, order[:t], **LEARNED | chosen))
            rows.append(row(score - 0.1, seed, order[:t], **LEARNED | lead))
    bench = harness.tables.Bench(
        harness.results.Cells("emoji4", rows), NAMES, (order, ("c", "a", "b")), (), (chosen, lead)
    )
    text = "\n".join(harness.streams.path_table(bench))
    assert "| learned, 1 a class, b_max = 5 | DARE-TIES, delta | 69.0 ± 1.0 | 79.0 ± 1.0 | 15.0 ± 0.0 |" in text
    line = next(one for one in text.splitlines() if "head of the first domain (first order)" in one)
    assert "| 60.0 ± 0.0 | 70.0 ± 0.0 | 15.0 ± 0.0 | -15.0 ± 0.0 |  | 3 |" in line
    assert harness.claims.forgetting(bench)[2].startswith("met in 0, not shown in 0, missed in 2 of 2")
    text = "\n".join(harness.streams.coefficients(bench))
    assert "delta space, learned, 1 a class, b_max = 5, 3 seeds" in text and "(first order), b_max = 3, 3 seeds" in text


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
