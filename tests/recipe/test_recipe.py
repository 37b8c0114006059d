"""Recipes: what they mean."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from recipe_scenes import MODULES, PLAIN, total

from helpers import adapter, delta, factors
from loralloy.atomic import atomic_file
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError
from loralloy.merging import PLUGINS, RULES, Ties, merge
from loralloy.recipe import RECIPE_FILE, Recipe
from loralloy.weights import Weights


def test_the_least_recipe(write, bank):
    job = Recipe.load(write(PLAIN)).prepare()
    assert job.weights.coefficients == {"spam": 0.5, "weather": 0.5}
    assert (str(job.rule), job.space, job.rank, job.left_out) == ("linear", "delta", "full", ())
    want = merge(job.bank, job.weights).adapter
    assert total(delta(job.merge().adapter), delta(want)) == 0


def test_every_field_reaches_the_merge(write, bank):
    recipe = Recipe.load(
        write("""\
version: 1
base: tiny/llama
adapters:
  - {path: BANK/spam, name: a, weight: 2}
  - {path: BANK/weather, name: b, weight: 1}
normalise: true
rule: {name: ties, density: 0.5, majority: frequency, normaliser: weights}
space: knots
rank: 3
dtype: bf16
measure: estimate
modules: {exclude: [mlp]}
""")
    )
    job = recipe.prepare()
    kept = [m for m in MODULES if "mlp" not in m]
    assert job.bank.names == ["a", "b"] and set(job.left_out) == set(MODULES) - set(kept)
    result = job.merge()
    given = Weights({n: {m: w if m in kept else 0.0 for m in MODULES} for n, w in (("a", 2 / 3), ("b", 1 / 3))})
    rule = Ties(density=0.5, majority="frequency", normaliser="weights")
    want = merge(job.bank, given, rule, "knots", 3, torch.bfloat16, measure="estimate")
    assert set(result.adapter) == set(kept)
    assert total(delta(result.adapter), delta(want.adapter)) == 0
    assert result.adapter.dtype == torch.bfloat16 and result.adapter.max_rank == 3
    assert result.report == want.report


def test_weights_by_module(write):
    recipe = Recipe.load(
        write("""\
version: 1
adapters:
  - path: BANK/spam
    weight: [1, 0]
  - path: BANK/weather
    weight:
      - {filter: q_proj, layers: 0-1, value: 0.5}
      - {value: [0, 3]}
