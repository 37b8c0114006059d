"""Fixtures: small tasks, and the hash embedder; no model, no download."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_tasks import WORDS, write_task

from loralloy.retrieval import HashEmbedder
from loralloy.tasks.task import Task


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    return [write_task(tmp_path / "tasks", name) for name in WORDS]


@pytest.fixture
def embedder() -> HashEmbedder:
    return HashEmbedder(128)


@pytest.fixture(params=["exact", "chroma"])
def kind(request) -> str:
    if request.param == "chroma":
        pytest.importorskip("chromadb")
    return request.param
