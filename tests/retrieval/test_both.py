"""Template "both": two vectors a row, one example."""

from __future__ import annotations

import json

import pytest
from small_tasks import WORDS, write_task

from loralloy.errors import LoralloyError
from loralloy.retrieval import HashEmbedder, Index
from loralloy.retrieval.manifest import Manifest
from loralloy.retrieval.rows import task_rows


def test_both_holds_what_hinted_and_raw_hold(kind, tasks, embedder, tmp_path):
    with Index.build(tmp_path / "both", tasks, embedder, kind) as both:
        assert len(both) == 3 * 48 and {t.vectors for t in both.tasks.values()} == {96}
        assert both.manifest.template == "both" and Manifest.load(tmp_path / "both") == both.manifest
        ids, vectors, owners = both.vectors()
    held = {}
    for template, tail in (("hinted", ""), ("raw", "#raw")):
        with Index.build(tmp_path / template, tasks, embedder, kind, template=template) as one:
            names, rows, tasks_of = one.vectors()
            assert names == sorted(names) and {t.vectors for t in one.tasks.values()} == {48}
            held |= {i + tail: (v.tobytes(), t) for i, v, t in zip(names, rows, tasks_of, strict=True)}
    assert held == {i: (v.tobytes(), t) for i, v, t in zip(ids, vectors, owners, strict=True)}
    assert owners == sorted(owners) and "vectors" not in (tmp_path / "raw" / "manifest.json").read_text()


def test_vectors_of_some_tasks(kind, tasks, embedder, tmp_path):
    with Index.build(tmp_path / "i", tasks, embedder, kind) as index:
        every = dict(zip(*index.vectors()[::2], strict=True))
        some, vectors, owners = index.vectors(["spam", "weather"])
        assert set(owners) == {"spam", "weather"} and len(vectors) == 192
        assert set(some) == {i for i, owner in every.items() if owner != "cooking"}
        with pytest.raises(LoralloyError, match="no task left"):
            index.vectors(["music"])


def test_both_takes_the_rows_that_hinted_takes(tasks):
    ids, texts = task_rows(tasks[0], 10, 3, "both")
    hinted, lines = task_rows(tasks[0], 10, 3, "hinted")
    assert ids == hinted + [f"{i}#raw" for i in hinted] and texts[:10] == lines
    by_id = {e.id: e.raw for e in tasks[0].examples("train")}
    assert texts[10:] == [by_id[i] for i in hinted]


def test_a_row_without_hint_and_prefix_has_one_vector(tmp_path):
    plain = write_task(tmp_path / "t", "spam", hint="", columns=[{"name": "text"}])
    with Index.build(tmp_path / "i", [plain], HashEmbedder(128), "exact") as index:
        assert index.tasks["spam"].vectors == 48 and not any(i.endswith("#raw") for i in index.vectors()[0])


def test_each_kind_of_query_finds_its_own_kind(tasks, embedder, tmp_path):
    with Index.build(tmp_path / "i", tasks, embedder, "exact") as index:
        for example in tasks[0].examples("test"):
            near = index.search(index.embed([example.query, example.raw]), 1)[0]
            assert not near[0][0].endswith("#raw") and near[1][0].endswith("#raw")


def test_a_manifest_with_too_many_vectors_is_refused(tasks, embedder, tmp_path):
    Index.build(tmp_path / "i", tasks, embedder, "exact").close()
    path = tmp_path / "i" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert sorted(manifest["tasks"]) == sorted(WORDS)
    manifest["tasks"]["spam"]["vectors"] = 97
    path.write_text(json.dumps(manifest))
    with pytest.raises(LoralloyError, match="'spam' has 96 vectors, its manifest says 97 of 48 rows"):
        Index.open(tmp_path / "i", embedder)
