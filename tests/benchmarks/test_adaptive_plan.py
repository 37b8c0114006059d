"""The harness of adaptive merging: what it plans, and what it makes of a tiny stream, stopped and started again."""

from __future__ import annotations

import dataclasses
import json
import time
from types import SimpleNamespace

import pytest

from helpers import relative
from loralloy.errors import LoralloyError

LINEAR = (("linear", "factors"), ("linear", "delta"))


@pytest.fixture
def small(harness, monkeypatch):
    """A bench of few cells: two fixed weights, one b_max, task arithmetic."""
    plan = harness.plan
    parts = {"own": 1, "a": 1, "seq": 1, "seqs": 1, "alone": 1, "joint": 1, "few": 1}
    bench = dataclasses.replace(plan.BENCHES["emoji4"], parts=parts, merges=LINEAR, validation=4, toy_steps=2)
    monkeypatch.setitem(plan.BENCHES, "emoji4", bench)
    monkeypatch.setattr(harness.parts, "GRID", (0.5, 1.0))
    monkeypatch.setattr(harness.parts, "B_MAX", (3.0,))
    return harness


def work(harness, out, *words, until=600.0):
    """One call's only process; the cells by name."""
    options = harness.run.parser().parse_args(
        ["--bench", "emoji4", "--out", str(out), *words, "--worker", "0", str(time.time() + until), f"run{time.time()}"]
    )
    harness.worker.Worker(options).run()
    return {p.stem: json.loads(p.read_text()) for p in (out / "cells").glob("*/*.json")}


def test_every_group_comes_after_what_it_needs_and_no_cell_twice(harness):
    plan = harness.plan
    bench = plan.BENCHES["emoji4"]
    groups = plan.groups(bench, bench.stream())
    made, names = set(), set()
    for group in groups:
        assert {job.name for job in group.needs} <= made, group.name
        for job in group.jobs:
            assert job.before is None or job.before.name in made
            made.add(job.name)
        assert not names & {cell.name for cell in group.cells}
        names |= {cell.name for cell in group.cells}
        if group.cells and group.cells[0].rule:  # one process makes the terms of a group once
            assert len({(c.domains, c.rule, c.space, c.head, c.seed) for c in group.cells}) == 1
    places = [harness.parts.rank(g)[0] for g in groups]
    assert places == sorted(places)
    files = [g.name for g in groups]
    assert len(files) == len(set(files)), "two groups share a lock"


def test_draws_are_the_learned_cells_of_the_table_on_other_rows(harness):
    cells, plan = harness.cells, harness.plan
    bench = plan.BENCHES["emoji4"]
    by: dict[str, set] = {}
    for group in plan.groups(bench, bench.stream()):
        by.setdefault(group.part, set()).update(group.cells)
    first = {c for c in by["a"] if c.how == "learned" or (c.how == "fresh" and c.per_class == 1)}
    assert by["draws"] == {dataclasses.replace(c, draw=d) for c in first for d in cells.DRAWS}
    assert {c.name for c in by["draws"]} == {f"{c.name}-d{d}" for c in first for d in cells.DRAWS}
    learned = {c for c in first if c.how == "learned"}
    assert by["near"] == {dataclasses.replace(c, draw=d, start="near") for c in learned for d in (0, *cells.DRAWS)}
    assert by["noise"] == {dataclasses.replace(c, start=cells.NOISY) for c in by["near"]}
    begun_wide = {c for some in by.values() for c in some if c.start == "scale" and c.per_class < 4}
    assert by["noise"] | by["noisy"] == {dataclasses.replace(c, start=cells.NOISY) for c in begun_wide}
    assert all(
        c.draw == 0 for part, some in by.items() if part not in ("draws", "near", "noise", "noisy") for c in some
    )
    assert {c.start for c in by["v"]} == set(cells.STARTS) - {"near"}
    assert {c.rank for c in by["r"]} == {2, 6} and {c.start for c in by["long"]} == {cells.LONG}
    assert {(c.rule, c.space, c.grain, c.per_class) for c in by["layers"]} == {("linear", "delta", "layer", 20)}
    assert (
        len({c.domains for c in by["layers"]} | {tuple(bench.stream().names)}) == 2 * 3 - 1
    )  # two orders of three, one end
    best = {(c.grain, c.head): set() for c in by["best"]}
    for c in by["best"]:
        best[c.grain, c.head].add(c.domains)
    names = tuple(bench.stream().names)
    assert best["module", "random"] | {names} == {c.domains for c in by["layers"]} | {names}
    assert len(best["layer", "learned"] | {names}) == 3, "the head's own order alone"
    plain = {dataclasses.replace(c, start="scale") for c in by["long"]}
    assert plain < by["large"], "what longer learning is compared with"
    assert {dataclasses.replace(c, start="scale") for c in by["more"]} <= by["c"] | by["large"], (
        "and noise with more rows"
    )
    assert list(harness.parts.PARTS)[-2] == "v" and "v" not in plan.BENCHES["multiemo4"].parts


