"""Recipes: what they mean, that they come back as they were written, and that a bad one is answered with its line."""

from __future__ import annotations

import itertools
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from helpers import adapter, delta, factors, relative
from loralloy.adapter import Adapter
from loralloy.atomic import atomic_file
from loralloy.base_ref import BaseRef
from loralloy.cli import main
from loralloy.errors import LoralloyError
from loralloy.merging import PLUGINS, RULES, Ties, merge
from loralloy.recipe import RECIPE_FILE, Recipe
from loralloy.recipe.schema import Fields
from loralloy.weights import Weights

MODULES = [f"model.layers.{n}.{p}" for n in range(4) for p in ("self_attn.q_proj", "mlp.up_proj")]
NAMES = ["spam", "weather", "cooking"]


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Three adapters of rank 2, 3 and 4 on disk, eight modules each."""
    folder = tmp_path_factory.mktemp("recipes") / "bank"
    for n, name in enumerate(NAMES):
        parts = {m: factors(10, 8, 2 + n, seed=100 * n + k) for k, m in enumerate(MODULES)}
        adapter(parts, name).save(folder / name)
    return folder


@pytest.fixture
def write(bank, tmp_path):
    """write(text) -> a recipe file beside `bank`, which is called BANK in it."""
    counter = itertools.count()

    def run(text):
        path = tmp_path / f"recipe{next(counter)}.yaml"
        path.write_text(text.replace("BANK", str(bank)))
        return path

    return run


def total(got, want):
    return relative(*(torch.cat([d[m].reshape(-1) for m in sorted(want)]) for d in (got, want)))


PLAIN = """\
version: 1
adapters:
  - BANK/spam
  - BANK/weather
