"""Routed compositions of many adapters: what an answer names asks for the same again, everywhere."""

from __future__ import annotations

import asyncio

import pytest
from serving_scenes import Api

from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.serving.grammar import MAX_TERMS, parse
from loralloy.serving.service import build
from loralloy.weights import Weights

PROMPT = "prize winner claim free cash"


class Many:
    """Weighs every text over all tasks; what the API reads of an index is another's."""

    def __init__(self, names, index):
        total = sum(range(1, len(names) + 1))
        self.index, self.weights = index, {name: (i + 1) / total for i, name in enumerate(names)}

    def weigh_batch(self, texts):
        return [Weights(self.weights)] * len(texts)


@pytest.fixture
def many(tiny, weigher):
    """A server whose router takes all of a bank of `count` adapters."""
    made = []

    def start(count):
        spam, weather = tiny.bank["spam"], tiny.bank["weather"]
        names = [f"a_task_with_a_long_name_{i:04}" for i in range(count)]
        parents = [(spam, weather)[i % 2] for i in range(count)]
        bank = Bank([Adapter(n, dict(p), p.config, p.base) for n, p in zip(names, parents, strict=True)])
        service = build(tiny.model, tiny.tokenizer, bank, Many(names, weigher.index))
        made.append(Api(service))
        return made[-1]

    yield start
    for api in made:
        api.close()
        api.service.engine.scheduler.live.close()


def test_what_an_answer_names_asks_for_the_same_again(many):
    api = many(70)
    first = api.complete("auto", max_tokens=3, logprobs=2).json()
    said = first["loralloy"]
    assert len(said["composition"]) > 2000 and len(said["weights"]) == 70
    again = api.complete(said["composition"], max_tokens=3, logprobs=2).json()
    assert again["loralloy"]["composition"] == said["composition"] and again["loralloy"]["weights"] == said["weights"]
    assert again["choices"] == first["choices"]
    # and for all that the page does with it
    layers = api.post("/v1/layers", model=said["composition"])
    assert layers.status_code == 200 and len(layers.json()["adapters"]) == 70
    assert layers.json()["composition"] == said["composition"]
    read = api.post("/v1/compositions", model=said["composition"])
    assert read.status_code == 200 and read.json()["weights"] == said["weights"]


def test_a_merged_one_is_a_hit(many):
    api = many(66)
    said = api.complete("auto @ svd(rank=4)", max_tokens=1).json()["loralloy"]
    again = api.complete(said["composition"], max_tokens=1).json()["loralloy"]
    assert (said["cache"], again["cache"]) == ("merged", "hit") and again["key"] == said["key"]


def test_more_than_the_grammar_takes_is_cut(many):
    api = many(MAX_TERMS + 20)
    compositions = api.service.compositions
    (weights,) = asyncio.run(api.service.routing.weigh([PROMPT]))
    filled = compositions.fill(compositions.read("auto"), weights)
    assert len(filled.terms) < MAX_TERMS and compositions.read(str(filled)) == filled == parse(str(filled))
    assert sum(w for _, w in filled.terms) == pytest.approx(1, rel=1e-6)
