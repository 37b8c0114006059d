"""`loralloy vllm check` and `loralloy front`, as people run them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from loralloy.cli import app
from loralloy.vllm_plugin.store import Store


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_check(bank_folder, tmp_path):
    def check(*names):
        done = run("vllm", "check", *names, "--bank", bank_folder, "--rank", 8, "--cache", tmp_path / "c", "--json")
        return done.exit_code, json.loads(done.stdout)

    code, (alone, fits, cut) = check("a", "a + b", "a + b + c")
    assert code == 0 and alone["served"] == "as it is in the bank"
    assert (fits["rank"], fits["cut"], cut["rank"], cut["cut"]) == (8, False, 8, True)
    assert fits["served"] == "merged when asked for"
    done = run("vllm", "check", "a + b", "--bank", bank_folder, "--rank", 8, "--cache", tmp_path / "c", "--merge")
    assert done.exit_code == 0 and "served: merged now" in done.stdout
    assert check("b + a")[1][0]["served"] == "from the cache"


def test_merging_ahead_keeps_to_the_plugins_room(bank_folder, tmp_path, monkeypatch):
    """With more room than the limit it has, it would delete what the server still wants."""
    seen = []

    class Spied(Store):
        def __init__(self, folder, max_bytes):
            seen.append(max_bytes)
            super().__init__(folder, max_bytes)

    monkeypatch.setattr("loralloy.vllm_plugin.check.Store", Spied)
    monkeypatch.setenv("LORALLOY_CACHE_GIB", "100.5")
    done = run("vllm", "check", "a + b", "--bank", bank_folder, "--cache", tmp_path / "c", "--merge")
    assert done.exit_code == 0 and seen == [int(100.5 * 2**30)]


def test_check_says_why_not(bank_folder):
    done = run("vllm", "check", "a +", "auto", "--bank", bank_folder)
    assert done.exit_code == 1
    assert "not served: composition 'a +', character 4" in done.stdout and "loralloy front" in done.stdout


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--host", "0.0.0.0"], "LORALLOY_API_KEY"),
        (["--vllm", "localhost:8000"], "is no address"),
        (["--vllm", "http://"], "is no address"),
        (["--vllm", "http://vllm/?x=1"], "is no address"),
        (["--vllm", "http://user:word@vllm"], "user or password"),
        (["--step", "0"], "step"),
    ],
)
def test_front_refuses(bank_folder, flags, says):
    done = run("front", bank_folder, "--index", "none", *flags)
    assert done.exit_code == 1 and says in str(done.exception)