"""


# -- what it means -----------------------------------------------------------------------------------------------------


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


# -- it comes back as it was written -----------------------------------------------------------------------------------

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


# -- what is wrong, and where ------------------------------------------------------------------------------------------
# name: (the recipe, line:column, the field, what else is said)

BAD = {
    "a list": ("- version: 1\n", "1:1", None, ["a recipe is a mapping", "a list"]),
    "empty": ("# nothing\n", None, None, ["a recipe is a mapping", "nothing"]),
    "no version": ("adapters: [a]\n", "1:1", None, ["no `version`", "`version: 1`"]),
    "newer version": ("adapters: [a]\nversion: 2\n", "2:10", "version", ["newer", "upgrade"]),
    "version as text": ("version: '1'\nadapters: [a]\n", "1:10", "version", ["'1' is no version", "`version: 1`"]),
    "no adapters": ("version: 1\nrule: ties\n", "1:1", None, ["`adapters` is missing", "org/name@revision"]),
    "no adapter in the list": ("version: 1\nadapters: []\n", "2:11", "adapters", ["an empty list", "at least one"]),
    "adapters as text": ("version: 1\nadapters: bank/a\n", "2:11", "adapters", ["'bank/a'", "a list"]),
    "adapter is a number": ("version: 1\nadapters:\n  - a\n  - 3\n", "4:5", "adapters[1]", ["3", "folder", "`path`"]),
    "adapter without path": (
        "version: 1\nadapters:\n  - name: a\n    weight: 1\n", "3:5", "adapters[0]", ["`path` is missing"],
    ),
    "empty path": ("version: 1\nadapters: [{path: ''}]\n", "2:19", "adapters[0].path", ["not empty"]),
    "misspelt field": (PLAIN + "spcae: delta\n", "5:1", "spcae", ["did you mean `space`", "known here: version"]),
    "misspelt in an adapter": (
        "version: 1\nadapters:\n  - path: a\n    wieght: 1\n", "4:5", "adapters[0].wieght",
        ["did you mean `weight`", "known here: path, name, weight, hash"],
    ),
    "mergekit's word": (PLAIN + "merge_method: ties\n", "5:1", "merge_method", ["did you mean `rule`"]),
    "American": (PLAIN + "normalize: true\n", "5:1", "normalize", ["did you mean `normalise`"]),
    "given twice": (PLAIN + "rank: 8\nrule: svd\nrank: 4\n", "7:1", "rank", ["given twice", "lines 5 and 7"]),
    "given twice inside": (
        PLAIN + "rule: {name: ties,\n  density: 0.1, density: 0.2}\n", "6:17", "density", ["given twice"],
    ),
    "not YAML": (PLAIN + "rule: [ties\n", "6:1", None, ["not YAML", "','"]),
    "a tab": (PLAIN + "rule:\n\tname: ties\n", "6:1", None, ["not YAML", "cannot start any token"]),
    "two documents": (PLAIN + "---\nversion: 1\n", "5:1", None, ["not YAML", "another document"]),
    "a tag that runs code": (PLAIN + "out: !!python/name:os.system\n", "5:6", None, ["not YAML", "constructor"]),
    "a name that is no text": (PLAIN + "on: x\n", "5:1", None, ["`on`", "quote it"]),
    "unknown rule": (PLAIN + "rule: tise\n", "5:7", "rule", ["no rule 'tise'", "did you mean `ties`", "magnitude_prune"]),
    "unknown rule in a mapping": (PLAIN + "rule:\n  name: glue\n  density: 1\n", "6:3", "rule", ["no rule 'glue'"]),
    "rule without name": (PLAIN + "rule: {density: 0.2}\n", "5:7", "rule", ["`name` is missing"]),
    "rule is a list": (PLAIN + "rule: [ties]\n", "5:7", "rule", ["a list", "a name or a mapping"]),
    "misspelt parameter": (
        PLAIN + "rule:\n  name: ties\n  densty: 0.2\n", "7:3", "rule.densty",
        ["ties has no such parameter", "did you mean `density`", "density, majority"],
    ),
    "parameter of another rule": (
        PLAIN + "rule: {name: linear, density: 0.2}\n", "5:22", "rule.density", ["linear has no such", "none", "it is for ties"],
    ),
    "parameter out of range": (
        PLAIN + "rule: {name: ties, density: 1.5}\n", "5:29", "rule.density", ["1.5", "a number from 0 to 1"],
    ),
    "parameter of another kind": (
        PLAIN + "rule: {name: ties, majority: most}\n", "5:30", "rule.majority", ["'most'", "total or frequency"],
    ),
    "no plug-in": (PLAIN + "before: ties\n", "5:9", "before", ["ties is not a plug-in", "`rule`"]),
    "unknown space": (PLAIN + "space: delt\n", "5:8", "space", ["'delt'", "did you mean `delta`", "factors ("]),
    "rule without this space": (PLAIN + "rule: svd\nspace: core\n", "6:8", "space", ["svd is not defined on core", "delta"]),
    "rank 0": (PLAIN + "rank: 0\n", "5:7", "rank", ["0 is not a rank", "max or full"]),
    "rank as a word": (PLAIN + "rank: big\n", "5:7", "rank", ["'big'", "positive whole number"]),
    "rank and energy": (PLAIN + "rank: 4\nenergy: 0.9\n", "6:1", "energy", ["`rank` is given too"]),
    "energy over 1": (PLAIN + "energy: 99\n", "5:9", "energy", ["99", "above 0 to 1"]),
    "unknown dtype": (PLAIN + "dtype: float16\n", "5:8", "dtype", ["'float16'", "fp16, bf16 or fp32"]),
    "unknown device": (PLAIN + "device: gpu\n", "5:9", "device", ["'gpu'", "cpu, cuda"]),
    "unknown measure": (PLAIN + "measure: exactly\n", "5:10", "measure", ["did you mean `exact`", "estimate or none"]),
    "yes is not true": (PLAIN + "normalise: 'yes'\n", "5:12", "normalise", ["'yes'", "true or false"]),
    "out is a number": (PLAIN + "out: 5\n", "5:6", "out", ["5", "text (quote it)"]),
    "hash is short": (
        "version: 1\nadapters:\n- path: a\n  hash: sha256:abc\n", "4:9", "adapters[0].hash", ["64 hex digits"],
    ),
    "two sources of weights": (
        "version: 1\nweights: w.json\nadapters:\n- {path: a, weight: 1}\n", "2:1", "weights", ["adapters[0] has a `weight`"],
    ),
    "one weight missing": (
        "version: 1\nadapters:\n- {path: a, weight: 1}\n- {path: b}\n- {path: c, weight: 1}\n", "4:3", "adapters[1]",
        ["no `weight`"],
    ),
    "weight is text": ("version: 1\nadapters: [{path: a, weight: half}]\n", "2:30", "adapters[0].weight", ["'half'"]),
    "weight is infinite": ("version: 1\nadapters: [{path: a, weight: .inf}]\n", "2:30", "adapters[0].weight", ["finite"]),
    "1e-3 is text to YAML": (
        "version: 1\nadapters:\n- path: a\n  weight: [1, 1e-3]\n", "4:15", "adapters[0].weight[1]", ["write 0.001"],
    ),
    "misspelt filter": (
        "version: 1\nadapters:\n- path: a\n  weight:\n  - fliter: mlp\n    value: 1\n", "5:5",
        "adapters[0].weight[0].fliter", ["did you mean `filter`"],
    ),
    "default is not last": (
        "version: 1\nadapters:\n- path: a\n  weight:\n  - value: 1\n  - {filter: mlp, value: 2}\n", "5:5",
        "adapters[0].weight[0]", ["put it last"],
    ),
    # with the adapters opened
    "no such folder": (PLAIN + "  - BANK/none\n", "5:5", "adapters[2]", ["none' does not exist"]),
    "hub id without revision": (PLAIN + "  - org/name\n", "5:5", "adapters[2]", ["org/name"]),
    "no adapter there": ("version: 1\nadapters:\n  - path: BANK\n", "3:11", "adapters[0].path", ["not an adapter folder"]),
    "one name twice": (PLAIN + "  - BANK/spam\n", "5:5", "adapters[2]", ["'spam'", "`name`"]),
    "another base": (PLAIN + "base: other/model\n", "5:7", "base", ["tiny/llama", "other/model"]),
    "filter of no module": (
        "version: 1\nadapters:\n- path: BANK/spam\n  weight:\n  - {filter: q_porj, value: 1}\n  - value: 0\n", "5:5",
        "adapters[0].weight[0]", ["'q_porj' takes no module", "close names: q_proj"],
    ),
    "no such layers": (
        "version: 1\nadapters:\n- path: BANK/spam\n  weight:\n  - {layers: 8-9, value: 1}\n  - value: 0\n", "5:5",
        "adapters[0].weight[0]", ["its layers are 0 to 3"],
    ),
    "no default": (
        "version: 1\nadapters:\n- path: BANK/spam\n  weight:\n  - {filter: mlp, value: 1}\n", "5:3",
        "adapters[0].weight", ["no entry takes module 'model.layers.0.self_attn.q_proj' and 3 more"],
    ),
    "pattern of no module": (PLAIN + "modules:\n  - q_proj\n  - dwon_proj\n", "7:5", "modules[1]", ["'dwon_proj'"]),
    "exclude pattern of no module": (
        PLAIN + "modules:\n  exclude: [k_proj]\n", "6:13", "modules.exclude[0]", ["'k_proj'", "close names: q_proj"],
    ),
    "nothing left": (PLAIN + "modules: {exclude: [layers]}\n", "5:10", "modules", ["no module is left"]),
    "no weights file": (PLAIN + "weights: none.json\n", "5:10", "weights", ["none.json", "no such weights file"]),
    "weights sum to 0": (
        "version: 1\nnormalise: true\nadapters:\n- {path: BANK/spam, weight: 1}\n- {path: BANK/weather, weight: -1}\n",
        "2:12", "normalise", ["sum to 0"],
    ),
    "weights sum to 0 in one layer": (
        "version: 1\nnormalise: true\nadapters:\n- {path: BANK/spam, weight: [-1, 1]}\n- {path: BANK/weather, weight: 1}\n",
        "2:12", "normalise", ["model.layers.0.", "sum to 0"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_recipes(case, write):
    text, place, field, says = BAD[case]
    path = write(text)
    with pytest.raises(LoralloyError) as caught:
        Recipe.load(path).prepare()
    said = str(caught.value)
    if place:
        where = re.escape(f"{path}:{place}: ")
        assert re.match(where + (rf".*`{re.escape(field)}`" if field else ""), said), said
    for part in says:
        assert part in said, f"{part!r} is missing in: {said}"
    assert "\n" not in said and len(said) < 700 and "pydantic" not in said


def test_all_that_is_wrong_is_said_in_the_order_of_the_file(write):
    path = write(PLAIN + "dtype: int8\nrule: {name: ties}\nrank: 0\nspcae: x\n")
    with pytest.raises(LoralloyError) as caught:
        Recipe.load(path)
    said = str(caught.value)
    assert said.startswith(f"{path}:5:8: `dtype`: ")
    assert said.index("; and 7:7: `rank`") < said.index("; and 8:1: `spcae`")


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(LoralloyError, match="no such recipe"):
        Recipe.load(tmp_path / "none.yaml")
    for name, content, says in (
        ("bytes.yaml", b"\xff\xfe\x00", "not a text file"),
        ("long.yaml", b"a: 1\n" * 300_000, "characters"),
        ("deep.yaml", b"[" * 5000, "nested too deeply"),
        ("nul.yaml", b"version: 1\nadapters: [a\x01]", ":2:13: not YAML"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LoralloyError, match=says) as caught:
            Recipe.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(LoralloyError, match="cannot be read"):
        Recipe.load(tmp_path)


def test_a_bomb_of_aliases_is_answered(tmp_path):
    """Ten levels of ten aliases stand for 10^10 items."""
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11)]
    (tmp_path / "bomb.yaml").write_text("version: 1\n" + "\n".join(lines) + "\nadapters: *a10\n")
    with pytest.raises(LoralloyError) as caught:
        Recipe.load(tmp_path / "bomb.yaml")
    assert len(str(caught.value)) < 5000


def test_anchors_may_be_used(write):
    text = "version: 1\nadapters:\n- {path: BANK/spam, weight: &w [1, 0]}\n- {path: BANK/weather, weight: *w}\n"
    weights = Recipe.load(write(text)).prepare().weights
    assert all(weights.of("spam", m) == weights.of("weather", m) for m in MODULES)


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


EXAMPLES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_the_shipped_recipes_can_be_planned(path, real_bank_folder):
    job = Recipe.load(path).prepare()
    plan = job.plan()
    assert plan.modules and set(plan.modules).isdisjoint(job.left_out)
    assert all(job.weights.of(n, m) == 0 for n in job.weights.names for m in job.left_out)


def test_there_are_shipped_recipes():
    assert len(EXAMPLES) >= 3