def test_a_draw_is_other_rows_of_the_same_classes(small, tmp_path):
    plan = small.plan
    bench = plan.BENCHES["emoji4"]
    site = small.work.Site(bench, bench.stream(), tmp_path)
    zero, one, two = (site.rows(0, "abc", 1, draw=d) for d in (0, 1, 2))
    assert [r.stratum for r in zero] == [r.stratum for r in one] == [r.stratum for r in two]
    assert len({tuple(r.id for r in rows) for rows in (zero, one, two)}) == 3
    cell = small.cells.learned(0, "abc", "ties", "delta", draw=2)
    assert [r.id for r in site._begin(cell)] == [r.id for r in two]
    new = [[r.id for r in site._begin(small.cells.fresh(0, "abc", "ties", "delta", draw=d))] for d in (0, 1)]
    assert new[0] != new[1] and not {i for ids in new for i in ids} & {r.id for r in (*zero, *one, *two)}
    assert [r.id for r in site.rows(1, "abc", 1)] not in [[r.id for r in rows] for rows in (zero, one, two)]
    experience = site.main.experiences["a"]
    from loralloy.continual.buffer import MemoryBuffer

    alone = MemoryBuffer(1, seed=0)  # draw 0 is the seed's own, as it was before there were others
    alone.add("a", *site.main.labels(experience, "train"))
    assert [r.id for r in alone.rows] == [r.id for r in zero if r.domain == "a"]


def test_the_starts_that_are_tried(harness):
    from types import SimpleNamespace

    live = SimpleNamespace(matching_scale=lambda: 0.8)

    def begun(start, b_max=3.0):
        return harness.strategies.begun(harness.cells.learned(0, "abc", "ties", "delta", b_max, start=start), live)

    assert begun("scale").start == "scale" and begun("zero").start == "zero"
    assert begun("scale").regularisation is None and begun("scale_pull").regularisation == 1.0
    assert begun("match").start == 0.8 and begun("match", 0.5).start == pytest.approx(0.475)
    assert begun("near").scales == "near" and begun("scale").scales == "wide"  # the library's, whatever the rows
    assert begun(harness.cells.NOISY).label_noise == 0.1 and begun("near").label_noise == 0 == begun("zero").label_noise
    from loralloy.weighting.learned import config

    assert harness.tables.ENOUGH == config.ENOUGH and begun(harness.cells.NOISY).label_noise == config.NOISE
    assert begun(harness.cells.NOISY_MORE) == dataclasses.replace(begun("scale"), label_noise=0.1)
    assert begun("near_still").steps == 0 and begun("near_still").scales == begun("near").scales
    assert begun("match_pull").regularisation == 1.0 and begun("match_pull").steps == begun("scale").steps
    long = begun(harness.cells.LONG)
    assert (long.start, long.steps, long.patience) == ("scale", 4 * begun("scale").steps, 4 * begun("scale").patience)


