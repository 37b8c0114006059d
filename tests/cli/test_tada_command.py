"""`loralloy tada`: probe, gates, merge and report on a tiny model, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from helpers import load_in_peft, logits, relative
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.cli import tada
from loralloy.layerwise import layer_of
from loralloy.live.base import load_base
from loralloy.live.scoring import encode_answer
from loralloy.merging import Tada, merge
from loralloy.weighting import balance
from loralloy.weighting import tada as composing
from loralloy.weighting.common import freed_bank
from loralloy.weighting.gating import Gate
from loralloy.weighting.general_texts import GENERAL
from loralloy.weighting.probed import probe, text_batches
from loralloy.weights import Weights


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "domain.jsonl"
    words = ["rain", "sun", "cloud", "storm", "wind", "snow"]
    rows = [{"text": f"{words[n % 6]} and {words[n % 5]} on day {n}", "label": "x"} for n in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(cli, world, texts):
    """run(*options) with the task `spam`, the domain `weather`, the tiny model and 8 texts."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # main() asks for it by a variable that is read at import, which is long past here

    def go(*options: object, adapters: tuple[str, ...] = ("spam", "weather")):
        paths = [world.bank / name for name in adapters]
        return cli(
            "tada",
            *paths,
            *world.flags("model"),
            "-c",
            texts,
            "--inputs",
            8,
            "--max-length",
            64,
            "--model-dtype",
            "float32",
            *options,
        )

    return go


def test_it_writes_the_gated_merge_as_a_standard_adapter(run, cli, world, texts, tmp_path):
    out = tmp_path / "made"
    more = ["--save-weights", tmp_path / "gates.json", "--plot", tmp_path / "gates.png"]
    ran = run("-o", out, "--json", "--conflict", "shared", "--common", 0, *more)
    assert ran.code == 0, ran
    data = json.loads(ran.out)
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "recipe.yaml",
    ]  # fmt: skip
    bank = Bank.load([world.bank / "spam", world.bank / "weather"])
    weights = Weights.load(tmp_path / "gates.json")
    assert weights.source == "probed" and weights.explain["inputs"] == 8 and data["inputs"] == 8
    assert all(weights.of("spam", m) + weights.of("weather", m) == pytest.approx(2) for m in bank.modules)
    assert len({round(weights.of("spam", m), 6) for m in bank.modules}) > 7
    want = merge(bank, weights, Tada)
    got = Adapter.load(out)
    assert got.max_rank == 3 == data["rank"]
    assert all(relative(got[m].dense(), want.adapter[m].dense()) < 1e-6 for m in bank.modules)
    assert data["error"]["stored"] == pytest.approx(want.report.error, rel=1e-6)
    model, _ = load_base(str(world.model), "float32", "cpu")
    assert torch.isfinite(logits(load_in_peft(model, out), torch.tensor([[5, 6, 7]]))).all()
    # the picture, the record, and the recipe, which repeats the merge without a model
    assert (tmp_path / "gates.png").stat().st_size > 5000
    assert got.provenance["merge"]["rule"] == "tada" and got.provenance["merge"]["weights_source"] == "probed"
    assert cli("merge", out / "recipe.yaml", "-o", tmp_path / "again").code == 0
    assert got.content_hash == Adapter.load(tmp_path / "again").content_hash


