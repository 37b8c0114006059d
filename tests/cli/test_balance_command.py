"""`loralloy balance`: an adapter evened out on a tiny model, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from loralloy.adapter import Adapter
from loralloy.live.base import load_base
from loralloy.live.merged_rows import MergedRows
from loralloy.live.scoring import encode_answer
from loralloy.tasks.task import Task
from loralloy.weighting import balance
from loralloy.weighting.balance import shift
from loralloy.weighting.levels import text_answers


@pytest.fixture
def leaning(world, tmp_path):
    """The adapter `spam`, eight times as long: its answers lean."""
    adapter = Adapter.load(world.bank / "spam")
    parts = {m: dataclasses.replace(f, scaling=8 * f.scaling) for m, f in adapter.items()}
    Adapter("leaning", parts, adapter.config, adapter.base).save(tmp_path / "leaning")
    return tmp_path / "leaning"


@pytest.fixture
def run(cli, world, monkeypatch):
    def second(model, tokenizer, labels):  # the tiny tokenizer begins every answer with a space
        return model.get_output_embeddings().weight[[encode_answer(tokenizer, label)[1] for label in labels]].detach()

    monkeypatch.setattr(balance, "text_directions", second)

    def go(adapter, *options):
        task = ("--task", world.tasks / "spam.yaml")
        return cli("balance", adapter, *world.flags("model"), *task, "--model-dtype", "float32", *options)

    return go


def largest(world, adapter, prompts, labels):
    model, tokenizer = load_base(str(world.model), "float32", "cpu")
    rows = MergedRows(model)
    with torch.no_grad(), rows.use([adapter], [0]):
        logp = text_answers(model, tokenizer, prompts, [labels] * len(prompts))()
    return float(shift(logp).abs().max()), (logp.argmax(1).bincount(minlength=len(labels)) / len(logp)).tolist()


def test_the_folder_it_leaves_answers_evenly(run, world, leaning, tmp_path):
    ran = run(leaning, "-o", tmp_path / "even", "--inputs", 1000, "--json")
    assert ran.code == 0, ran
    told, task = json.loads(ran.out), Task.load(world.tasks / "spam.yaml")
    before, after = Adapter.load(leaning), Adapter.load(tmp_path / "even")
    prompts = [e.prompt for e in task.examples("train")]
    assert told["inputs"] == len(prompts) and told["rank"] == before.max_rank == after.max_rank
    for name, adapter in (("before", before), ("after", after)):
        left, answers = largest(world, adapter, prompts, list(task.labels))
        assert told["shift"][name] == pytest.approx(left, abs=5e-3)
        assert [told["answers"][label][name] for label in task.labels] == pytest.approx(answers, abs=0.02)
    assert told["shift"]["after"] < 0.2 * told["shift"]["before"]
    changed = [m for m in before if not torch.equal(before[m].dense(torch.float64), after[m].dense(torch.float64))]
    assert changed == [told["module"]]
    assert after.provenance["balanced"]["module"] == told["module"]
    assert f"Balanced afterwards at `{told['module']}`" in (tmp_path / "even/README.md").read_text()


def test_texts_of_a_file_and_what_is_printed(run, leaning, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"win a prize {n} now"}) + "\n" for n in range(20)))
    ran = run(leaning, "-o", tmp_path / "even", "-c", texts, "--inputs", 12)
    assert ran.code == 0, ran
    said = " ".join(ran.out.split())
    assert "likeliest answers to 12 texts" in said and "largest shift" in said and "wrote" in said


@pytest.mark.parametrize(
    "options, says",
    [
        (("--inputs", 1), "--inputs"),
        (("--module", "model.embed_tokens"), "model.embed_tokens"),
        (("--task", "free.yaml"), "has no labels"),
        (("-c", "one.jsonl"), "one.jsonl gave 1"),
    ],
)
def test_what_is_refused(run, world, leaning, tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "only this"}) + "\n")
    task = json.loads((world.tasks / "spam.yaml").read_text())
    task.pop("labels")
    (tmp_path / "free.yaml").write_text(json.dumps(task | {"source": {"path": str(world.tasks / "spam.jsonl")}}))
    ran = run(leaning, "-o", tmp_path / "even", *options)
    assert ran.code != 0 and says in " ".join((ran.err + ran.out).split()), ran
    assert not (tmp_path / "even").exists()


def test_an_output_that_is_there_is_kept(run, leaning, tmp_path):
    (tmp_path / "even").mkdir()
    run(leaning, "-o", tmp_path / "even").refused("even", "--overwrite")
