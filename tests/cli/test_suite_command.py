"""`loralloy evaluate SUITE` as people run it."""

from __future__ import annotations

import json

import pytest
import yaml

pytestmark = pytest.mark.usefixtures("hashed")


@pytest.fixture
def suite(world, tmp_path):
    data = {
        "version": 1, "model": str(world.model), "dtype": "float32", "device": "cpu", "bank": str(world.bank),
        "tasks": [str(world.tasks)], "rows": {"default": 3}, "index": {"rows": 20, "embedder": "hash"},
        "queries": ["raw"], "methods": ["majority", "perfect", {"name": "linear", "kind": "routed"}], "out": "out",
    }  # fmt: skip
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_run_and_run_again(cli, suite, tmp_path):
    first = cli("evaluate", suite)
    assert first.code == 0, first
    assert "in domain" in first.out and "leave own out" in first.out and "linear" in first.out
    assert "4 cells made, 0 there already" in first.err and "perfect any in_domain any" in first.err
    again = cli("evaluate", suite)
    assert again.out == first.out and "0 cells made, 4 there already" in again.err
    as_json = cli("evaluate", suite, "--json")
    data = json.loads(as_json.out)
    assert {r["method"] for r in data["results"]} == {"majority", "perfect", "linear"}
    assert all(r["rows"] == 9 for r in data["results"])


def test_parts(cli, suite, tmp_path):
    made = cli("evaluate", suite, "--only", "majority,perfect", "-o", tmp_path / "a", "--rows", 2)
    assert made.code == 0 and "2 cells made" in made.err
    cells = [json.loads(p.read_text()) for p in (tmp_path / "a" / "cells").iterdir()]
    assert {c["method"]: len(c["rows"]) for c in cells} == {"majority": 6, "perfect": 6}
    shard = cli("evaluate", suite, "--shard", "2/2", "-o", tmp_path / "b")
    assert shard.code == 0 and "2 cells made" in shard.err and shard.out == ""


@pytest.mark.parametrize(
    "arguments,says",
    [
        (["--examples", "5"], "--examples is for the comparison without a suite"),
        (["--bank", "x"], "--bank is for the comparison without a suite; set it in"),
        (["--shard", "3/2"], "give i/n with i from 1 to n"),
        (["--only", "linaer"], "the suite has no method of this name (did you mean `linear`?)"),
    ],
)
def test_refused(cli, suite, arguments, says):
    cli("evaluate", suite, *arguments).refused(says)


@pytest.mark.parametrize(
    "flags", [["--jobs", "2"], ["--only", "base"], ["--rows", "3"], ["--shard", "1/2"], ["-o", "x"]]
)
def test_suite_flags_without_a_suite(cli, flags):
    cli("evaluate", *flags).refused("is for a suite; name its file: loralloy evaluate SUITE.yaml")


def test_no_such_suite(cli, tmp_path):
    cli("evaluate", tmp_path / "none.yaml").refused("no such suite")