def test_by_default_the_domain_is_freed_of_one_direction_and_nothing_is_discarded(run, cli, world, texts, tmp_path):
    ran = run("-o", tmp_path / "a", "--inputs", 100, "--save-weights", tmp_path / "w.json")
    assert ran.code == 0 and "no recipe" not in ran.out, ran
    assert "rule tada(conflict=none" in ran.out and "discarded" not in ran.out and "freed of the directions" in ran.out
    bank = Bank.load([world.bank / "spam", world.bank / "weather"])
    model, tokenizer = load_base(str(world.model), "float32", "cpu")
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    readings = probe(model, bank, text_batches(tokenizer, rows, 8, 64), common=1)
    weights = Gate().weights(readings)
    saved = Weights.load(tmp_path / "w.json")
    want = merge(freed_bank(bank, readings.common, 1, ["weather"]), weights, Tada(conflict="none")).adapter
    kept = merge(bank, weights, Tada(conflict="none")).adapter
    got = Adapter.load(tmp_path / "a")
    for m in bank.modules:
        assert saved.of("weather", m) == pytest.approx(weights.of("weather", m), rel=1e-4)
        assert relative(got[m].dense(), want[m].dense()) < 2e-3
    assert max(relative(kept[m].dense(), want[m].dense()) for m in bank.modules) > 0.05
    # the recipe has what the model showed, and repeats the merge without it
    recipe = yaml.safe_load((tmp_path / "a/recipe.yaml").read_text())
    assert [e.get("freed", {}).get("path") for e in recipe["adapters"]] == [None, "freed.safetensors"]
    again = cli("merge", tmp_path / "a/recipe.yaml", "-o", tmp_path / "again")
    assert again.code == 0 and "adapter weather is freed of the directions in freed.safetensors" in again.out, again
    assert Adapter.load(tmp_path / "again").content_hash == got.content_hash
    assert got.provenance["tada"]["freed"]["directions"] == 1
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == sorted(p.name for p in (tmp_path / "a").iterdir())
    third = cli("merge", tmp_path / "again/recipe.yaml", "-o", tmp_path / "third")
    assert third.code == 0 and Adapter.load(tmp_path / "third").content_hash == got.content_hash
    file = tmp_path / "a/freed.safetensors"
    kept = file.read_bytes()
    file.write_bytes((tmp_path / "again/adapter_model.safetensors").read_bytes())
    cli("merge", tmp_path / "a/recipe.yaml", "-o", tmp_path / "x").refused(
        "freed.safetensors has directions of none of the"
    )
    file.write_bytes(kept[:-4] + b"\0\0\0\0")
    cli("merge", tmp_path / "a/recipe.yaml", "-o", tmp_path / "x").refused(
        "is not the file that this recipe was locked to"
    )
    file.write_text("no")
    cli("merge", tmp_path / "a/recipe.yaml", "-o", tmp_path / "x").refused(
        "cannot be read as a safetensors file of directions"
    )
    file.unlink()
    cli("merge", tmp_path / "a/recipe.yaml", "-o", tmp_path / "x").refused(
        "recipe.yaml:", "freed.safetensors", "cannot be read"
    )
    assert not (tmp_path / "x").exists()


def test_the_gates_are_the_librarys(run, world, texts, tmp_path):
    """The texts that are drawn are rows of the file; general texts are the built-in ones."""
    more = ["--temperature", 1, "--by", "layer", "--reference", "general"]
    run("-o", tmp_path / "a", "--inputs", 100, "--save-weights", tmp_path / "w.json", *more)
    bank = Bank.load([world.bank / "spam", world.bank / "weather"])
    model, tokenizer = load_base(str(world.model), "float32", "cpu")
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    seen, general = (probe(model, bank, text_batches(tokenizer, t, 8, 64)) for t in (rows, GENERAL))
    want = Gate(temperature=1.0, by="layer", reference="general").weights(seen, general)
    got = Weights.load(tmp_path / "w.json")
    for m in bank.modules:
        assert got.of("spam", m) == pytest.approx(want.of("spam", m), rel=1e-4)


def test_what_is_printed(run, tmp_path):
    ran = run("-o", tmp_path / "a", "--conflict", "opposed", "--threshold", 0)
    assert ran.code == 0 and ran.err == ""
    for part in (
        "gates of spam, weather from 8 inputs", "self_attn.q_proj", "mlp.down_proj", "last third",
        "log odds of weather against spam",
        "rule tada(conflict=opposed, threshold=0.0), rank 3", "discarded", "share of the sum removed",
        "relative error of dW against the exact gated sum", "seconds: probe", f"wrote {tmp_path / 'a'}",
    ):  # fmt: skip
        assert part in ran.out, part


def test_conflicts_are_reported_by_layer(run, world, tmp_path):
    data = {
        name: json.loads(run("-o", tmp_path / name, "--json", "--conflict", name, *more).out)
        for name, more in (("opposed", ["--threshold", 0]), ("none", []))
    }
    found, nothing = data["opposed"]["conflicts"], data["none"]["conflicts"]
    layers = {str(layer_of(m)) for m in Adapter.load(world.bank / "spam")}
    assert set(found["layers"]) == layers and len(layers) == 2
    assert found["all"]["components"] == {"spam": 2 * 14, "weather": 3 * 14}
    for name in ("spam", "weather"):
        assert found["all"]["dropped"][name] == sum(layer["dropped"][name] for layer in found["layers"].values())
    assert 0 < found["all"]["removed"] < 1 and sum(found["all"]["dropped"].values()) > 0
    assert nothing is None  # nothing is counted where nothing is discarded
    assert data["opposed"]["error"]["stored"] > data["none"]["error"]["stored"]


def test_more_adapters_other_rules_and_ablations(run, tmp_path):
    three = json.loads(run("-o", tmp_path / "three", "--json", adapters=("spam", "weather", "cooking")).out)
    assert (
        three["adapters"] == ["spam", "weather", "cooking"]
        and three["rank"] == 4
        and set(three["depth"]) == {"weather", "cooking"}
    )
    ties = json.loads(run("-o", tmp_path / "ties", "--json", "--rule", "ties", "--gate", "uniform").out)
    assert ties["conflicts"] is None and ties["depth"] == {} and ties["rule"].startswith("ties(")
    assert all(row["weights"]["spam"]["all"] == 1 for row in ties["gates"])
    ramp = json.loads(
        run("-o", tmp_path / "ramp", "--json", "--gate", "ramp", "--scale", "1,0.5", "--temperature", 1).out
    )
    q = ramp["gates"][0]["weights"]
    assert q["spam"]["first third"] == pytest.approx(1.4) and q["weather"]["last third"] == pytest.approx(0.7)


