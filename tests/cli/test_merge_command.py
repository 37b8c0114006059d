"""`loralloy merge`: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from merge_scenes import FILES, NAMES, error, expected, written

from helpers import delta, load_in_peft
from loralloy.adapter import Adapter
from loralloy.errors import LoralloyError
from loralloy.recipe import Recipe
from loralloy.weights import Weights

FORMS = {
    "spaces": ["--weights", "0.6", "-0.4", "1.5"],
    "commas": ["--weights", "0.6,-0.4,1.5"],
    "both": ["-w", "0.6 -0.4", "1.5"],
    "repeated": ["--weights", "0.6", "--weights", "-0.4", "-w", "1.5"],
    "equals": ["--weights=0.6,-0.4,1.5"],
    "equals and spaces": ["--weights=0.6", "-0.4", "1.5"],
    "short and equals": ["-w=0.6", "-0.4,1.5"],
    "short and attached": ["-w0.6", "-0.4", "1.5"],
    "all attached": ["-w0.6,-0.4", "-w1.5"],
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
    says = ["no earlier output", "give another -o, or remove the folder yourself"]
    cli("merge", tmp_path / "none", "-o", mine, "--overwrite").refused(str(mine), *says)  # before any work
    with pytest.raises(LoralloyError, match=says[0]):
        Recipe.from_dict({"version": 1, "adapters": [str(parents[0])]}).prepare().merge(mine, overwrite=True)
    cli("merge", *parents, "-o", mine / "notes.txt", "--overwrite").refused("notes.txt is a file", "give another -o")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (mine / "spam" / "notes.txt").write_text("keep")
    says = [str(mine / "spam"), "also holds notes.txt, which --overwrite would lose", "give another -o"]
    cli("merge", tmp_path / "none", "-o", mine / "spam", "--overwrite").refused(*says)
    assert (mine / "spam" / "notes.txt").read_text() == "keep"
    (mine / "spam" / "notes.txt").unlink()
    (tmp_path / "empty").mkdir()
    for replaced in (tmp_path / "empty", mine / "spam"):
        assert cli("merge", *parents, "-o", replaced, "--overwrite").code == 0
        written(replaced)


def test_a_trained_adapter_keeps_its_log(cli, parents, tmp_path):
    """What stands beside an adapter, in subfolders too, is named and stays; so is what only looks like an output."""
    trained = tmp_path / "trained"
    shutil.copytree(parents[0], trained)
    (trained / "runs").mkdir()
    for name in ("metrics.json", "runs/a.log", "runs/b.log", "training_log.jsonl"):
        (trained / name).write_text("{}")
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    says = ["also holds metrics.json, runs/a.log, runs/b.log and 1 more"]
    cli("merge", *parents, "-o", trained, "--overwrite").refused(*says)
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "README.md").write_text("mine")
    cli("merge", *parents, "-o", tmp_path / "page", "--overwrite").refused("no earlier output")
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before
    assert (tmp_path / "page" / "README.md").read_text() == "mine"


def test_an_adapter_that_only_saves_tensors(cli, world, tmp_path):
    """It has no dW: merged alone it is carried, beside another it adds nothing to dW."""
    spam = Adapter.load(world.bank / "spam")
    Adapter("head", {}, spam.config, spam.base, {"score.weight": torch.ones(2, 3)}).save(tmp_path / "head")
    for given in ([tmp_path / "head"], [world.bank / "spam", tmp_path / "head"]):
        recipe = tmp_path / "r.yaml"
        recipe.write_text("version: 1\nadapters:\n" + "".join(f"- {{path: {p}, weight: [1, 0.5]}}\n" for p in given))
        for how in (given, [recipe]):
            out = tmp_path / f"m{len(given)}{how is given}"
            ran = cli("merge", *how, "-o", out)
            assert ran.code == 0, ran.err
            merged = written(out)
            assert set(merged) == (set(spam) if len(given) == 2 else set())
            assert merged.extra == ["score.weight"] and "nan" not in ran.out


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
