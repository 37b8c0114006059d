"""A suite's cells: the same whatever the batches, the processes and the kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from loralloy.errors import LoralloyError
from loralloy.evaluation.suite import Suite, parse_shard, run_suite
from loralloy.evaluation.suite import runner as runner_module
from loralloy.evaluation.suite.cells import cells_of, done, fingerprint, read_cell, write_cell
from loralloy.evaluation.suite.locks import lock, once
from loralloy.evaluation.suite.method import Row
from loralloy.evaluation.suite.run import Run
from loralloy.evaluation.suite.workbench import Workbench
from loralloy.evaluation.suite.worker import in_turn
from loralloy.retrieval import HashEmbedder

FEW = [
    "majority", "base", "perfect", {"name": "linear", "kind": "routed"},
    {"name": "ties", "kind": "routed", "rule": "ties", "space": "delta", "step": 0.25}, {"name": "mixture", "k": 2},
]  # fmt: skip


def cells_in(out):
    """name -> the cell without what may differ from run to run."""
    found = {}
    for path in sorted((out / "cells").glob("*.json")):
        cell = json.loads(path.read_text())
        for field in ("seconds", "cache", "adapter_bytes", "batch_size"):
            del cell[field]
        (cell["routing"] or {}).pop("fit_seconds", None)
        found[path.stem] = cell
    return found


def same_cells(a, b):
    """Equal but for rounding in the scores."""
    assert a.keys() == b.keys()
    for name in a:
        rows = [[{**r, "scores": None} for r in cell["rows"]] for cell in (a[name], b[name])]
        assert rows[0] == rows[1], name
        assert {**a[name], "rows": None} == {**b[name], "rows": None}
        for one, two in zip(a[name]["rows"], b[name]["rows"], strict=True):
            assert (one["scores"] or []) == pytest.approx(two["scores"] or [], abs=3e-4)


@pytest.fixture(scope="module")
def whole(write_suite, tmp_path_factory):
    """FEW, run at one go."""
    suite = Suite.load(write_suite(tmp_path_factory.mktemp("whole"), methods=FEW, rows={"default": 4, "ties": 2}))
    ran = run_suite(suite, show=False)
    return suite, ran


def test_every_cell_once(whole):
    suite, ran = whole
    names = {cell.name for cell in cells_of(suite)}
    # 3 methods that depend on neither query, scope nor seed; 3 that depend on all: 2 queries, 2 scopes, 2 seeds
    assert len(names) == 3 + 3 * 8 == ran.made and ran.kept == 0
    assert {p.stem for p in (suite.out / "cells").glob("*.json")} == names
    assert {"base__any__any__any", "perfect__any__in_domain__any", "linear__raw__leave_own_out__1"} <= names


def test_a_cell_says_what_it_is(whole):
    suite, _ = whole
    cell = read_cell(suite.out / "cells" / "ties__raw__in_domain__1.json")
    assert (cell["version"], cell["method"], cell["kind"], cell["space"]) == (1, "ties", "routed", "delta")
    assert cell["rule"].startswith("ties(density=0.2") and cell["rank"] == "max"
    assert (cell["query"], cell["scope"], cell["seed"], cell["rows_a_task"]) == ("raw", "in_domain", 1, 2)
    assert cell["settings"]["weigher"]["kind"] == "paper" and cell["settings"]["step"] == 0.25
    assert set(cell["seconds"]) == {"weigh", "compose", "answer", "wall"}
    assert cell["cache"]["hits"] + cell["cache"]["misses"] == len(cell["rows"]) == 6
    assert cell["adapter_bytes"]["mean"] > 0
    linear = read_cell(suite.out / "cells" / "linear__raw__in_domain__1.json")
    assert (
        linear["rank"] == "live"
        and linear["adapter_bytes"] is None
        and set(linear["cache"]) == {"hits", "misses", "answers"}
    )
    # fewer rows are the first rows: paired tests find them in the others
    assert [r["id"] for r in cell["rows"]] == [r["id"] for r in linear["rows"] if int(r["id"].rsplit("/", 1)[1]) < 2]


def test_again_does_nothing(whole, monkeypatch):
    suite, ran = whole
    before = {p.name: p.stat().st_mtime_ns for p in (suite.out / "cells").iterdir()}
    monkeypatch.setattr(runner_module, "run_cell", lambda *_: pytest.fail("it ran a cell that is done"))
    again = run_suite(suite, show=False)
    assert (again.made, again.kept) == (0, ran.made)
    assert {p.name: p.stat().st_mtime_ns for p in (suite.out / "cells").iterdir()} == before


@pytest.mark.parametrize("batch_size", [1, 64])
def test_batches_do_not_matter(whole, write_suite, tmp_path, batch_size):
    suite = Suite.load(write_suite(tmp_path, methods=FEW, rows={"default": 4, "ties": 2}, batch_size=batch_size))
    run_suite(suite, show=False)
    same_cells(cells_in(suite.out), cells_in(whole[0].out))


def test_shards_make_the_whole(whole, write_suite, tmp_path):
    suite = Suite.load(write_suite(tmp_path, methods=FEW, rows={"default": 4, "ties": 2}))
    made = [run_suite(suite, shard=(i, 3), show=False).made for i in (1, 2, 3)]
    assert sum(made) == whole[1].made and max(made) - min(made) <= 1
    same_cells(cells_in(suite.out), cells_in(whole[0].out))


def test_jobs_make_the_same_and_name_what_fails(whole, write_suite, tmp_path):
    """A cell that fails in one of the processes is named; the cells that can be made are made, and are the same."""
    wrong = {"name": "wrong", "kind": "routed", "weigher": {"kind": "paper", "k": -1}, "queries": ["raw"], "seeds": [1]}
    rows = {"default": 4, "ties": 2}
    suite = Suite.load(write_suite(tmp_path, methods=[*FEW, wrong | {"scopes": ["in_domain"]}], rows=rows))
    said = r"^cell wrong__raw__in_domain__1: .*k is -1"
    with pytest.raises(LoralloyError, match=said):
        run_suite(suite, jobs=2, show=False)
    assert not list((suite.out / "cache").glob("plan-*"))
    made = cells_in(suite.out)
    same_cells(made, {name: cell for name, cell in cells_in(whole[0].out).items() if name in made})
    assert len(made) > whole[1].made / 2  # the other process went on
    with pytest.raises(LoralloyError, match=said):
        run_suite(suite, show=False)
    with pytest.raises(LoralloyError, match="an embedder that is passed in stays in this process"):
        run_suite(suite, jobs=2, embedder=HashEmbedder(8))


def test_killed_and_resumed(whole, write_suite, tmp_path):
    """kill -9 in the middle, with processes side by side; what is there is whole, and the next run makes the rest."""
    path = write_suite(tmp_path, methods=FEW, rows={"default": 4, "ties": 2})
    suite = Suite.load(path)
    code = (
        "import sys, time; from loralloy.evaluation.suite import runner, Suite, run_suite; real = runner.run_cell\n"
        "def slow(*a): time.sleep(0.05); return real(*a)\n"
        "runner.run_cell = slow; run_suite(Suite.load(sys.argv[1]), show=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stderr=subprocess.DEVNULL)
    folder, deadline = suite.out / "cells", time.monotonic() + 90
    while len(list(folder.glob("*.json"))) < 4 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {p.name: p.read_bytes() for p in folder.glob("*.json")}
    assert 4 <= len(kept) < whole[1].made
    ran = run_suite(suite, show=False)
    assert ran.kept == len(kept) and ran.made == whole[1].made - len(kept)
    assert all((folder / name).read_bytes() == data for name, data in kept.items())
    same_cells(cells_in(suite.out), cells_in(whole[0].out))
    assert not [p for p in folder.iterdir() if ".new-" in p.name]


def test_what_changes_the_fingerprint(whole, write_suite, tmp_path, small):
    suite, _ = whole
    one = next(c for c in cells_of(suite) if c.name == "ties__raw__in_domain__1")
    base = next(c for c in cells_of(suite) if c.name.startswith("base"))
    bench = Workbench(suite)
    marks = fingerprint(one, bench), fingerprint(base, bench)

    def other(**fields):
        made = Suite.load(write_suite(tmp_path, methods=FEW, **{"rows": {"default": 4, "ties": 2}} | fields))
        bench = Workbench(made)
        found = [next(c for c in cells_of(made) if c.name == want) for want in (one.name, base.name)]
        return tuple(fingerprint(cell, bench) for cell in found)

    assert other() == marks == other(batch_size=7) == other(title="x")
    assert other(index={"rows": 29, "embedder": "hash", "seeds": [0, 1]})[0] != marks[0]
    assert other(index={"rows": 29, "embedder": "hash", "seeds": [0, 1]})[1] == marks[1]  # the base has no index
    assert other(rows={"default": 3, "ties": 2})[0] == marks[0] and other(rows={"default": 3})[1] != marks[1]
    assert all(a != b for a, b in zip(other(bank=str(small / "bank")), marks, strict=True))
    changed = [{**m, "step": 0.1} if isinstance(m, dict) and m["name"] == "ties" else m for m in FEW]
    made = Suite.load(write_suite(tmp_path, methods=changed, rows={"default": 4, "ties": 2}))
    cell = next(c for c in cells_of(made) if c.name == one.name)
    assert fingerprint(cell, Workbench(made)) != marks[0]


def test_a_torn_or_foreign_cell_is_made_again(whole, tmp_path):
    suite, _ = whole
    cell = cells_of(suite)[0]
    path = cell.path(tmp_path)
    path.parent.mkdir()
    good = cell.path(suite.out).read_text()
    mark = json.loads(good)["fingerprint"]
    for text, want in ((good, True), (good[: len(good) // 2], False), ('{"version": 2}', False), ("[]", False)):
        path.write_text(text)
        assert done(cell, tmp_path, mark) is want
    path.write_text(good)
    assert not done(cell, tmp_path, "sha256:other")
    path.write_text("{")
    with pytest.raises(LoralloyError, match=r"not a readable cell .*; delete it and run the suite again"):
        read_cell(path)


def test_a_cell_in_work_elsewhere_is_left_alone(whole, write_suite, tmp_path):
    suite = Suite.load(write_suite(tmp_path, methods=["majority", "perfect"]))
    with lock(suite.out / "locks" / "perfect__any__in_domain__any") as held:
        assert held
        run_suite(suite, show=False)
    assert [p.stem for p in (suite.out / "cells").iterdir()] == ["majority__any__any__any"]
    run_suite(suite, show=False)
    assert len(list((suite.out / "cells").iterdir())) == 2


def test_refusals_before_any_work(write_suite, tmp_path):
    bare = Suite.load(write_suite(tmp_path, methods=["multitask"], multitask=None))
    with pytest.raises(LoralloyError, match="method 'multitask' needs the field `multitask`"):
        run_suite(bare, show=False)
    with pytest.raises(
        LoralloyError, match="'perfect' makes sense in in_domain only, the suite asks for leave_own_out"
    ):
        cells_of(Suite.load(write_suite(tmp_path, methods=["perfect"], scopes=["leave_own_out"])))
    with pytest.raises(LoralloyError, match="--jobs 0"):
        run_suite(bare, jobs=0)
    assert parse_shard("2/4") == (2, 4)
    for bad in ("", "3", "0/2", "3/2", "1/0", "a/b", "1/2/3"):
        with pytest.raises(LoralloyError, match="give i/n with i from 1 to n"):
            parse_shard(bad)


def test_a_method_that_skips_rows_is_caught(whole, bench, monkeypatch):
    cell = cells_of(bench.suite)[0]
    monkeypatch.setattr(type(cell.method), "answer", lambda self, run, examples: [Row("a")])
    with pytest.raises(LoralloyError, match="1 answers for 12 examples; the method is wrong"):
        runner_module.run_cell(cell, "mark", bench)


def test_once(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return "text"

    assert [once(tmp_path / "a" / "x.json", make) for _ in range(3)] == ["text"] * 3 and len(calls) == 1
    with lock(tmp_path / "l") as first, lock(tmp_path / "l", wait=False) as second:
        assert first and not second
    with lock(tmp_path / "l", wait=False) as again:
        assert again


def test_scores_are_written_short(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(Suite, "out", property(lambda self: tmp_path))
    cell = next(c for c in cells_of(bench.suite) if c.name.startswith("linear"))
    e = bench.examples(1)[:1]
    path = write_cell(cell, Run(bench, "raw"), e, [Row("a", {"spam": 1 / 3}, [-1.23456789, -2.0])], "m", 1.0)
    assert read_cell(path)["rows"] == [
        {"id": e[0].id, "task": e[0].task, "answer": "a", "weights": {"spam": 0.33333}, "scores": [-1.2346, -2.0]}
    ]


def test_who_begins_where(whole):
    """Every process knows every cell; the hinted ones, which are much alike, are the first one's first and the others' last."""
    cells = cells_of(whole[0])
    first, second = in_turn(cells, 0), in_turn(cells, 1)
    assert {c.name for c in first} == {c.name for c in second} == {c.name for c in cells}
    alike = {c.name for c in cells if c.scope == "in_domain" and c.query == "hinted" and c.method.name != "ties"}
    assert {c.name for c in first[: len(alike)]} == {c.name for c in second[-len(alike) :]} == alike


def test_short_memory_halves_the_batch(whole, write_suite, tmp_path, monkeypatch):
    import torch

    suite = Suite.load(write_suite(tmp_path, methods=FEW, rows={"default": 4, "ties": 2}, batch_size=8))
    real, sizes = runner_module.run_cell, []

    def short(cell, mark, bench, advance=None):
        sizes.append(bench.batch_size)
        if bench.batch_size > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(cell, mark, bench, advance)

    monkeypatch.setattr(runner_module, "run_cell", short)
    run_suite(suite, show=False)
    assert sizes[:4] == [8, 4, 2, 2]
    same_cells(cells_in(suite.out), cells_in(whole[0].out))


def test_no_memory_for_a_single_row(write_suite, tmp_path, monkeypatch):
    import torch

    def never(cell, mark, bench, advance=None):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner_module, "run_cell", never)
    suite = Suite.load(write_suite(tmp_path, methods=["perfect"], rows={"default": 1}))
    with pytest.raises(LoralloyError, match=r"cell perfect.*fewer --jobs"):
        run_suite(suite, show=False)