""")
    )
    weights = recipe.prepare().weights
    for n in range(4):
        assert weights.of("spam", f"model.layers.{n}.mlp.up_proj") == pytest.approx(1 - n / 3)
        assert weights.of("weather", f"model.layers.{n}.mlp.up_proj") == pytest.approx(n)
        assert weights.of("weather", f"model.layers.{n}.self_attn.q_proj") == pytest.approx(0.5 if n < 2 else n)


def test_normalised_by_module(write):
    text = PLAIN.replace("- BANK/spam", "- {path: BANK/spam, weight: [1, 3]}").replace(
        "- BANK/weather", "- {path: BANK/weather, weight: 1}"
    )
    weights = Recipe.load(write(text + "normalise: true\n")).prepare().weights
    for n in range(4):
        w = 1 + 2 * n / 3
        assert weights.of("spam", f"model.layers.{n}.mlp.up_proj") == pytest.approx(w / (w + 1))
    assert all(weights.of("spam", m) + weights.of("weather", m) == pytest.approx(1) for m in MODULES)


def test_a_weights_file(write, tmp_path):
    Weights({"weather": {MODULES[0]: -1.0, "*": 0.5}, "spam": 0.25}, "retrieved").save(tmp_path / "w.json")
    job = Recipe.load(write(PLAIN + "  - BANK/cooking\nweights: w.json\n")).prepare()
    assert job.weights.source == "retrieved" and job.weights.names == ["weather", "spam"]
    assert job.weights.of("weather", MODULES[0]) == -1.0 and job.weights.of("weather", MODULES[1]) == 0.5
    assert any("cooking" in note and "no part" in note for note in job.notes())


def test_paths_are_relative_to_the_recipe(bank, tmp_path, monkeypatch):
    shutil.copytree(bank, tmp_path / "here" / "bank")
    atomic_file(tmp_path / "here" / "recipes" / "r.yaml", "version: 1\nadapters: [../bank/spam]\nout: ../made\n")
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load("here/recipes/r.yaml")
    assert recipe.prepare().bank.names == ["spam"]
    assert recipe.out_path.resolve() == (tmp_path / "here" / "made").resolve()


def test_a_saved_recipe_finds_its_files_from_its_own_folder(bank, tmp_path, monkeypatch):
    """And goes on to do so when the folder that holds all is moved."""
    old = tmp_path / "old"
    shutil.copytree(bank, old / "bank")
    Weights({"spam": 2.0}).save(old / "recipes" / "w.json")
    atomic_file(old / "recipes" / "r.yaml", "version: 1\nadapters: [../bank/spam]\nweights: w.json\nout: ../made\n")
    recipe = Recipe.load(old / "recipes" / "r.yaml")
    data = yaml.safe_load(recipe.to_yaml(old / "deep" / "er"))
    assert (data["adapters"][0]["path"], data["weights"]) == ("../../bank/spam", "../../recipes/w.json")
    assert data["out"] == "../../made"
    made = recipe.prepare().merge(recipe.out_path).adapter
    want = delta(made)
    old.rename(tmp_path / "new")
    again = Recipe.load(tmp_path / "new" / "made" / RECIPE_FILE)
    assert again.source(0)[0] == str(tmp_path / "new" / "bank" / "spam")
    assert total(delta(again.prepare().merge().adapter), want) == 0


def test_the_result_is_called_like_its_folder(write, tmp_path):
    made = Recipe.load(write(PLAIN)).prepare().merge(tmp_path / "joined").adapter
    assert made.name == "joined" and "# joined\n" in (tmp_path / "joined" / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["joined"]


def test_assume_same_base(write, tmp_path):
    parts = {m: factors(10, 8, 2, seed=k) for k, m in enumerate(MODULES)}
    adapter(parts, "stranger", BaseRef("other/model")).save(tmp_path / "stranger")
    text = PLAIN + f"  - {tmp_path}/stranger\n"
    with pytest.raises(LoralloyError, match=r":3:3: `adapters`: .*different base models"):
        Recipe.load(write(text)).prepare()
    assert "stranger" in Recipe.load(write(text + "assume_same_base: true\nbase: a/third\n")).prepare().bank


def test_left_out_modules_leave_no_trace(write):
    """The rest is as it would be without them, whatever the space."""
    for space in ("delta", "factors"):
        text = PLAIN.replace("weather", "spam, name: b}").replace("- BANK/spam, ", "- {path: BANK/spam, ")
        text += f"rule: ties\nspace: {space}\n"
        every = Recipe.load(write(text)).prepare().merge().adapter
        some = Recipe.load(write(text + 'modules: ["*.layers.1.*", q_proj]\n')).prepare().merge().adapter
        kept = [m for m in MODULES if "q_proj" in m or ".1." in m]
        assert sorted(some) == sorted(kept)
        assert total(delta(some), {m: every[m].dense(torch.float64) for m in kept}) < 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_with_every_default_can_be_written_out(rule, write):
    values = RULES[rule].values
    recipe = Recipe.load(write(PLAIN + yaml.safe_dump({"rule": {"name": rule, **values}})))
    assert recipe.parts()[0].values == values


@pytest.mark.parametrize("plugin", PLUGINS)
def test_every_plug_in_can_be_named(plugin, write):
    when = PLUGINS[plugin].when
    recipe = Recipe.load(write(PLAIN + f"{when}: {plugin}\n"))
    found = dict(zip(("rule", "before", "after"), recipe.parts(), strict=True))[when]
    assert str(found) == str(PLUGINS[plugin])
    other = {"before": "after", "after": "before"}[when]
    with pytest.raises(LoralloyError, match=rf":5:{len(other) + 3}: .*give it as `{when}`"):
        Recipe.load(write(PLAIN + f"{other}: {plugin}\n"))


EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_the_shipped_recipes_can_be_planned(path, real_bank_folder):
    job = Recipe.load(path).prepare()
    plan = job.plan()
    assert plan.modules and set(plan.modules).isdisjoint(job.left_out)
    assert all(job.weights.of(n, m) == 0 for n in job.weights.names for m in job.left_out)


def test_there_are_shipped_recipes():
    assert len(EXAMPLES) >= 3
