"""A bad recipe is answered with its line."""

from __future__ import annotations

import re

import pytest
from recipe_scenes import MODULES, PLAIN

from loralloy.errors import LoralloyError
from loralloy.recipe import Recipe

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
        ["did you mean `weight`", "known here: path, name, weight, freed, hash"],
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
