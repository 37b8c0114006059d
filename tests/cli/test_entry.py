"""What all commands share: help, version, usage errors, one line for an error, user's text shown as it is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loralloy import __version__
from loralloy.cli import app

COMMANDS = {
    "ask",
    "balance",
    "route",
    "merge",
    "rules",
    "export",
    "inspect",
    "index",
    "train",
    "evaluate",
    "report",
    "demo",
    "tada",
    "learn",
    "serve",
    "front",
}


def test_these_are_the_commands():
    assert {command.callback.__name__ for command in app.registered_commands} == COMMANDS


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_has_an_example_and_the_defaults(cli, command, flag, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ran = cli(command, flag)
    assert ran.code == 0 and ran.err == ""
    text = " ".join(ran.out.split())
    assert f"Usage: loralloy {command}" in text
    assert f"Example: loralloy {command} " in text
    assert "[default: " in text or command in ("inspect", "rules")  # which have switches only


def test_alone_it_shows_the_help(cli):
    ran = cli()
    assert "Usage: loralloy" in ran.out + ran.err and all(name in ran.out + ran.err for name in COMMANDS)


def test_version(cli):
    assert cli("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["merge", "a"],
        ["merge", "a", "-o"],
        ["merge", "a", "-o", "b", "--no-such"],
        ["ask"],
        ["route", "index"],
        ["evaluate", "-n", "many"],
        ["evaluate", "-n", "0"],
        ["ask", "q", "--max-new-tokens", "0"],
        ["train", "t.yaml"],
    ],
)
def test_usage_errors_exit_2(cli, arguments):
    ran = cli(*arguments)
    assert ran.code == 2 and ran.out == "" and "Traceback" not in ran.err
    assert "Error" in ran.err


def test_in_a_process_of_its_own(tmp_path):
    """python -m loralloy, from another folder: no traceback, one line, the exit code."""
    command = [sys.executable, "-m", "loralloy", "inspect", "no/such"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1 and "no/such" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_system_is_one_line_too(cli, world, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    cli("merge", world.bank / "spam", "-o", tmp_path / "file" / "out").refused("file")


def test_many_lines_of_a_library_become_one(cli, tmp_path):
    (tmp_path / "t.yaml").write_text("a: [1\nb: 2")
    cli("index", tmp_path / "t.yaml", "-o", tmp_path / "i").refused("t.yaml: not YAML")
