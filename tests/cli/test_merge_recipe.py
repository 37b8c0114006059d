"""`loralloy merge` with recipes, and the plan that --explain prints."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from merge_scenes import FILES, error, expected, written

from helpers import delta
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.merging import Ties
from loralloy.merging import merge as run
from loralloy.weights import Weights

RECIPE = """\
version: 1
adapters:
  - {{path: {bank}/spam, weight: 0.5}}
  - {{path: {bank}/weather, weight: [1, 0]}}
rule: {{name: ties, density: 0.5}}
rank: 3
dtype: fp32
out: made
"""


@pytest.fixture
def recipe(world, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(bank=world.bank))
    return path


def crossed(parents, *, rule, rank):
    """What the recipe means, by the library."""
    bank = Bank.load(parents[:2])
    fading = {m: float(".0." in m) for m in bank["weather"]}  # the world's model has two layers
    return delta(run(bank, Weights({"spam": 0.5, "weather": fading}), rule, None, rank, torch.float32).adapter)


def test_a_recipe(cli, recipe, parents, tmp_path):
    ran = cli("merge", recipe)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == f"wrote {tmp_path / 'made'}"
    assert "0.000 to 1.000" in ran.out and "layer" in ran.out  # weather's weights, by layer
    assert "rule ties(density=0.5, " in ran.out
    assert error(delta(written(tmp_path / "made")), crossed(parents, rule=Ties(density=0.5), rank=3)) < 1e-6


def test_flags_override_a_recipe_and_it_is_said(cli, recipe, parents, tmp_path):
    ran = cli("merge", recipe, "-o", tmp_path / "m", "--rank", "2", "--majority", "frequency", "--space", "delta")
    lines = ran.out.splitlines()
    assert f"{recipe}: rank is 2 by flag, not 3" in lines
    assert f"{recipe}: rule is ties(density=0.5, majority=frequency) by flag, not ties(density=0.5)" in lines
    assert f"{recipe}: space is delta by flag" in lines
    rule = Ties(density=0.5, majority="frequency")
    assert error(delta(written(tmp_path / "m")), crossed(parents, rule=rule, rank=2)) < 1e-6
    assert not (tmp_path / "made").exists()
    said = json.loads(cli("merge", recipe, "-o", tmp_path / "n", "--rule", "linear", "--json").out)
    assert said["overrides"] == [f"{recipe}: rule is linear by flag, not ties(density=0.5)"]
    assert (said["rule"], said["rank_out"]) == ("linear", 3)


def test_energy_takes_the_place_of_a_recipes_rank(cli, recipe, tmp_path):
    said = json.loads(cli("merge", recipe, "--energy", "0.5", "-o", tmp_path / "m", "--json").out)
    assert "energy 0.5" in said["rank"]


def test_weights_override_a_recipe(cli, recipe, parents, tmp_path):
    ran = cli("merge", recipe, "-w", "2", "-1", "--rule", "linear", "--rank", "full", "-o", tmp_path / "m")
    assert f"{recipe}: weights are those of --weights" in ran.out
    assert error(delta(written(tmp_path / "m")), expected(parents[:2], [2, -1])) < 1e-5
    Weights({"spam": 3.0}).save(tmp_path / "w.json")
    cli("merge", recipe, "-w", tmp_path / "w.json", "--rule", "linear", "--rank", "full", "-o", tmp_path / "n")
    assert error(delta(written(tmp_path / "n")), expected(parents[:1], [3])) < 1e-5
    cli("merge", recipe, "-w", "1", "-o", tmp_path / "o").refused("1 numbers for 2 adapters (spam, weather)")


def test_a_bad_recipe_is_one_line_with_its_place(cli, recipe):
    recipe.write_text(recipe.read_text().replace("density: 0.5", "densty: 0.5"))
    cli("merge", recipe).refused(f"{recipe}:5:20: `rule.densty`", "did you mean `density`")


def test_the_output_repeats_itself(cli, parents, tmp_path):
    first = tmp_path / "a" / "m"
    cli("merge", *parents, "--rule", "dare_ties", "--rank", "2", "-o", first)
    assert cli("merge", first / "recipe.yaml", "-o", tmp_path / "b" / "m").code == 0
    assert all((first / f).read_bytes() == (tmp_path / "b/m" / f).read_bytes() for f in FILES)
    cli("merge", first / "recipe.yaml", "-o", first).refused(str(first), "exists already", "--overwrite")
    assert cli("merge", first / "recipe.yaml", "-o", first, "--overwrite").code == 0
    assert all((first / f).read_bytes() == (tmp_path / "b/m" / f).read_bytes() for f in FILES)


def test_the_lock(cli, world, tmp_path):
    shutil.copytree(world.bank / "spam", tmp_path / "a")
    cli("merge", tmp_path / "a", "-o", tmp_path / "m")
    shutil.rmtree(tmp_path / "a")
    shutil.copytree(world.bank / "weather", tmp_path / "a")
    again = ["merge", tmp_path / "m" / "recipe.yaml", "-o", tmp_path / "n", "--rank", "full"]
    cli(*again).refused("recipe.yaml:", "`adapters[0].hash`", "--update-lock")
    assert cli(*again, "--update-lock").code == 0
    assert error(delta(written(tmp_path / "n")), expected([world.bank / "weather"], [1])) < 1e-3
    assert cli("merge", tmp_path / "n" / "recipe.yaml", "-o", tmp_path / "o").code == 0


def test_save_recipe(cli, parents, tmp_path):
    saved = tmp_path / "deep" / "r.yaml"
    flags = ["--rule", "ties", "--density", "0.4", "-w", "1", "2", "3", "--rank", "2"]
    ran = cli("merge", *parents, *flags, "--save-recipe", saved)
    assert ran.code == 0 and f"wrote {saved}" in ran.out
    assert [p.name for p in tmp_path.iterdir()] == ["deep"] and [p.name for p in saved.parent.iterdir()] == ["r.yaml"]
    assert "nothing was written" not in ran.out and "nothing was merged (no -o)" in ran.out
    ran = cli("merge", *parents, *flags, "--save-recipe", saved, "--overwrite", "--explain", "-o", tmp_path / "no")
    assert "nothing was written" not in ran.out and "nothing was merged (--explain)" in ran.out
    assert "out: ../no" in saved.read_text() and not (tmp_path / "no").exists()
    cli("merge", *parents, *flags, "-o", tmp_path / "a")
    cli("merge", saved, "-o", tmp_path / "b")
    assert error(delta(written(tmp_path / "b")), delta(written(tmp_path / "a"))) == 0
    cli("merge", *parents, "--save-recipe", saved).refused("--save-recipe", "exists already")


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_explain_writes_nothing_and_says_all(cli, recipe, world, tmp_path):
    before = sorted(tmp_path.iterdir())
    ran = cli("merge", recipe, "--explain", "--rank", "2")
    assert ran.code == 0 and sorted(tmp_path.iterdir()) == before
    text = " ".join(ran.out.split())
    digest = Adapter.load(world.bank / "spam").content_hash.split(":")[1][:12]
    for part in (
        "rank is 2 by flag, not 3", "spam 2 14 fp32", digest, "0.500 0.500 to 0.500", "0.000 to 1.000",
        "density 0.5 (default 0.2)", "majority total (default)", "total or frequency", "trimming: each tensor", "normaliser: ",
        "space delta: on dW", "2 to 3 in, 2 out", "14, layers 0 to 1", "in fp32", "nothing was written",
    ):  # fmt: skip
        assert part in text, f"{part!r} is missing in: {text}"


def test_explain_as_data_and_the_size_is_right(cli, recipe, tmp_path):
    said = json.loads(cli("merge", recipe, "--explain", "--json").out)
    assert said["rule"]["parameters"]["density"]["value"] == 0.5 and said["rank"]["out"] == 3
    assert said["modules"]["count"] == 14 and said["modules"]["left_out"] == []
    cli("merge", recipe)
    merged = written(tmp_path / "made")
    held = sum(t.numel() * t.element_size() for m in merged for t in (merged[m].A, merged[m].B))
    assert said["output"] == {"dtype": "fp32", "bytes": held}


def test_explain_names_what_is_left_out_and_what_has_no_weight(cli, world, tmp_path):
    (tmp_path / "r.yaml").write_text(
        f"version: 1\nadapters:\n- {{path: {world.bank}/spam, weight: 1}}\n- {{path: {world.bank}/weather, weight: 0}}\n"
        "modules: {exclude: [mlp]}\n"
    )
    ran = cli("merge", tmp_path / "r.yaml", "--explain")
    text = " ".join(ran.out.split())
    assert "modules 8, layers 0 to 1 left out: " in text and "6 of 14 modules are left out" in text and "mlp" in text
    assert "adapter weather has weight 0: it takes no part" in text
    cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "m")
    assert not any("mlp" in m for m in written(tmp_path / "m"))


def test_weight_0_votes_in_factors_space_and_it_is_said(cli, world, tmp_path):
    shutil.copytree(world.bank / "spam", tmp_path / "twin")
    flags = ["--rule", "ties", "--space", "factors", "-w", "1", "0"]
    for more in (["--explain"], ["-o", tmp_path / "m"]):
        ran = cli("merge", world.bank / "spam", tmp_path / "twin", *flags, *more)
        assert ran.code == 0 and "note: twin: weight 0 still votes in factors space" in ran.out
