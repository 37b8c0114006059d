"""A small world with a suite over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import PROJECTIONS, peft_folder
from loralloy.adapter import Adapter
from loralloy.evaluation.suite import Suite
from loralloy.evaluation.suite.run import Run
from loralloy.evaluation.suite.workbench import Workbench
from world import make_world

METHODS: list[Any] = [
    "majority",
    "base",
    "perfect",
    "uniform",
    {"name": "linear", "kind": "routed"},
    {"name": "ties", "kind": "routed", "rule": {"name": "ties", "density": 0.5}, "space": "delta"},
    {"name": "average", "kind": "routed", "rule": "linear", "space": "factors"},
    "selection",
    {"name": "mixture", "k": 2},
    {"name": "fusion", "k": 2},
    {"name": "adapter_soup", "k": 2},
    "multitask",
    "task_average",
    "shuffled",
]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks, their adapters (all of rank 3 and scaling 2) and a multi-task adapter."""
    from loralloy.live.base import base_fingerprint, load_base

    root = tmp_path_factory.mktemp("small")
    made = make_world(root)
    base, _ = load_base(str(made.model), "float32", "cpu")
    mark = Adapter.load(made.bank / "spam").base
    assert mark.fingerprint == base_fingerprint(base)
    for seed, name in enumerate(["spam", "weather", "cooking", "all_tasks"]):
        folder = peft_folder(base, root / "even" / name, 10 + seed, r=3, lora_alpha=6, target_modules=PROJECTIONS)
        peft = Adapter.load(folder)
        Adapter(name, {m: peft[m] for m in peft}, peft.config, mark).save(root / "suite_bank" / name)
    (root / "suite_bank" / "all_tasks").rename(root / "all_tasks")
    return root


@pytest.fixture(scope="session")
def write_suite(small: Path) -> Callable[..., Path]:
    """write_suite(folder, **fields) -> a suite file in `folder` over the small world."""

    def write(folder: Path, **fields: Any) -> Path:
        data = {
            "version": 1, "model": str(small / "model"), "dtype": "float32", "device": "cpu",
            "bank": str(small / "suite_bank"), "multitask": str(small / "all_tasks"), "tasks": [str(small / "tasks")],
            "rows": {"default": 4}, "batch_size": 5, "index": {"rows": 30, "embedder": "hash", "seeds": [0, 1]},
            "methods": METHODS, "out": "out",
        } | fields  # fmt: skip
        path = folder / "suite.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def bench(write_suite: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Workbench(Suite.load(write_suite(tmp_path_factory.mktemp("bench"))))
    yield made
    made.close()


@pytest.fixture
def run_of(bench: Workbench) -> Callable[..., Run]:
    """run_of("hinted", "in_domain", 0) -> a Run of the small world."""

    def make(query: Any = "hinted", scope: Any = "in_domain", seed: int | None = 0) -> Run:
        return Run(bench, query, scope, seed)

    return make
