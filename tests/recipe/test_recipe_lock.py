"""Recipes come back as they were written, and are locked to the content of their adapters."""

from __future__ import annotations

import shutil
import sys

import pytest
import yaml
from recipe_scenes import MODULES, PLAIN, total

from helpers import delta
from loralloy.adapter import Adapter
from loralloy.cli import main
from loralloy.errors import LoralloyError
from loralloy.merging import Ties
from loralloy.recipe import RECIPE_FILE, Recipe
from loralloy.recipe.schema import Fields
from loralloy.weights import Weights

FULL = """\
version: 1
adapters:
- path: BANK/spam
  name: a
  weight:
  - filter: q_proj
    value: [0.0, 1.0]
  - value: 0.25
- path: BANK/weather
  weight: {'*': 0.5}
normalise: true
modules: [self_attn]
rule: {name: ties, density: 0.3}
space: core
energy: 0.9
dtype: fp32
measure: none
out: made
"""


def test_to_yaml_and_back(write):
    recipe = Recipe.load(write(FULL))
    again = Recipe.load(write(recipe.to_yaml()))
    assert again.model_dump() == recipe.model_dump() and again.to_yaml() == recipe.to_yaml()
    assert "[0.0, 1.0]" in recipe.to_yaml()  # a gradient stays on one line
    assert again.prepare().weights == recipe.prepare().weights


def test_every_field_is_written(write):
    recipe = Recipe.load(write(FULL))
    given = set(yaml.safe_load(FULL))
    assert set(yaml.safe_load(recipe.to_yaml())) == given
    assert {"version", "adapters", "rule"} <= given <= set(Fields.model_fields)


def test_the_lock_names_the_content(write, bank):
    recipe = Recipe.load(write(PLAIN))
    assert [e.hash for e in recipe.lock().adapters] == [
        Adapter.load(bank / n).content_hash for n in ("spam", "weather")
    ]
    assert total(delta(recipe.lock().prepare().merge().adapter), delta(recipe.prepare().merge().adapter)) == 0


def test_the_output_holds_a_recipe_that_repeats_it(write, tmp_path):
    """Bit for bit, from a folder that was moved with its bank; every parameter's value is in it."""
    text = FULL.replace("energy: 0.9", "rank: 3")
    first = Recipe.load(write(text)).prepare().merge(tmp_path / "one" / "m")
    assert first.adapter.path == tmp_path / "one" / "m"
    saved = yaml.safe_load((tmp_path / "one" / "m" / RECIPE_FILE).read_text())
    assert saved["rule"] == {"name": "ties", **Ties(density=0.3).values}
    assert (saved["rank"], saved["space"]) == (3, "core")
    again = Recipe.load(tmp_path / "one" / "m" / RECIPE_FILE)
    again.prepare().merge(tmp_path / "two" / "m")
    for file in ("adapter_model.safetensors", "adapter_config.json", RECIPE_FILE):
        assert (tmp_path / "one" / "m" / file).read_bytes() == (tmp_path / "two" / "m" / file).read_bytes(), file


def test_the_outputs_recipe_names_no_output(write, tmp_path, monkeypatch, capsys):
    """A copy of it would name the folder that it was copied to, and --overwrite would replace that."""
    Recipe.load(write(FULL)).prepare().merge(tmp_path / "m")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    shutil.copy(tmp_path / "m" / RECIPE_FILE, tmp_path / "mine" / "copied.yaml")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(sys, "argv", ["loralloy", "merge", str(tmp_path / "mine" / "copied.yaml"), "--overwrite"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code and "give the folder to write" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert "out" not in yaml.safe_load((tmp_path / "m" / RECIPE_FILE).read_text())


def test_a_weights_file_is_inlined(write, tmp_path):
    Weights({"spam": {MODULES[0]: 2.0, "*": 4.0}, "weather": 4.0}).save(tmp_path / "w.json")
    made = Recipe.load(write(PLAIN + "weights: w.json\nnormalise: true\n")).prepare().merge(tmp_path / "m").adapter
    (tmp_path / "w.json").unlink()
    assert total(delta(Recipe.load(tmp_path / "m" / RECIPE_FILE).prepare().merge().adapter), delta(made)) == 0


def test_a_changed_adapter_is_refused(bank, tmp_path):
    shutil.copytree(bank / "spam", tmp_path / "a")
    Recipe.from_dict({"version": 1, "adapters": [str(tmp_path / "a")]}).prepare().merge(tmp_path / "m")
    shutil.rmtree(tmp_path / "a")
    shutil.copytree(bank / "weather", tmp_path / "a")
    recipe = Recipe.load(tmp_path / "m" / RECIPE_FILE)
    with pytest.raises(LoralloyError) as caught:
        recipe.prepare()
    line = next(
        n for n, text in enumerate((tmp_path / "m" / RECIPE_FILE).read_text().splitlines(), 1) if "hash:" in text
    )
    for part in (f"{RECIPE_FILE}:{line}:", "`adapters[0].hash`", "'a'", "--update-lock"):
        assert part in str(caught.value)
    updated = recipe.prepare(update_lock=True)
    assert updated.resolved().adapters[0].hash == Adapter.load(bank / "weather").content_hash


def test_nothing_is_left_of_a_merge_that_failed(write, tmp_path):
    text = PLAIN.replace("- BANK/spam", "- {path: BANK/spam, weight: 1.0e+30}")
    text = text.replace("- BANK/weather", "- {path: BANK/weather, weight: 1}") + "dtype: fp16\nrank: 1\n"
    job = Recipe.load(write(text)).prepare()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(LoralloyError, match="overflows"):
        job.merge(tmp_path / "m")
    assert sorted(tmp_path.iterdir()) == before


def test_from_dict_and_replace(bank):
    data = {"version": 1, "adapters": [{"path": str(bank / "spam")}], "rank": 2}
    recipe = Recipe.from_dict(data)
    assert recipe.rank == 2 and recipe.path is None
    other = recipe.replace(rank=None, rule="svd")
    assert (other.rank, other.rule.name, recipe.rule.name) == (None, "svd", "linear")
    with pytest.raises(LoralloyError, match=r"^recipe: `rank`: 0 is not a rank"):
        recipe.replace(rank=0)
    assert data == {"version": 1, "adapters": [{"path": str(bank / "spam")}], "rank": 2}
