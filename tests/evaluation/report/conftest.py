"""Four small tasks, a suite over them, and its cells; no model anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_cells import write_cells

from loralloy.evaluation.suite import Suite

WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heron",
    "inlet",
    "jetty",
    "kelp",
    "larch",
    "maple",
]
METHODS: list[Any] = [
    "majority",
    "base",
    "perfect",
    "uniform",
    {"name": "linear", "kind": "routed", "heading": "routed, linear"},
    {"name": "probe", "kind": "routed", "weigher": "probe", "heading": "routed (probe)"},
    {"name": "careful", "kind": "routed", "weigher": "probe", "unlike": 0.9},
    {
        "name": "ties",
        "kind": "routed",
        "rule": {"name": "ties", "density": 0.5},
        "space": "delta",
        "seeds": [0],
        "scopes": ["in_domain"],
    },
    "selection",
    {"name": "moe_soft", "kind": "moe", "seeds": [0]},
    "multitask",
    "task_average",
    "shuffled",
]
TASKS: dict[str, dict[str, Any]] = {
    "weather": {"family": "commonsense", "labels": ["rain", "sun"], "columns": [{"name": "text"}]},
    "claims": {
        "family": "nli", "labels": ["entailment", "neutral", "contradiction"], "columns": [{"name": "premise"}, {"name": "text"}],
    },
    "picks": {"family": "commonsense", "options": "choices", "columns": [{"name": "text"}]},
    "names": {"family": "knowledge", "columns": [{"name": "text"}]},
}  # fmt: skip


def _rows(name: str, n: int = 90) -> list[dict[str, Any]]:
    made = []
    for i in range(n):
        words = [WORDS[(i * k + k) % len(WORDS)] for k in (1, 3, 5)]
        row: dict[str, Any] = {"text": f"{name} row {i}: {' '.join(words)}{' is not so' if i % 3 == 0 else ''}"}
        if name == "claims":
            row |= {"premise": f"premise {i} of {' '.join(words)}", "label": TASKS[name]["labels"][i % 3]}
        elif name == "picks":
            row |= {
                "choices": ["the tall tree", "the tall bush", f"w{i}"],
                "label": ["the tall tree", "the tall bush"][i % 2],
            }
        else:
            row |= {"label": TASKS[name]["labels"][i % 2] if name == "weather" else f"answer {i}"}
        made.append(row)
    return made


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report_tasks")
    for name, fields in TASKS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(name)))
        task = {
            "version": 1, "name": name, "hint": f"About {name}.", "answer": "label", "licence": "CC0-1.0", "data": "made up",
            "source": {"path": f"{name}.jsonl"}, "splits": {"test": 30, "validation": 10, "train": 50, "seed": 0}, **fields,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return folder


@pytest.fixture(scope="session")
def make_suite(task_folder: Path) -> Callable[..., Suite]:
    """make_suite(folder, **fields) -> a suite whose output folder is `folder`/out; nothing of it is run."""

    def make(folder: Path, **fields: Any) -> Suite:
        data = {
            "version": 1, "title": "A small suite", "model": "no-model", "bank": "no-bank", "multitask": "none",
            "tasks": [str(task_folder)], "rows": {"default": 20, "ties": 8}, "index": {"rows": 30, "seeds": [0, 1]},
            "methods": METHODS, "out": "out",
        } | fields  # fmt: skip
        path = folder / "suite.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return Suite.load(path)

    return make


@pytest.fixture(scope="session")
def whole(make_suite: Callable[..., Suite], tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """The suite with all of its cells; not to be changed."""
    suite = make_suite(tmp_path_factory.mktemp("whole"))
    write_cells(suite)
    return suite


@pytest.fixture
def suite(make_suite: Callable[..., Suite], tmp_path: Path) -> Suite:
    """The suite without cells, for a test of its own."""
    return make_suite(tmp_path)


@pytest.fixture(scope="session")
def gold(task_folder: Path, whole: Suite) -> dict[str, tuple[str, str]]:
    """Row id -> (task, gold answer), read from the data files by their texts and nothing of the report."""
    from loralloy.tasks import load_tasks

    answers = {
        (name, row["text"]): row["label"]
        for name in TASKS
        for row in map(json.loads, (task_folder / f"{name}.jsonl").read_text().splitlines())
    }
    return {
        e.id: (t.name, answers[t.name, e.raw.split("\n")[-1]])
        for t in load_tasks([task_folder])
        for e in t.examples("test")
    }
