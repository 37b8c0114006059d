"""The adaptive report's command: what it writes, makes again, adds and keeps."""

from __future__ import annotations

import dataclasses
import json

import pytest

from adaptive_pages import SEEDS, made_up, row


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

    lay([one for one in every if one not in late])
    assert harness.report.main(words) == 0
    lay(late)
    with pytest.raises(LoralloyError, match=r"nothing shows that .* is of the page's adapters; run.py --beside"):
        harness.report.main([*words, "--add"])
    other = json.loads(json.dumps(same))
    domain = next(iter(other[0]["test"]))
    other[0]["test"][domain] += 0.01
    lay([*late, *other])
    with pytest.raises(LoralloyError, match=r"is made of is not what the page has \(.*: other adapters"):
        harness.report.main([*words, "--add"])
    own = [one for one in other if one["cell"]["how"] == "own"]
    for one in own:
        one["test"] = next(o["test"] for o in same if o["cell"] == one["cell"])
    unlike = [one for one in other if one["cell"]["how"] == "joint"]
    unlike[0]["test"][domain] += 0.01  # joint training went another way: nothing merged is made of it
    lay([*late, *own, *unlike])
    assert harness.report.main([*words, "--add"]) == 0
    assert (docs / "adaptive-emoji.md").read_text() == whole


def test_what_a_page_lacks_altogether_is_added_and_a_timed_bench_is_of_one_run(harness):
    joined = harness.results.joined
    every = made_up(harness.cells)
    first, second = ([one for one in every if one["cell"]["seed"] == seed] for seed in SEEDS)
    assert len(joined(first, second, "x")) == len(every)  # the page has nothing of that seed to compare with
    assert joined(first, [], "x") == first
    growth = [one for one in every if one["cell"]["how"] == "learned"]
    assert joined(growth, growth[:2], "x") == growth[:2] and joined(growth, [], "x") == growth
