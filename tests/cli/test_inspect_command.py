"""`loralloy inspect`: text, --modules, --json."""

from __future__ import annotations

import json
import re

import pytest

from helpers import delta, peft_folder, tiny_llama
from loralloy.adapter import Adapter


def test_text(cli, world):
    ran = cli("inspect", world.bank / "weather")
    assert ran.code == 0 and ran.err == ""
    assert ran.out.startswith("weather, a LoRA adapter of tiny/llama (fingerprint ")
    assert "14 modules, rank 3, scaling " in ran.out and "licence apache-2.0" in ran.out
    assert Adapter.load(world.bank / "weather").content_hash in ran.out
    assert re.search(r"^layer +modules +norm of dW", ran.out, re.M)
    assert [line.split()[:2] for line in ran.out.splitlines() if "█" in line] == [["0", "7"], ["1", "7"]]


def test_by_module_with_true_norms(cli, world):
    ran = cli("inspect", world.bank / "weather", "--modules")
    want = {m: float(d.norm()) for m, d in delta(Adapter.load(world.bank / "weather")).items()}
    rows = [line.split() for line in ran.out.splitlines() if line.startswith("model.")]
    assert {row[0]: float(row[5]) for row in rows} == pytest.approx(want, abs=1e-4)
    assert all(row[1] == "3" for row in rows)


def test_json(cli, world):
    said = json.loads(cli("inspect", world.bank / "weather", "--json").out)
    want = delta(Adapter.load(world.bank / "weather"))
    assert said["name"] == "weather" and said["base"]["name"] == "tiny/llama" and said["licence"] == "apache-2.0"
    assert {m["module"]: m["norm"] for m in said["modules"]} == pytest.approx(
        {m: float(d.norm()) for m, d in want.items()}, rel=1e-5
    )
    for layer in said["layers"]:
        inside = [float(d.norm()) ** 2 for m, d in want.items() if f"layers.{layer['layer']}." in m]
        assert layer["norm"] == pytest.approx(sum(inside) ** 0.5, rel=1e-5) and layer["modules"] == len(inside)


def test_layers_in_natural_order(cli, tmp_path):
    peft_folder(tiny_llama(layers=11), tmp_path / "deep", target_modules=["q_proj"])
    layers = [line.split()[0] for line in cli("inspect", tmp_path / "deep").out.splitlines() if "█" in line]
    assert layers == [str(n) for n in range(11)]


def test_brackets_of_the_user_are_shown(cli, world, tmp_path):
    made = Adapter.load(world.bank / "spam")
    Adapter("x", {m: made[m] for m in made}, made.config, made.base, licence="my [bold] licence").save(
        tmp_path / "[x] y"
    )
    ran = cli("inspect", tmp_path / "[x] y")
    assert ran.out.startswith("[x] y, a LoRA adapter") and "licence my [bold] licence" in ran.out
    ran = cli("merge", tmp_path / "[x] y", "-o", tmp_path / "[red]m")
    assert ran.out.startswith("[x] y") and f"wrote {tmp_path / '[red]m'}" in ran.out


def test_refusals(cli, tmp_path):
    cli("inspect", tmp_path / "none").refused(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    cli("inspect", tmp_path / "empty").refused("empty", "not an adapter folder")
