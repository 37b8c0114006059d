"""`loralloy merge`: parameters of rules and plug-ins, and what is printed of them and of the cost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Annotated

import pytest
import torch
from merge_scenes import error, expected, written

from helpers import delta
from loralloy.bank import Bank
from loralloy.cli import parameters
from loralloy.merging import PLUGINS, RULES, DareTies, MagnitudePrune, Ties
from loralloy.merging import merge as run
from loralloy.merging.rule import Param, Plugin
from loralloy.merging.stack import LowRank
from loralloy.saving import card
from loralloy.weights import Weights


@pytest.mark.parametrize(
    ("flags", "rule", "space"),
    [
        (["--rule", "ties", "--density", "0.5"], Ties(density=0.5), "delta"),
        (
            [
                "--rule",
                "ties",
                "--majority",
                "frequency",
                "--normaliser",
                "weights",
                "--space",
                "core",
                "--trim",
                "all",
            ],
            Ties(majority="frequency", normaliser="weights", trim="all"),
            "core",
        ),
        (["--seed", "3", "--rule", "dare_ties", "--space", "knots"], DareTies(seed=3), "knots"),
        (["--rule", "magnitude_prune", "--prune=merged"], MagnitudePrune(prune="merged"), "delta"),
    ],
    ids=str,
)
def test_parameters_reach_the_rule(cli, parents, tmp_path, flags, rule, space):
    ran = cli("merge", *parents, "-o", tmp_path / "m", *flags, "--dtype", "fp32", "--rank", "3", "--json")
    assert ran.code == 0, ran.err
    bank = Bank.load(parents)
    want = run(bank, Weights.uniform(bank.names), rule, space, 3, torch.float32).adapter
    assert error(delta(written(tmp_path / "m")), delta(want)) < 1e-6
    assert json.loads(ran.out)["parameters"] == rule.values


def test_there_is_an_option_for_every_parameter(cli, monkeypatch):
    """Its help has what it takes, its default and its rules; none hides an option of the command's own."""
    monkeypatch.setenv("COLUMNS", "250")
    every = {**RULES, **PLUGINS}
    made = {o.name: o for o in parameters.options()}
    assert set(made) == {name for part in every.values() for name in part.parameters}
    text = " ".join(cli("merge", "--help").out.split())
    for part in every.values():
        for name, p in part.parameters.items():
            text_of = made[name].help
            assert p.allowed in text_of and p.help in text_of and part.name in text_of
            assert parameters.said(p.default) in text_of
            assert text.count(f"│ {parameters.flag(name)} ") == 1


def doubled(stack, *, times: Annotated[float, Param("how often", 0, 9)] = 2.0, seed: Annotated[int, Param("none")] = 0):
    """B times a number."""
    return replace(stack, B=tuple(b * times for b in stack.B))


def halved(result, stack, rank, *, really: Annotated[bool, Param("do it")] = True):
    """The result by 2."""
    return LowRank(result.A, result.B / 2) if really else result


@pytest.fixture
def plugins(monkeypatch):
    """A plug-in before (dW times a number) and one after (dW by 2)."""
    monkeypatch.setitem(PLUGINS, "double", Plugin("double", doubled, "s", "u", "here", when="before"))
    monkeypatch.setitem(PLUGINS, "halve", Plugin("halve", halved, "s", "u", "here", when="after"))
    parameters.options.cache_clear()
    yield
    parameters.options.cache_clear()


def test_plug_ins_and_their_parameters(cli, parents, tmp_path, plugins):
    flags = ["--rule", "cat", "--before", "double", "--times", "6", "--after", "halve", "--dtype", "fp32"]
    ran = cli("merge", *parents, *flags, "-o", tmp_path / "m")
    assert ran.code == 0, ran.err
    assert "before it: double(times=6.0, seed=0)" in ran.out and "after it: halve(really=True)" in ran.out
    assert error(delta(written(tmp_path / "m")), expected(parents, [1.0] * 3)) < 1e-5
    again = cli("merge", tmp_path / "m/recipe.yaml", "--really", "false", "-o", tmp_path / "n")
    assert "after is halve(really=false) by flag, not halve" in again.out
    assert error(delta(written(tmp_path / "n")), expected(parents, [2.0] * 3)) < 1e-5
    page = (tmp_path / "m/README.md").read_text()
    assert "Plug-in before the rule: `double(times=6.0, seed=0)`." in page
    assert "Plug-in after the rule: `halve(really=True)`." in page and "with rule `cat` in" in page
    text = " ".join(cli("merge", *parents, *flags, "--explain").out.split())
    assert "before double: s" in text and "times 6.0 (default 2.0)" in text and "really true (default)" in text


