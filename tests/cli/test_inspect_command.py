"""`loralloy inspect`: text, --modules, --json."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from helpers import delta, peft_folder, tiny_llama
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef


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


# -- two or more: what they share --------------------------------------------------------------------------------------

TWO = ("weather", "spam")


def folders(world, *names: str) -> list:
    return [world.bank / name for name in names or TWO]


def dense_cosine(world, names=TWO, of: str = "") -> float:
    x, y = (delta(Adapter.load(world.bank / name)) for name in names)
    x, y = (torch.cat([d[m].flatten() for m in sorted(d) if of in m]) for d in (x, y))
    return float(torch.nn.functional.cosine_similarity(x, y, 0))


def test_two_adapters(cli, world):
    ran = cli("inspect", *folders(world))
    assert ran.code == 0 and ran.err == ""
    assert ran.out.startswith("2 adapters of tiny/llama (fingerprint ")
    row = next(line.split() for line in ran.out.splitlines() if line.startswith("cosine of dW"))
    assert float(row[3]) == pytest.approx(dense_cosine(world), abs=6e-4)
    assert re.search(r"^layer +cosine +outputs", ran.out, re.M)
    words = ran.out.split("what the numbers say")[1]
    assert "Ranks differ (weather 3, spam 2)" in words and "no measurement of accuracy" in words
    assert "candidates to compare: linear, svd" in words


def test_overlap_by_layer_projection_and_module(cli, world):
    for flags, of in (
        ([], "layers.1."),
        (["--by", "projection"], "self_attn.q_proj"),
        (["--modules"], "layers.1.mlp.up_proj"),
    ):
        said = json.loads(cli("inspect", *folders(world), *flags, "--json").out)
        groups = {str(g["name"]): g for g in said["groups"]}
        assert [len(groups), said["by"]] == {0: [2, "layer"], 1: [14, "module"], 2: [7, "projection"]}[len(flags)]
        name = next(n for n in groups if n == of or n.endswith(of.strip(".").removeprefix("layers.")))
        assert groups[name]["cosine"][0][1] == pytest.approx(dense_cosine(world, of=of), abs=1e-6)
        printed = cli("inspect", *folders(world), *flags).out
        assert any(line.split()[:1] == [name] for line in printed.splitlines())
    assert said["all"]["cosine"][0][1] == pytest.approx(dense_cosine(world), abs=1e-6)
    assert said["candidates"][:2] == ["linear", "svd"] and said["verdict"][-1]["kind"] == "caution"


def test_a_folder_stands_for_its_adapters(cli, world):
    said = json.loads(cli("inspect", world.bank, "--json").out)
    assert [a["name"] for a in said["adapters"]] == sorted(p.name for p in world.bank.iterdir())
    again = json.loads(cli("inspect", *sorted(world.bank.iterdir()), "--json").out)
    assert again == said
    printed = cli("inspect", world.bank).out
    assert all(re.search(rf"^\d +{a['name']} ", printed, re.M) for a in said["adapters"])


def test_every_command_means_the_same_by_a_folder_of_adapters(cli, world, tmp_path):
    """Also of a file in diffusers' form, and of a folder that only has a part of an adapter: it is named, not passed over."""
    for name in TWO:
        shutil.copytree(world.bank / name, tmp_path / "bank" / name)
    diffusers = tmp_path / "bank" / "unet"
    diffusers.mkdir()
    tensors = {f"unet.to_q.lora_{s}.weight": torch.ones(n) for s, n in (("A", (2, 4)), ("B", (4, 2)))}
    save_file(tensors, diffusers / "pytorch_lora_weights.safetensors")
    said = json.loads(cli("inspect", tmp_path / "bank", "--assume-same-base", "--json").out)
    assert [a["name"] for a in said["adapters"]] == Bank.load(tmp_path / "bank", assume_same_base=True).names
    (diffusers / "pytorch_lora_weights.safetensors").rename(diffusers / "adapter_model.safetensors")
    cli("inspect", tmp_path / "bank").refused("adapter 'unet'", "holds no adapter_config.json")


def test_an_adapter_that_only_saves_tensors(cli, world, tmp_path):
    made = Adapter.load(world.bank / "weather")
    saved = {"score.weight": torch.ones(2, 3)}
    Adapter("head", {}, made.config, made.base, saved).save(tmp_path / "head")
    for flags in ([], ["--modules"]):
        ran = cli("inspect", tmp_path / "head", *flags)
        assert ran.code == 0 and ran.err == ""
        assert "no LoRA module, fp32" in ran.out and "it only saves tensors whole: score.weight" in ran.out
        assert "norm of dW" not in ran.out
    said = json.loads(cli("inspect", tmp_path / "head", "--json").out)
    assert said["modules"] == said["layers"] == [] and said["extra"] == ["score.weight"]
    ran = cli("inspect", *folders(world), tmp_path / "head")
    assert ran.code == 0 and "Ranks differ (weather 3, spam 2, head none)" in ran.out


def test_plot(cli, world, tmp_path):
    picture = tmp_path / "overlap.png"
    ran = cli("inspect", *folders(world), "--plot", picture)
    assert ran.out.endswith(f"wrote {picture}\n") and picture.read_bytes().startswith(b"\x89PNG")
    picture.write_bytes(b"mine")
    cli("inspect", *folders(world), "--plot", picture).refused("exists already", "--overwrite")
    assert picture.read_bytes() == b"mine"
    cli("inspect", *folders(world), "--plot", tmp_path / "x.jpg").refused("--plot", ".png")
    said = json.loads(cli("inspect", *folders(world), "--plot", picture, "--overwrite", "--json").out)
    assert said["plot"] == str(picture) and picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [picture]


def test_overlap_refusals(cli, world, tmp_path):
    weather, spam = folders(world)
    cli("inspect", weather, "--plot", tmp_path / "x.png").refused("--plot", "two or more")
    cli("inspect", weather, "--by", "projection").refused("--by projection", "two or more")
    cli("inspect", weather, spam, "--by", "depth").refused("--by 'depth'", "layer or projection")
    cli("inspect", weather, spam, "--by", "projection", "--modules").refused("--modules", "pass one")
    cli("inspect", weather, weather).refused("two adapters are called 'weather'")
    made = Adapter.load(weather)
    Adapter("else", {m: made[m] for m in made}, made.config, BaseRef("other/model")).save(tmp_path / "else")
    cli("inspect", weather, tmp_path / "else").refused("different base models", "--assume-same-base")
    said = json.loads(cli("inspect", weather, tmp_path / "else", "--assume-same-base", "--json").out)
    assert said["all"]["cosine"][0][1] == pytest.approx(1)
    Adapter("apart", {"model.other": made[next(iter(made))]}, made.config, made.base).save(tmp_path / "apart")
    cli("inspect", weather, tmp_path / "apart").refused("have a module in common", "model.other")


def test_zero_is_shown_as_undefined(cli, world, tmp_path):
    made = Adapter.load(world.bank / "weather")
    zero = {m: made[m].with_matrices(made[m].a, torch.zeros_like(made[m].b)) for m in made}
    Adapter("zero", zero, made.config, made.base).save(tmp_path / "zero")
    ran = cli("inspect", world.bank / "spam", tmp_path / "zero")
    assert "zero: dW is zero everywhere" in ran.out and "nan" not in ran.out
    assert re.search(r"^cosine of dW +–", ran.out, re.M)
    said = json.loads(cli("inspect", world.bank / "spam", tmp_path / "zero", "--json").out)
    assert said["all"]["cosine"][0][1] is None and said["candidates"] == []