def test_cells_are_right_resumed_and_failures_stay_alone(small, tiny, tmp_path, monkeypatch, capsys):
    import torch

    from loralloy.adapter import Adapter
    from loralloy.bank import Bank
    from loralloy.continual.workshop import make_workshop
    from loralloy.live import LiveModel
    from loralloy.weights import Weights

    out, strategies = tmp_path / "out", small.strategies
    real, asked = strategies.coefficients, []

    def coefficients(site, cell, *rest):
        asked.append(cell.name)
        if cell.weight == 0.5 and cell.space == "delta":
            raise RuntimeError("no such luck")
        return real(site, cell, *rest)

    monkeypatch.setattr(strategies, "coefficients", coefficients)
    cells = work(small, out)
    assert "FAILED: no such luck" in capsys.readouterr().out
    assert len(list((out / "errors").glob("*.txt"))) == 1
    failed = "s0-a+b+c-linear-delta-fixed-w0.5"
    assert failed not in cells
    # everything else is there: 2 spaces x (2 fixed, 1 learned, 1 fresh, geometry) less one, 2 fresh of 5 rows a class in
    # delta space; base, own, joint; 2 orders; 2 of adapters trained on few rows
    assert len(cells) == 2 * 5 - 1 + 2 + 3 + 2 + 2

    stream = small.plan.BENCHES["emoji4"].stream()
    shop = make_workshop(stream)
    shop.begin(0, None)
    bank = Bank([Adapter.load(out / "adapters/emoji/s0" / n, n) for n in "abc"])
    live = LiveModel(shop.model, bank)  # sums the adapters' outputs: neither terms nor merged weights
    with live.compose(Weights(dict.fromkeys("abc", 1.0))):
        want = {n: "".join("01"[r] for r in shop.evaluate(shop.experiences[n]).correct) for n in "abc"}
    live.remove()
    one = cells["s0-a+b+c-linear-delta-fixed-w1"]
    assert one["correct"] == want
    assert one["test"]["b"] == want["b"].count("1") / len(want["b"])

    parts = {n: [bank[n][m].dense(torch.float64) for m in bank.modules] for n in "abc"}
    own = sum(float(sum(parts[n][i] for n in "abc").norm()) ** 2 for i in range(len(bank.modules)))
    whole = 0.0
    for m in bank.modules:
        roots = [
            (bank[n][m].A.double() * bank[n][m].scaling ** 0.5, bank[n][m].B.double() * bank[n][m].scaling ** 0.5)
            for n in "abc"
        ]
        cross = sum(b for _, b in roots) @ sum(a for a, _ in roots) - sum(b @ a for a, b in roots)
        whole += float(cross.norm()) ** 2
    told = torch.tensor(cells["s0-a+b+c-linear-factors-geometry"]["cross_over_sum"])
    assert relative(told, torch.tensor((whole / own) ** 0.5)) < 1e-4

    learned = cells["s0-a+b+c-linear-delta-learned-b3-k1-adapter-scale"]
    assert learned["rows"] == 9 and learned["steps"] == 2 and set(learned["weights"]) == set("abc")
    few, joint = (
        json.loads((out / f"adapters/emoji/s0/{name}/metrics.json").read_text())["training"]
        for name in ("few5", "joint")
    )
    assert (
        few["rows"] == 5 * 9 < joint["rows"] and few["hyperparameters"]["limit"] == 15
    )  # three classes, three domains
    assert few["steps"] == 3 and joint["steps"] > 3, "a step for each domain, where a toy of a learner takes two"
    chain = cells["s0-a+b+c-seq-o1"]
    assert len(chain["matrix"]) == 3 and chain["matrix"][-1] == chain["test"]

    before = {p: p.stat().st_mtime_ns for p in (out / "cells").glob("*/*.json")}
    asked.clear()
    monkeypatch.setattr(strategies, "coefficients", lambda *a: (asked.append(a[1].name), real(*a))[1])
    again = work(small, out)
    assert asked == [failed] and failed in again
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_cells_made_otherwise_are_not_taken_for_these(small, tmp_path, capsys):
    made = work(small, tmp_path / "out", "--parts", "alone")
    assert made.keys() == {"s0-a+b+c-base"}
    (tmp_path / "out/cells/emoji4/s0-a+b+c-base.json").unlink()
    assert work(small, tmp_path / "out", "--parts", "alone", "--toy") == {}
    said = capsys.readouterr().out
    assert (
        "emoji4: cannot be opened" in said and "was made with another training (emoji.json); give another --out" in said
    )
    assert work(small, tmp_path / "out", "--parts", "alone").keys() == made.keys()