def test_what_is_refused_is_refused_before_any_work(run, texts, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    run("-o", taken).refused("taken", "--overwrite")
    assert (taken / "notes.txt").read_text() == "mine"
    run("-o", tmp_path / "x", "--gate", "soft").refused("kind of the gate is 'soft'", "probe")
    run("-o", tmp_path / "x", "--scale", "one").refused("--scale 'one'")
    run("-o", tmp_path / "x", "--conflict", "none", "--threshold", 0.2).refused("--threshold", "--conflict shared")
    run("-o", tmp_path / "x", "--threshold", 0.2).refused("--threshold", "--conflict shared")
    run("-o", tmp_path / "x", "--general", texts).refused("--general", "--reference general")
    run("-o", tmp_path / "x", "--conflict", "all").refused("conflict 'all' of tada", "shared")
    run("-o", tmp_path / "x", "--rule", "ties", "--conflict", "none").refused("ties has no parameter 'conflict'")
    run("-o", tmp_path / "x", "--column", "body").refused("domain.jsonl, line 1: no column 'body'", "text, label")
    run("-o", tmp_path / "x", "--plot", "gates.pdf").refused("gates.pdf is not a PNG")
    run("-o", tmp_path / "x", adapters=("spam",)).refused("one adapter is nothing to gate")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    run("-o", tmp_path / "x", "--reference", "general", "--general", empty).refused("empty.jsonl has no text")
    assert not (tmp_path / "x").exists()


def test_another_base_is_refused(run, world, tmp_path):
    import sys

    sys.path.insert(0, str(world.root))
    import tiny

    other = tiny.save_model(tmp_path / "other", seed=5)
    run("-o", tmp_path / "x", "--model", other).refused("but the loaded model is", "fingerprints")
    assert run("-o", tmp_path / "x", "--model", other, "--assume-same-base").code == 0


def test_the_level_is_chosen_without_labels(run, world, texts, tmp_path):
    """--level auto: the weights written are the gates times the level that the library chooses on the same texts."""
    task = world.tasks / "spam.yaml"
    ran = run("-o", tmp_path / "a", "--level", "auto", "--task", task, "--json", "--save-weights", tmp_path / "w.json")
    assert ran.code == 0, ran
    found = json.loads(ran.out)["level"]
    plain = run("-o", tmp_path / "b", "--save-weights", tmp_path / "plain.json")
    assert plain.code == 0 and "chosen without labels" not in plain.out
    got, gates = Weights.load(tmp_path / "w.json"), Weights.load(tmp_path / "plain.json")
    bank = Bank.load([world.bank / "spam", world.bank / "weather"])
    assert [level for level, _ in found["tried"]] == sorted(level for level, _ in found["tried"])
    assert found["level"] == max(found["tried"], key=lambda pair: pair[1])[0] and got.explain["level"] == found["level"]
    for m in bank.modules:
        assert got.of("spam", m) == pytest.approx(found["level"] * gates.of("spam", m), rel=1e-6)
    assert Adapter.load(tmp_path / "a").provenance["merge"]["weights_source"] == "probed"
    said = run("-o", tmp_path / "c", "--level", "auto", "--task", task).out
    assert f"level {found['level']:g} of all weights, chosen without labels" in said


def test_answers_are_balanced_and_common_directions_taken_away(run, world, tmp_path, monkeypatch):
    """--balance and --common: what is on disk is what is said, of the same rank, and no recipe claims to repeat it."""
    task = world.tasks / "spam.yaml"
    with monkeypatch.context() as before:  # all the work
        before.setattr(composing, "compose", None)
        ran = run("-o", tmp_path / "x", "--balance", "--task", task)
    ran.refused("the answers begin with the same token", "use other labels")
    assert not (tmp_path / "x").exists()

    def second(model, tokenizer, labels):  # the tiny tokenizer begins every answer with a space
        return model.get_output_embeddings().weight[[encode_answer(tokenizer, label)[1] for label in labels]].detach()

    monkeypatch.setattr(balance, "text_directions", second)
    plain = run("-o", tmp_path / "plain", "--json", "--common", 0)
    ran = run("-o", tmp_path / "a", "--balance", "--task", task, "--json", "--common", 0)
    assert ran.code == 0, ran
    found = json.loads(ran.out)
    told = found["balance"]
    assert told["after"] < told["before"] and found["level"] is None and found["freed"] == {}
    one, two = Adapter.load(tmp_path / "plain"), Adapter.load(tmp_path / "a")
    assert two.name == "a" and two.max_rank == one.max_rank == json.loads(plain.out)["rank"]
    moved = [m for m in one if not torch.equal(one[m].dense(), two[m].dense())]
    assert moved == [told["module"]]
    assert two.provenance["tada"]["balanced"] == {k: told[k] for k in ("module", "before", "after")}
    assert two.provenance["merge"]["weights_source"] == "probed"
    assert f"Balanced afterwards at `{told['module']}`" in (tmp_path / "a/README.md").read_text()
    assert not (tmp_path / "a/recipe.yaml").exists() and any("no recipe.yaml" in note for note in found["notes"])
    free = run("-o", tmp_path / "b", "--common", 2)
    assert free.code == 0 and "freed of the directions that all inputs share" in free.out and "spam" in free.out
    three = Adapter.load(tmp_path / "b")
    card = (tmp_path / "b/README.md").read_text()
    assert "Freed before the merge of 2 directions" in card and "shared: weather." in card and "Balanced" not in card
    assert set(three.provenance["tada"]["freed"]["share"]) == {"weather"}
    assert any(not torch.equal(one[m].dense(), three[m].dense()) for m in one)
    assert "answers balanced at " in run("-o", tmp_path / "a", "--balance", "--task", task, "--overwrite").out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--level", "high"], "--level 'high' is not known"),
        (["--level", "auto"], "give its file with --task"),
        (["--task", "spam.yaml"], "--task is for --level auto and --balance"),
        (["--balance"], "--balance asks the texts in the task's words; give its file with --task"),
        (["--balance", "--task", "free.yaml"], "free.yaml: the task has no labels"),
        (["--balance", "--task", "spam.yaml", "--inputs", 1], "--balance compares the answers to at least two texts"),
        (["--common", 2, "--common-of", "task"], "--common-of 'task' is not known"),
        (["--common", 0, "--common-of", "all"], "--common-of all says whom --common frees, and --common is 0"),
        (["--level", "auto", "--task", "free.yaml"], "free.yaml: the task has no labels"),
        (["--level", "auto", "--task", "pairs.yaml"], "pairs.yaml: the task asks with 2 columns ('text', 'other')"),
        (["--level", "auto", "--task", "spam.yaml", "--inputs", 1], "domain.jsonl gave one (--inputs 1)"),
    ],
)
def test_a_level_that_cannot_be_chosen_is_said(run, world, tmp_path, monkeypatch, options, said):
    spam = yaml.safe_load((world.tasks / "spam.yaml").read_text())
    more = {"free": {"labels": None}, "pairs": {"columns": [*spam["columns"], {"name": "other"}]}, "spam": {}}
    for name, fields in more.items():
        made = {k: v for k, v in (spam | fields).items() if v is not None}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(made))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tada, "load_model", lambda *_: pytest.fail("it is said before the model is loaded"))
    run("-o", tmp_path / "a", *options).refused(said)
    assert not (tmp_path / "a").exists()


