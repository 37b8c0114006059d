"""`loralloy rules`: all of them, one of them, and a name that is none."""

from __future__ import annotations

import json

import pytest

from loralloy.cli.parameters import said
from loralloy.merging import PLUGINS, RULES
from loralloy.merging.rule import SPACES

EVERY = {**RULES, **PLUGINS}


def test_the_table_names_every_rule_plug_in_and_space(cli):
    ran = cli("rules")
    assert ran.code == 0 and ran.err == ""
    text = " ".join(ran.out.split())
    firsts = {line.split()[0] for line in ran.out.splitlines() if line and not line.startswith(" ")}
    assert {*EVERY, *SPACES} <= firsts
    for part in EVERY.values():
        assert part.use_when.split()[0] in text
        for name, value in part.values.items():
            assert f"{name} = {said(value)}" in text


@pytest.mark.parametrize("name", EVERY)
def test_one_in_full(cli, name):
    part, ran = EVERY[name], cli("rules", name)
    assert ran.code == 0
    text = " ".join(ran.out.split())
    assert text.startswith(f"{name}, a {'rule' if name in RULES else 'plug-in'}: ")
    assert " ".join(part.formula.split()) in text and f"source: {part.source}" in text and part.use_when in text
    for p in part.parameters.values():
        assert p.name in text and said(p.default) in text and p.allowed.split()[-1] in text
    if not part.parameters:
        assert "parameters: none" in text


def test_as_data(cli):
    said = json.loads(cli("rules", "--json").out)
    assert [r["name"] for r in said["rules"]] == list(RULES)
    assert [p["name"] for p in said["plugins"]] == list(PLUGINS)
    for item in said["rules"] + said["plugins"]:
        assert {p["name"]: p["default"] for p in item["parameters"]} == EVERY[item["name"]].values
    for space in said["spaces"]:
        assert space["rules"] == [r.name for r in RULES.values() if space["name"] in r.spaces]
    assert json.loads(cli("rules", "ties", "--json").out) == next(r for r in said["rules"] if r["name"] == "ties")


def test_a_space_and_a_name_with_dashes(cli):
    ran = cli("rules", "knots")
    assert SPACES["knots"] in " ".join(ran.out.split()) and "ties" in ran.out
    assert cli("rules", "dare-ties").out == cli("rules", "dare_ties").out


def test_a_name_that_is_none(cli):
    cli("rules", "tise").refused("'tise'", "did you mean ties?", "dare_ties", "knots")
