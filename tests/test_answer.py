"""One query's way: the prompt it becomes, the composition it meets, and what is left of both afterwards."""

from __future__ import annotations

import pytest
import torch

from helpers import close, logits
from loralloy.answer import Answerer, scaffold
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.live import LiveModel
from loralloy.live.base import load_base
from loralloy.merging import merge
from loralloy.retrieval import HashEmbedder, Index
from loralloy.retrieval.manifest import IndexedTask
from loralloy.tasks.task import Task
from loralloy.weighting import Router
from loralloy.weights import Weights
from world import make_world

IDS = torch.arange(40, 64).reshape(2, 12)
MIX = Weights({"spam": 0.7, "weather": -0.4, "cooking": 1.1})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def answerer(world):
    model, tokenizer = load_base(str(world.model), "float32", "cpu")
    with Index.open(world.index, HashEmbedder(128)) as index:
        yield Answerer(model, tokenizer, Bank.load(world.bank), Router(index))


# -- prompts -----------------------------------------------------------------------------------------------------------


def indexed(columns=1, **changes):
    fields = {
        "version": 1, "name": "t", "hint": "Is it good?", "cue": "Answer:", "answer": "label", "separator": "\n",
        "columns": [{"name": f"c{n}", "prefix": f"P{n}: "} for n in range(columns)], "source": {"path": "x.jsonl"},
    }  # fmt: skip
    return IndexedTask.of(Task.from_dict(fields | changes), 1, 1, 0, "")


@pytest.mark.parametrize(
    "text",
    [
        "fine words",
        "  fine words\n",
        "Is it good?\nfine words",
        "is IT good? fine words",
        "Is it good?\nP0: fine words",
    ],
)
def test_scaffold_says_everything_once(text):
    assert scaffold(indexed(), text) == "Is it good?\nP0: fine words\nAnswer:"


def test_scaffold_of_several_columns():
    want = "Is it good?\nP0: one\nP1: two\nAnswer:"
    assert scaffold(indexed(2), "P0: one\nP1: two") == want
    assert scaffold(indexed(2), "  Is it good?\nP0: one\nP1: two ") == want
    assert scaffold(indexed(2, cue="", hint=""), "P0: one\nP1: two") == "P0: one\nP1: two"
    assert scaffold(indexed(2, separator=" | "), "one | two") == "Is it good? | one | two | Answer:"


def test_scaffold_is_the_prompt_of_training(world):
    """A held-out row typed with or without its hint becomes the very prompt that its adapter was trained on."""
    for path in sorted(world.tasks.glob("*.yaml")):
        task = Task.load(path)
        entry = IndexedTask.of(task, 1, 1, 0, "")
        for example in task.examples("test"):
            assert scaffold(entry, example.query) == scaffold(entry, example.raw) == example.prompt


def test_the_prompt_of_the_heaviest_task(answerer):
    weights = Weights({"spam": 0.4, "weather": 0.6})
    assert answerer.ask("cloud", ["a", "b"], weights).template == "weather"
    assert answerer.ask("cloud", ["a", "b"], weights, template="spam").prompt.startswith("Which kind of spam")
    assert answerer.ask("cloud", ["a", "b"], weights, template="none").prompt == "cloud"


# -- compositions ------------------------------------------------------------------------------------------------------

RULES = [("linear", None), ("linear", 2), ("cat", None), ("cat", 3), ("svd", None), ("svd", 2), ("svd", "full")]


@pytest.mark.parametrize(("rule", "rank"), RULES)
def test_composed_is_the_merged_adapter(answerer, world, rule, rank):
    """Live, in a fresh model with the adapter merged by the same rule: the same logits; and the base before and after."""
    plain = logits(answerer.model, IDS)
    merged = merge(answerer.bank, MIX, rule, rank=rank)
    fresh, _ = load_base(str(world.model), "float32", "cpu")
    with LiveModel(fresh, Bank([merged.adapter])).compose(Weights({"merged": 1.0})) as model:
        want = logits(model, IDS)
    with answerer.composed(MIX, rule, rank=rank) as error:
        got = logits(answerer.model, IDS)
        exact = rule in ("linear", "cat") and rank is None
        assert error == (0.0 if exact else pytest.approx(merged.report.error))
    assert close(got, want, 1e-4) and not close(got, plain, 1e-2)
    assert torch.equal(logits(answerer.model, IDS), plain)


def test_dense_oracle(answerer, world):
    """W0 + sum_i w_i s_i B_i A_i written into a fresh model's weights, in float64: no code of live/ or merging/."""
    fresh, _ = load_base(str(world.model), "float32", "cpu")
    fresh = fresh.double()
    parts = dict(fresh.named_modules())
    with torch.no_grad():
        for name, weight in MIX.items():
            for module in answerer.bank[name]:
                parts[module].weight += weight * answerer.bank[name][module].dense(torch.float64)
    with answerer.composed(MIX):
        got = logits(answerer.model, IDS)
    assert close(got, logits(fresh, IDS).float(), 1e-4)


@pytest.mark.parametrize(("rule", "rank"), [("linear", None), ("svd", 2)])
def test_the_base_is_back_after_an_error(answerer, rule, rank):
    plain = logits(answerer.model, IDS)
    hooks = sum(len(m._forward_hooks) for m in answerer.model.modules())
    with pytest.raises(RuntimeError, match="mine"), answerer.composed(MIX, rule, rank=rank):
        raise RuntimeError("mine")
    with pytest.raises(LoralloyError, match="'music'"), answerer.composed(Weights({"music": 1.0}), rule, rank=rank):
        pass
    assert torch.equal(logits(answerer.model, IDS), plain)
    assert sum(len(m._forward_hooks) for m in answerer.model.modules()) == hooks


def test_a_composition_inside_another_takes_its_place(answerer):
    with answerer.composed(Weights({"spam": 1.0})):
        spam = logits(answerer.model, IDS)
        with answerer.composed(MIX, "svd", rank="full"):
            inner = logits(answerer.model, IDS)
        assert torch.equal(logits(answerer.model, IDS), spam)
    with answerer.composed(MIX):
        assert close(inner, logits(answerer.model, IDS), 1e-2)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_answer_is_the_likeliest_option(answerer):
    answer = answerer.ask("prize winner claim", ["a", "b", "a long one"])
    assert answer.text == max(answer.scores, key=lambda o: answer.scores[o]) and len(answer.scores) == 3
    assert answer.to_dict()["version"] == 1 and answer.weights.source == "retrieved"
    assert answerer.ask("prize winner claim", ["a", "b", "a long one"]).scores == answer.scores


def test_refusals(answerer):
    alone = Answerer(answerer.model, answerer.tokenizer, answerer.bank)
    try:
        with pytest.raises(LoralloyError, match=r"no index to route with; pass --index, or --weights"):
            alone.ask("text")
        with pytest.raises(LoralloyError, match=r"--template 'spam' is looked up in an index"):
            alone.ask("text", weights=MIX, template="spam")
        with pytest.raises(LoralloyError, match="empty"):
            answerer.ask(" \n")
        with pytest.raises(LoralloyError, match=r"--template 'music' .* cooking, spam, weather"):
            answerer.ask("text", template="music")
        assert alone.ask("text", ["a", "b"], MIX).prompt == "text"
    finally:
        alone.live.remove()
