"""`loralloy index` and `loralloy route`, run as functions of a typer app, with the hash embedder in place of MiniLM."""

from __future__ import annotations

import json

import pytest
import typer
from small_tasks import WORDS, write_task
from typer.testing import CliRunner

import loralloy.retrieval
from loralloy.cli.index import index
from loralloy.cli.route import route
from loralloy.errors import LoralloyError
from loralloy.retrieval import HashEmbedder, Index

app = typer.Typer()
app.command()(index)
app.command()(route)


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    monkeypatch.setattr(loralloy.retrieval, "Embedder", lambda model=None: HashEmbedder(128, model or ""))


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_index_then_route(kind, tasks, tmp_path):
    folder = tmp_path / "my index"
    said = run("index", tmp_path / "tasks", "-o", folder, "--store", kind, "--rows", 40)
    assert [line for line in said.splitlines() if line.startswith("indexed")] == [
        f"indexed {name}: 40 rows" for name in sorted(WORDS)
    ]
    assert f"3 tasks, 120 rows; store {kind}, template both" in said.replace("\n", " ")
    assert run("index", tmp_path / "tasks", "-o", folder, "--rows", 40).count("unchanged") == 3  # keeps its store
    question = tasks[0].examples("test")[0].query
    shown = run("route", folder, question, "--k", 20)
    assert shown.split()[0] == "spam" and "nearest examples" in shown and "█" in shown
    weights = json.loads(run("route", folder, question, "--json", "--neighbours", 2, "--exclude", "spam", "--p", 1))
    assert weights["version"] == 1 and set(weights["weights"]) == {"cooking", "weather"}
    assert len(weights["explain"]["neighbours"]) == 2


def test_index_changes_one_task(tasks, tmp_path):
    folder = tmp_path / "i"
    spam = tmp_path / "tasks" / "spam.yaml"
    run("index", tmp_path / "tasks", "-o", folder, "--store", "exact")
    with pytest.raises(LoralloyError, match="'spam' is in the index already"):
        run("index", spam, "-o", folder, "--add-only")
    assert "indexed spam" in run("index", spam, "-o", folder, "--replace")
    assert "removed spam" in run("index", "--remove", "spam", "-o", folder)
    assert "indexed spam" in run("index", spam, "-o", folder, "--add-only")
    write_task(tmp_path / "tasks", "spam", hint="Another?")
    said = run("index", tmp_path / "tasks", "-o", folder)
    assert said.count("unchanged") == 2 and "indexed spam" in said
    with pytest.raises(LoralloyError, match="built with embedder"):
        run("index", spam, "-o", folder, "--embedder", "other")
    with pytest.raises(LoralloyError, match="built with embedder"):
        run("route", folder, "text", "--embedder", "other")
    run("index", spam, "-o", folder, "--embedder", "other", "--overwrite", "--store", "exact")
    with Index.open(folder, HashEmbedder(128, "other")) as opened:
        assert opened.names == ["spam"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--remove", "x", "-o", "none"], "no index here"),
        (["t.yaml", "--add-only", "--replace"], "--add-only"),
        (["t.yaml", "--remove", "x", "--overwrite"], "drop one of them"),
        (["t.yaml"], r"t\.yaml: no such task file"),
    ],
)
def test_bad_use_of_index(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoralloyError, match=message):
        run("index", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_bad_use_of_route(tasks, tmp_path):
    run("index", tmp_path / "tasks", "-o", tmp_path / "i", "--store", "exact")
    for arguments, message in [
        (["text", "--k", 0], "k is 0"),
        (["text", "--p", 2], "p is 2"),
        (["text", "--kernel", "rbf"], "known: exp"),
        ([" "], "empty"),
        (["text", "--exclude", "spma"], "--exclude spma: not a task of .*; it has cooking, spam, weather"),
        (["text", *(a for name in WORDS for a in ("--exclude", name))], "no task left"),
    ]:
        with pytest.raises(LoralloyError, match=message):
            run("route", tmp_path / "i", *arguments)


def test_plot(tasks, tmp_path):
    pytest.importorskip("matplotlib")
    run("index", tmp_path / "tasks", "-o", tmp_path / "i", "--store", "exact")
    run("route", tmp_path / "i", "free prize", "--plot", tmp_path / "w.png")
    assert (tmp_path / "w.png").read_bytes()[:4] == b"\x89PNG"


def test_help_has_an_example():
    for command in ("index", "route"):
        assert f"Example: loralloy {command} " in run(command, "--help").replace("\n", " ").replace("│", "")