def test_the_card_names_the_rule_with_its_parameters(cli, parents, tmp_path):
    cli("merge", *parents, "--rule", "ties", "--density", "0.5", "-o", tmp_path / "m")
    merged = written(tmp_path / "m")
    text = (tmp_path / "m/README.md").read_text()
    assert f"with rule `{Ties(density=0.5)}` in delta space, rank `" in text and "Plug-in" not in text
    old = {k: v for k, v in merged.provenance["merge"].items() if k != "parameters"}
    assert "with rule `ties` in delta space, rank `" in card("old", merged.base, {"a": 4}, {"merge": old})


def test_plug_ins_in_the_wrong_place(cli, parents, tmp_path, plugins):
    out = ["-o", tmp_path / "m"]
    cli("merge", *parents, "--after", "double", *out).refused("'double'", "before the rule", "--before")
    cli("merge", *parents, "--times", "2", *out).refused("--times", "linear has no parameters", "It is for double")
    both = ["--rule", "dare_linear", "--before", "double", "--seed", "1"]
    cli("merge", *parents, *both, *out).refused("--seed", "dare_linear and double", "recipe")


def test_the_help_of_all_commands_needs_no_torch():
    code = """
import sys
from loralloy.cli import main
sys.argv = ["loralloy", "--help"]
try:
    main()
finally:
    print("torch" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "merge" in ran.stdout and ran.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], ["trimming: each tensor", "normaliser: the number", "majority=total"]),
        (["--trim", "all", "--normaliser", "weights"], ["trimming: all modules", "normaliser: the sum of the weights"]),
    ],
)
def test_the_scope_and_the_normaliser_are_always_printed(cli, parents, tmp_path, flags, says):
    ran = cli("merge", *parents, "--rule", "ties", *flags, "-o", tmp_path / "m")
    assert ran.code == 0 and all(part in ran.out for part in says)


def test_the_cost_of_the_cut_is_printed(cli, parents, tmp_path):
    """Of the rule's own result, which for svd is the exact sum: the same number as the error before the cast."""
    ran = cli("merge", *parents, "--rule", "svd", "--rank", "2", "--dtype", "fp32", "-o", tmp_path / "m")
    before = re.search(r"weighted sum: (\S+) before the cast", ran.out)[1]
    assert f"the cut to rank 2 lost {before} of the rule's own result" in ran.out
    uncut = cli("merge", *parents, "-o", tmp_path / "n").out
    assert "before the cast" in uncut and "the cut" not in uncut


def test_measure(cli, parents, tmp_path):
    said = cli("merge", *parents, "--measure", "none", "--rank", "2", "-o", tmp_path / "none").out
    assert "not measured" in said and "before the cast" not in said and "the cut" not in said and "nan" not in said
    assert "(estimated)" in cli("merge", *parents, "--measure", "estimate", "-o", tmp_path / "est").out


def test_a_rank_found_by_energy_is_said(cli, parents, tmp_path):
    assert re.search(r"rank \d+ \(energy 0.5\), ", cli("merge", *parents, "--energy", "0.5", "-o", tmp_path / "m").out)


def test_energy(cli, parents, tmp_path):
    """The smallest rank that keeps the energy: one less would not."""
    said = json.loads(cli("merge", *parents, "--energy", "0.9", "--dtype", "fp32", "-o", tmp_path / "m", "--json").out)
    assert said["error"]["stored"] ** 2 <= 0.1 + 1e-6
    less = said["rank_out"] - 1
    lower = json.loads(cli("merge", *parents, "--rank", less, "--dtype", "fp32", "-o", tmp_path / "n", "--json").out)
    assert lower["error"]["stored"] ** 2 > 0.1
