"""Laws that no room owns alone: routing sees no answer, and knows no order of tasks."""

from __future__ import annotations

import json
import shutil

import pytest

from loralloy.retrieval import HashEmbedder, Index
from loralloy.tasks import load_tasks
from loralloy.weighting import Router
from world import make_world

SETTINGS = [{}, {"k": 7, "p": 1.0}, {"k": 1000, "kernel": "inverse"}, {"temperature": 0.05}]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(params=["exact", "chroma"])
def store(request):
    if request.param == "chroma":
        pytest.importorskip("chromadb")
    return request.param


def routes(tasks, folder, store, template="hinted"):
    """The weights, with all that explains them, of every held-out query (with and without its hint)."""
    queries = sorted(text for task in tasks for e in task.examples("test") for text in (e.query, e.raw))
    with Index.build(folder, tasks, HashEmbedder(128), store, template=template) as index:
        return [w.to_dict() for more in SETTINGS for w in Router(index, **more).weigh_batch(queries)]


@pytest.mark.parametrize("template", ["hinted", "raw"])
def test_routing_never_sees_an_answer(world, store, template, tmp_path):
    shutil.copytree(world.tasks, tmp_path / "tasks")
    for path in (tmp_path / "tasks").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        other = {"a": "b", "b": "a"}
        path.write_text("".join(json.dumps(row | {"label": other[row["label"]]}) + "\n" for row in rows))
    plain, changed = load_tasks(world.tasks), load_tasks(tmp_path / "tasks")
    for before, after in zip(plain, changed, strict=True):
        assert all(a.answer != b.answer for a, b in zip(before.examples("train"), after.examples("train"), strict=True))
    assert routes(plain, tmp_path / "i", store, template) == routes(changed, tmp_path / "j", store, template)


def test_the_order_of_tasks_does_not_matter(world, store, tmp_path):
    tasks = load_tasks(world.tasks)
    want = routes(tasks, tmp_path / "0", store)
    assert len(want) == len(SETTINGS) * 48
    for n, order in enumerate(([2, 0, 1], [1, 2, 0], [2, 1, 0]), 1):
        got = routes([tasks[i] for i in order], tmp_path / str(n), store)
        for a, b in zip(want, got, strict=True):
            assert list(a["weights"]) == list(b["weights"])
            assert a["weights"] == pytest.approx(b["weights"], abs=1e-6)


def test_a_task_more_and_less_changes_nothing(world, store, tmp_path):
    """An index that once held another task routes as if it never had."""
    tasks = load_tasks(world.tasks)
    want = routes(tasks[:2], tmp_path / "a", store)
    with Index.build(tmp_path / "b", tasks, HashEmbedder(128), store, template="hinted") as index:
        index.remove(tasks[2].name)
    got = routes(tasks[:2], tmp_path / "b", store)
    for a, b in zip(want, got, strict=True):
        assert a["weights"] == pytest.approx(b["weights"], abs=1e-6)
