"""`loralloy merge`: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Annotated

import pytest
import torch

from helpers import delta, dense_sum, load_in_peft, relative
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.cli import parameters
from loralloy.errors import LoralloyError
from loralloy.merging import PLUGINS, RULES, DareTies, MagnitudePrune, Ties
from loralloy.merging import merge as run
from loralloy.merging.rule import Param, Plugin
from loralloy.merging.stack import LowRank
from loralloy.recipe import Recipe
from loralloy.saving import card
from loralloy.weights import Weights

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "recipe.yaml"]
NAMES = ["spam", "weather", "cooking"]


@pytest.fixture
def parents(world):
    return [world.bank / name for name in NAMES]


def written(out):
    """A strict reload: no stranger in the folder, no leftover beside it, every tensor read."""
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []
    return Adapter.load(out).validate()


def expected(folders, weights):
    loaded = [Adapter.load(f) for f in folders]
    return {m: dense_sum([a[m] for a in loaded], weights) for m in loaded[0]}


def error(got, want):
    both = [torch.cat([d[m].reshape(-1) for m in sorted(want)]) for d in (got, want)]
    return relative(*both)


FORMS = {
    "spaces": ["--weights", "0.6", "-0.4", "1.5"],
    "commas": ["--weights", "0.6,-0.4,1.5"],
    "both": ["-w", "0.6 -0.4", "1.5"],
    "repeated": ["--weights", "0.6", "--weights", "-0.4", "-w", "1.5"],
    "equals": ["--weights=0.6,-0.4,1.5"],
    "equals and spaces": ["--weights=0.6", "-0.4", "1.5"],
    "short and equals": ["-w=0.6", "-0.4,1.5"],
    "exponents": ["--weights", "6e-1", "-4e-1", "1.5"],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_weights(cli, parents, tmp_path, form):
    ran = cli("merge", *parents, *FORMS[form], "-o", tmp_path / "m", "--dtype", "fp32")
    assert ran.code == 0, ran.err
    merged = written(tmp_path / "m")
    assert error(delta(merged), expected(parents, [0.6, -0.4, 1.5])) < 1e-5
    assert [p["weight"] for p in merged.provenance["merge"]["parents"]] == [0.6, -0.4, 1.5]


def test_weights_before_the_adapters(cli, parents, tmp_path):
    assert cli("merge", "--weights", "2", "-1", *parents[:2], "-o", tmp_path / "m", "--dtype", "fp32").code == 0
    assert error(delta(written(tmp_path / "m")), expected(parents[:2], [2, -1])) < 1e-5


def test_weights_file(cli, parents, tmp_path):
    """By module too; an adapter that it does not name takes no part."""
    module = next(iter(Adapter.load(parents[0])))
    Weights({"spam": {"*": 0.5, module: -1.0}, "weather": 0.25}).save(tmp_path / "w.json")
    assert cli("merge", *parents, "-w", tmp_path / "w.json", "-o", tmp_path / "m", "--dtype", "fp32").code == 0
    want = expected(parents[:2], [0.5, 0.25])
    want[module] = expected(parents[:2], [-1.0, 0.25])[module]
    assert error(delta(written(tmp_path / "m")), want) < 1e-5


def test_no_weights_are_uniform(cli, parents, tmp_path):
    assert cli("merge", *parents, "-o", tmp_path / "m", "--dtype", "fp32").code == 0
    assert error(delta(written(tmp_path / "m")), expected(parents, [1 / 3] * 3)) < 1e-5


@pytest.mark.parametrize(
    ("flags", "rank", "bound"),
    [
        ([], 9, 1e-3),  # 2 + 3 + 4, stored as the parents are
        (["--rule", "linear", "--dtype", "fp32"], 9, 1e-5),
        (["--rule", "cat", "--dtype", "fp32"], 9, 1e-5),
        (["--rule", "cat", "--space", "factors", "--dtype", "fp32"], 9, 1e-5),
        (["--rule", "svd", "--rank", "full", "--dtype", "fp32"], 9, 1e-5),
        (["--rule", "svd", "--dtype", "fp32"], 4, 1.0),
        (["--rule", "svd", "--rank", "max"], 4, 1.0),
        (["--rule", "linear", "--rank", "2", "--dtype", "bf16"], 2, 1.0),
        (["--rule", "cat", "--rank", "3", "--dtype", "fp16"], 3, 1.0),
    ],
    ids=lambda value: " ".join(value) or "plain" if isinstance(value, list) else "",
)
def test_rules_spaces_ranks_dtypes(cli, parents, tmp_path, flags, rank, bound):
    ran = cli("merge", *parents, "--weights", "0.5", "0.3", "0.2", "-o", tmp_path / "m", *flags, "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    merged = written(tmp_path / "m")
    real = error(delta(merged), expected(parents, [0.5, 0.3, 0.2]))
    assert real < bound and said["error"]["stored"] == pytest.approx(real, rel=1e-2, abs=1e-6)
    assert merged.max_rank == said["rank_out"] == rank
    assert said["out"] == str(tmp_path / "m") and [p["name"] for p in said["parents"]] == NAMES
    assert {"rule", "space", "rank", "dtype", "weights_source"} <= said.keys()
    if "--dtype" in flags:
        assert said["dtype"] == flags[flags.index("--dtype") + 1]


def test_peft_reads_it(cli, parents, tmp_path):
    from transformers import AutoModelForCausalLM

    cli("merge", *parents, "--rule", "svd", "-o", tmp_path / "m")
    base = AutoModelForCausalLM.from_pretrained(parents[0].parents[1] / "model")
    load_in_peft(base, tmp_path / "m")


def test_what_it_says(cli, parents, tmp_path):
    ran = cli("merge", *parents[:2], "--weights", "0.6", "0.4", "--rule", "svd", "--rank", "1", "-o", tmp_path / "m")
    lines = ran.out.splitlines()
    assert lines[0].split()[:2] == ["spam", "0.600"] and "█" in lines[0]
    assert "rule svd, delta space, rank 1, 14 modules, stored as fp32" in ran.out
    assert "before the cast" in ran.out and "largest by module: " in ran.out and "[x]" not in ran.out
    assert lines[-1] == f"wrote {tmp_path / 'm'}"


def test_output_is_replaced_only_when_told(cli, parents, tmp_path):
    out = tmp_path / "m"
    assert cli("merge", *parents, "-o", out).code == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    cli("merge", *parents[:1], "-o", out).refused(str(out), "exists already", "--overwrite")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert cli("merge", *parents[:1], "-o", out, "--overwrite").code == 0
    assert error(delta(written(out)), expected(parents[:1], [1.0])) < 1e-3


def test_only_adapter_folders_are_replaced(cli, parents, tmp_path):
    """--overwrite is for an earlier result (or an empty folder), not for whatever stands there."""
    mine = tmp_path / "mine"
    shutil.copytree(parents[0], mine / "spam")
    (mine / "notes.txt").write_text("keep")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    says = ["not an adapter folder", "give another -o, or remove the folder yourself"]
    cli("merge", tmp_path / "none", "-o", mine, "--overwrite").refused(str(mine), *says)  # before any work
    with pytest.raises(LoralloyError, match=says[0]):
        Recipe.from_dict({"version": 1, "adapters": [str(parents[0])]}).prepare().merge(mine, overwrite=True)
    cli("merge", *parents, "-o", mine / "notes.txt", "--overwrite").refused("notes.txt is a file", "give another -o")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (tmp_path / "empty").mkdir()
    for replaced in (tmp_path / "empty", mine / "spam"):
        assert cli("merge", *parents, "-o", replaced, "--overwrite").code == 0
        written(replaced)


def test_a_taken_output_is_refused_before_any_work(cli, tmp_path):
    (tmp_path / "m").mkdir()
    cli("merge", tmp_path / "none", "-o", tmp_path / "m").refused(str(tmp_path / "m"), "exists already")


def test_the_same_bytes_twice(cli, parents, tmp_path):
    for name in "ab":
        cli("merge", *parents, "--rule", "svd", "-o", tmp_path / name / "m")
    assert all((tmp_path / "a/m" / f).read_bytes() == (tmp_path / "b/m" / f).read_bytes() for f in FILES)


BAD = {
    "missing folder": (["{bank}/spam", "{tmp}/none"], ["{tmp}/none"]),
    "too few weights": (["{bank}/spam", "{bank}/weather", "--weights", "1"], ["--weights", "1 numbers for 2 adapters"]),
    "too many weights": (["{bank}/spam", "--weights", "1", "2"], ["--weights", "2 numbers for 1 adapters"]),
    "NaN weight": (["{bank}/spam", "--weights", "nan"], ["--weights", "'spam'", "finite"]),
    "infinite weight": (["{bank}/spam", "{bank}/weather", "-w", "1", "inf"], ["--weights", "'weather'", "finite"]),
    "no weights file": (["{bank}/spam", "-w", "w.json"], ["--weights 'w.json'", "neither a number nor a weights file"]),
    "unknown rule": (["{bank}/spam", "--rule", "glue"], ["rule 'glue'", "linear, cat, svd"]),
    "unknown space": (["{bank}/spam", "--space", "outer"], ["space 'outer'", "delta", "factors"]),
    "rank 0": (["{bank}/spam", "--rank", "0"], ["--rank '0'", "positive number"]),
    "rank -1": (["{bank}/spam", "--rank", "-1"], ["--rank '-1'", "positive number"]),
    "rank abc": (["{bank}/spam", "--rank", "abc"], ["--rank 'abc'", "max or full"]),
    "rank and energy": (["{bank}/spam", "--rank", "2", "--energy", "0.9"], ["--rank and --energy"]),
    "energy 2": (["{bank}/spam", "--energy", "2"], ["--energy 2", "above 0 to 1"]),
    "energy x": (["{bank}/spam", "--energy", "x"], ["--energy 'x'", "above 0 to 1"]),
    "unknown device": (["{bank}/spam", "--device", "gpu"], ["--device 'gpu'", "cuda"]),
    "unknown measure": (["{bank}/spam", "--measure", "exat"], ["--measure 'exat'", "did you mean `exact`", "estimate"]),
    "space of other rules": (
        ["{bank}/spam", "--rule", "svd", "--space", "core"],
        ["--space", "svd", "core", "give delta"],
    ),
    "unknown plug-in": (["{bank}/spam", "--before", "glue"], ["plug-in 'glue'"]),
    "parameter of others": (
        ["{bank}/spam", "--rule", "svd", "--density", "0.2"],
        ["--density", "svd has no parameters", "It is for ties"],
    ),
    "parameter of another": (
        ["{bank}/spam", "--rule", "ties", "--prune", "each"],
        ["--prune", "ties has --density, --majority", "magnitude_prune"],
    ),
    "density 2": (["{bank}/spam", "--rule", "ties", "--density", "2"], ["--density", "'2'", "ties", "from 0 to 1"]),
    "density x": (["{bank}/spam", "--rule", "ties", "--density", "x"], ["--density", "'x'", "from 0 to 1"]),
    "majority most": (
        ["{bank}/spam", "--rule", "ties", "--majority", "most"],
        ["--majority", "'most'", "total or frequency"],
    ),
    "seed 1.5": (["{bank}/spam", "--rule", "dare_ties", "--seed", "1.5"], ["--seed", "'1.5'", "a whole number"]),
    "no recipe": (["{tmp}/none.yaml"], ["{tmp}/none.yaml: no such recipe"]),
    "recipe and adapter": (["{tmp}/none.yaml", "{bank}/spam"], ["{tmp}/none.yaml", "give it alone"]),
    "unknown dtype": (["{bank}/spam", "--dtype", "int8"], ["--dtype 'int8'", "fp16, bf16 or fp32"]),
    "twice one name": (["{bank}/spam", "{bank}/spam"], ["two adapters are called 'spam'", "rename"]),
    "another base": (["{bank}/spam", "{tmp}/other"], ["different base models", "--assume-same-base"]),
    "DoRA": (["{tmp}/dora"], ["'dora'", "use_dora"]),
    "torn file": (["{tmp}/torn"], ["'torn'", "adapter_model.safetensors"]),
    "torn config": (["{tmp}/tornconfig"], ["'tornconfig'", "adapter_config.json"]),
    # the last: what the engine refuses
    "factors of mixed rank": (["{bank}/spam", "{bank}/weather", "--space", "factors"], ["module", "rank"]),
}


@pytest.fixture(scope="module")
def broken(world, tmp_path_factory):
    """Adapters that cannot be merged."""
    root = tmp_path_factory.mktemp("broken")
    for name in ("other", "dora", "torn", "tornconfig"):
        shutil.copytree(world.bank / "spam", root / name)
    spam = Adapter.load(world.bank / "spam")
    shutil.rmtree(root / "other")
    base = type(spam.base)("other/llama", None, "bf16-sampled-v1:0")
    Adapter("other", {m: spam[m] for m in spam}, spam.config, base).save(root / "other")
    config = json.loads((root / "dora/adapter_config.json").read_text())
    (root / "dora/adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    for file in (root / "torn/adapter_model.safetensors", root / "tornconfig/adapter_config.json"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    return root


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(cli, world, broken, tmp_path, case):
    arguments, says = BAD[case]

    def fill(text):
        return text.format(bank=world.bank, tmp=broken)

    ran = cli("merge", *map(fill, arguments), "-o", tmp_path / "m")
    ran.refused(*map(fill, says))
    assert list(tmp_path.iterdir()) == []


def test_another_base_on_the_users_word(cli, world, broken, tmp_path):
    assert cli("merge", world.bank / "spam", broken / "other", "--assume-same-base", "-o", tmp_path / "m").code == 0
    written(tmp_path / "m")


# -- parameters of rules -----------------------------------------------------------------------------------------------


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
    return replace(stack, B=tuple(b * times for b in stack.B)), None


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


# -- recipes -----------------------------------------------------------------------------------------------------------

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