def test_a_toy_has_a_folder_of_its_own(small, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(small.run, "OUT", tmp_path / "adaptive")
    monkeypatch.setattr(small.run, "listed", lambda options: seen.append(options.out) or 0)
    monkeypatch.setattr(small.run, "ROOT", tmp_path)
    for words in (["--list"], ["--list", "--toy"], ["--list", "--toy", "--out", "there"]):
        small.run.main(words)
    assert [str(p) for p in seen] == [str(tmp_path / "adaptive"), str(tmp_path / "adaptive/toy"), "there"]


def test_nothing_is_begun_after_the_deadline(small, tmp_path):
    assert work(small, tmp_path / "out", until=-1) == {}
    assert not (tmp_path / "out/adapters").exists()


def test_parts_whose_adapters_nobody_trains_end_the_call(small, tmp_path):
    assert work(small, tmp_path / "out", "--parts", "a", "alone").keys() == {"s0-a+b+c-base"}


def test_cells_of_a_folder_are_of_one_set_of_adapters(harness, tmp_path):
    """Adapters that are trained again must be what the cells that lie there were made of."""
    import stamp

    site = SimpleNamespace(out=tmp_path, bench=SimpleNamespace(name="emoji4"))
    stamp.check_adapters(site, {"s0/noto": "aa", "s0/joint": "bb"})
    stamp.check_adapters(site, {"s0/noto": "aa"})
    stamp.check_adapters(site, {"s1/noto": "cc"})
    with pytest.raises(LoralloyError, match=r"another s0/noto \(emoji4.adapters.json\); give another --out"):
        stamp.check_adapters(site, {"s0/noto": "dd", "s1/noto": "cc"})
    kept = json.loads((tmp_path / "cells/emoji4.adapters.json").read_text())
    assert kept == {"s0/noto": "aa", "s0/joint": "bb", "s1/noto": "cc"}


def test_what_the_page_has_is_left_out_with_the_trainings_that_nothing_needs(harness, tmp_path):
    everything = harness.worker.Worker.wanted(harness.run.parser().parse_args(["--bench", "emoji4"]))
    late = [c for g in everything if g.part == "r" and g.seed == 1 for c in g.cells]
    rows = [{"cell": dataclasses.asdict(c)} for g in everything for c in g.cells if c not in late]
    (tmp_path / "adaptive-emoji.json").write_text(json.dumps({"cells": {"emoji4": rows}}))
    words = ["--bench", "emoji4", "--beside", str(tmp_path)]
    left = harness.worker.Worker.wanted(harness.run.parser().parse_args(words))
    cells = [c for g in left for c in g.cells]
    assert [c for c in cells if c.how not in ("own", "joint")] == late
    assert {(c.how, c.seed, c.head) for c in cells if c not in late} == {("own", 1, "random"), ("joint", 1, "random")}
    jobs = {job.name for g in left for job in g.jobs}
    needed = {job.name for g in left for job in g.needs}
    assert needed <= jobs and not any("-then-" in name for name in jobs) and any(g.part == "own" for g in left)
    places = [harness.parts.rank(g)[0] for g in left]
    assert places == sorted(places)

    def counted(*more):
        some = harness.worker.Worker.wanted(harness.run.parser().parse_args([*words, *more]))
        return [c for g in some for c in g.cells]

    assert counted("--parts", "r") == cells and not counted("--parts", "alone") and not counted("--seeds", "0")
    with pytest.raises(LoralloyError, match=r"no adaptive-.*json there has cells of emoji4"):
        harness.worker.Worker.wanted(harness.run.parser().parse_args([*words[:-1], str(tmp_path / "none")]))
