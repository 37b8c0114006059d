"""`loralloy report SUITE` as people run it: after `loralloy evaluate`, and before."""

from __future__ import annotations

import json

import pytest
import yaml

pytestmark = pytest.mark.usefixtures("hashed")


@pytest.fixture(scope="module")
def suite(world, tmp_path_factory):
    data = {
        "version": 1, "model": str(world.model), "dtype": "float32", "device": "cpu", "bank": str(world.bank),
        "tasks": [str(world.tasks)], "rows": {"default": 3}, "index": {"rows": 20, "embedder": "hash"},
        "methods": ["majority", "base", "perfect", {"name": "linear", "kind": "routed"}], "out": "out",
    }  # fmt: skip
    path = tmp_path_factory.mktemp("suite") / "s.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_before_and_after_evaluate(cli, suite, tmp_path):
    cli("report", suite, "-o", tmp_path / "r").refused("no cells there; run `loralloy evaluate s.yaml`")
    assert not (tmp_path / "r").exists()
    assert cli("evaluate", suite).code == 0
    done = cli("report", suite, "-o", tmp_path / "r", "--samples", 200, "--name", "small")
    assert done.code == 0, done
    assert "question" in done.out and "routing, raw query" in done.out
    files = sorted(p.name for p in (tmp_path / "r").iterdir())
    assert [f for f in files if not f.endswith(".png")] == ["small.html", "small.json", "small.md"]
    assert all(name in done.err.replace("\n", "") for name in files)
    assert "Made by `loralloy report" in (tmp_path / "r" / "small.md").read_text()

    cli("report", suite, "-o", tmp_path / "r", "--name", "small").refused("exists already", "--overwrite")
    again = cli("report", suite, "-o", tmp_path / "r", "--name", "small", "--samples", 200, "--overwrite", "--json")
    data = json.loads(again.out)
    assert {row["method"] for row in data["protocols"][0]["rows"]} == {"majority", "base", "perfect", "linear"}

    tags = tmp_path / "tags.csv"
    tags.write_text("id,tag\nspam/test/0,irony\n")
    cli("report", suite, "-o", tmp_path / "q", "--tags", tags, "--samples", 200).refused("tag 'irony' is not known")
