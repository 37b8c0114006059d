"""Small indexes with the hash embedder: three tasks whose words overlap, so that routing is neither trivial nor blind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from loralloy.retrieval import HashEmbedder, Index
from loralloy.tasks.task import Task

WORDS = {
    "cooking": "boil bake salt onion oven recipe butter flour now free",
    "spam": "prize winner claim free cash call now urgent offer recipe",
    "weather": "rain sun cloud storm wind snow fog forecast now degrees",
}


def write(folder: Path, name: str, rows: int = 90) -> Task:
    rng = random.Random(name)
    folder.mkdir(parents=True, exist_ok=True)
    words = WORDS[name].split()
    lines = [{"text": " ".join(rng.choices(words, k=4)) + f" {n}", "label": "ab"[n % 2]} for n in range(rows)]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {
        "version": 1,
        "name": name,
        "hint": f"Which kind of {name} is this?",
        "columns": [{"name": "text", "prefix": "Text: "}],
        "answer": "label",
        "labels": ["a", "b"],
        "source": {"path": f"{name}.jsonl"},
        "splits": {"test": 20, "validation": 10, "train": None, "seed": 0},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(data))
    return Task.load(folder / f"{name}.yaml")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> dict[str, Task]:
    folder = tmp_path_factory.mktemp("tasks")
    return {name: write(folder, name) for name in WORDS}


@pytest.fixture
def build(tasks, tmp_path) -> Callable[..., Index]:
    """``build(*names, template="both", rows=60)``: an open index of these tasks (default: all three)."""
    made: list[Index] = []

    def make(*names: str, template: str = "both", rows: int = 60, folder: str = "") -> Index:
        chosen = [tasks[name] for name in names or WORDS]
        place = tmp_path / (folder or f"index{len(made)}")
        made.append(Index.build(place, chosen, HashEmbedder(48), "exact", rows, template=template))
        return made[-1]

    yield make
    for index in made:
        index.close()


@pytest.fixture
def questions(tasks) -> list[str]:
    return [e.raw for task in tasks.values() for e in task.examples("test")]