def test_texts_are_asked_as_far_as_they_are_read(run, world, tmp_path):
    """--max-length cuts the texts of both; what a cut text says is what was cut there."""
    start = [f"{n} rain and sun {n * n}" for n in range(1, 9)]
    levels = []
    for name, tails in (("a", ["x" * 40] * 8), ("b", ["quick brown fox " * 300] * 8)):
        rows = [{"text": f"{s} {tail}"} for s, tail in zip(start, tails, strict=True)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        ran = run("-o", tmp_path / name, "-c", tmp_path / f"{name}.jsonl", "--max-length", 8, "--json",
                  "--level", "auto", "--task", world.tasks / "spam.yaml")  # fmt: skip
        assert ran.code == 0, ran
        levels.append(json.loads(ran.out)["level"])
    assert levels[0] == levels[1]
    ran = run("-o", tmp_path / "c", "-c", tmp_path / "b.jsonl", "--max-length", 5000, "--level", "auto", "--task",
              world.tasks / "spam.yaml")  # fmt: skip
    ran.refused("--level auto", "--max-length", "the model takes 512")


def test_a_cut_text_is_its_start(world):
    tokenizer = load_base(str(world.model), "float32", "cpu")[1]
    for text in ("rain  and wind", "  caf\u00e9 \u2014 na\u00efve \U0001f600 rain , sun ."):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tada.shortened(tokenizer, text, len(ids)) == text
        for n in range(1, len(ids)):
            cut = tada.shortened(tokenizer, text, n)
            assert text.startswith(cut) and len(cut) < len(text), (n, cut)
