"""The level of a merge without labels: what the information is, and that the strongest of it is taken."""

from __future__ import annotations

import math
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import relative
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.live.base import load_base
from loralloy.live.scoring import score_options
from loralloy.merging import Tada, get_rule, merge
from loralloy.weighting.candidates import Candidates
from loralloy.weighting.levels import choose_level, information, scaled, text_answers
from loralloy.weights import Weights
from world import make_world


def mutual_information(p: np.ndarray) -> float:
    """KL(joint || product of its marginals), inputs being equally likely: from the definition, not from entropies."""
    joint = p / len(p)
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log(joint[there] / product[there])).sum())


@given(st.integers(2, 12), st.integers(2, 6), st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 30.0]))
@settings(deadline=None, max_examples=60)
def test_it_is_the_mutual_information(rows, k, seed, sharp):
    logp = (sharp * torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))).double().log_softmax(1)
    got = information(logp)
    assert got == pytest.approx(mutual_information(logp.exp().numpy()), abs=1e-12)
    assert -1e-12 <= got <= math.log(min(rows, k)) + 1e-12
    turned = logp[torch.randperm(rows)][:, torch.randperm(k)]
    assert information(turned) == pytest.approx(got, abs=1e-12)


def test_its_ends():
    sure = torch.eye(3).repeat(4, 1).log()  # -inf where p is 0
    assert information(sure) == pytest.approx(math.log(3))
    assert information(torch.tensor([[1.0, 0.0]] * 5).log()) == 0  # sure, and always the same
    assert information(torch.full((5, 2), math.log(0.5))) == pytest.approx(0, abs=1e-15)  # never sure
    assert math.isnan(information(torch.full((5, 2), math.nan)))
    for shape in ((1, 3), (3, 1), (6,)):
        with pytest.raises(LoralloyError, match="at least two answers to at least two inputs"):
            information(torch.zeros(shape))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def loaded(world):
    model, tokenizer = load_base(str(world.model), "float32", "cpu")
    return model, tokenizer, Bank.load([world.bank / "spam", world.bank / "weather"])


PROMPTS = ["free cash now", "rain and wind", "urgent prize", "sun", "claim the offer", "fog"]
OPTIONS = [["yes", "no way"]] * len(PROMPTS)


@pytest.mark.parametrize("rule", ["tada", "ties"])
def test_the_level_is_that_of_the_most_information(loaded, rule):
    """Each level against a model that carries the adapter which merge() makes of the scaled weights."""
    from loralloy.live.merged_rows import MergedRows

    model, tokenizer, bank = loaded
    weights = Weights({"spam": 1.0, "weather": {"*": 0.5, bank.modules[0]: 2.0}}, "probed", {"gate": 1})
    rank = get_rule(rule).default_rank
    held = Candidates(model, bank, rule, None, rank)
    levels = (3.0, 0.2, 1.0)
    ticks: list[int] = []
    try:
        found = choose_level(
            held, weights, text_answers(model, tokenizer, PROMPTS, OPTIONS), levels, lambda: ticks.append(1)
        )
    finally:
        held.remove()
    want = []
    for level in sorted(levels):
        made = merge(bank, scaled(weights, level), rule, rank=rank, dtype=torch.float32).adapter
        rows = MergedRows(model)
        try:
            with torch.no_grad(), rows.use([made], [0]):
                scores = score_options(model, tokenizer, PROMPTS, OPTIONS)
        finally:
            rows.remove()
        want.append((level, mutual_information(torch.stack(scores).double().softmax(1).numpy())))
    assert [t[0] for t in found.tried] == [0.2, 1.0, 3.0] and len(ticks) == 3
    assert [t[1] for t in found.tried] == pytest.approx([w[1] for w in want], rel=1e-3, abs=1e-9)
    assert len({round(w[1], 9) for w in want}) == 3
    assert found.level == max(want, key=lambda w: w[1])[0] and found.most == pytest.approx(math.log(2))
    assert found.weights == scaled(weights, found.level)
    assert found.weights.of("weather", bank.modules[0]) == pytest.approx(2 * found.level)
    assert found.weights.source == "probed" and found.weights.explain == {"gate": 1, "level": found.level}


def test_options_that_cannot_be_compared(loaded):
    model, tokenizer, _ = loaded
    for options in (OPTIONS[1:], [*OPTIONS[1:], ["yes"]]):
        with pytest.raises(LoralloyError, match="each prompt its options"):
            text_answers(model, tokenizer, PROMPTS, options)
    for prompts, options in (([], []), (PROMPTS[:1], OPTIONS[:1]), (PROMPTS, [["yes"]] * len(PROMPTS))):
        with pytest.raises(LoralloyError, match="at least two prompts and at least two options"):
            text_answers(model, tokenizer, prompts, options)


def test_a_prompt_that_is_too_long_is_said_before_anything_runs(loaded):
    model, tokenizer, _ = loaded
    with pytest.raises(LoralloyError, match="shorten the text"):
        text_answers(model, tokenizer, [*PROMPTS[1:], "rain " * 2000], OPTIONS)


def test_the_most_there_can_be_is_bounded_by_the_inputs_too(loaded):
    model, _, bank = loaded
    held = Candidates(model, bank)
    try:
        for shape, most in (((2, 5), 2), ((7, 3), 3)):
            answers = torch.eye(*shape).add(1e-9).log().log_softmax(1)
            found = choose_level(held, Weights.uniform(bank.names), lambda a=answers: a, (1.0,))
            assert found.most == pytest.approx(math.log(most))
            assert found.tried[0][1] <= found.most + 1e-6
    finally:
        held.remove()


class Bytes(nn.Linear):
    """A layer whose weight is stored in 8 bits, as a quantised base's are."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.step = float(plain.weight.detach().abs().max() / 127)
        self.weight = nn.Parameter((plain.weight.detach() / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step)


@pytest.mark.parametrize("rule", ["linear", "tada"])
def test_on_a_quantised_base(world, rule):
    """It is measured as on the base that the packed weights stand for."""
    found = []
    for kind in (Bytes, None):
        model, tokenizer = load_base(str(world.model), "float32", "cpu")
        bank = Bank.load([world.bank / "spam", world.bank / "weather"])
        for name in bank.modules:
            place, layer = model.get_submodule(name.rpartition(".")[0]), Bytes(model.get_submodule(name))
            if kind is not None:
                setattr(place, name.rpartition(".")[2], layer)
            else:
                getattr(place, name.rpartition(".")[2]).weight.data = layer.weight.float() * layer.step
        held = Candidates(model, bank, rule, None, get_rule(rule).default_rank)
        try:
            answers = text_answers(model, tokenizer, PROMPTS, OPTIONS)
            found.append(choose_level(held, Weights.uniform(bank.names), answers, (0.5, 2.0)).tried)
        finally:
            held.remove()
    assert [n for _, n in found[0]] == pytest.approx([n for _, n in found[1]], rel=1e-3, abs=1e-8)
    assert found[0][0][1] != pytest.approx(found[0][1][1], rel=1e-2)


def test_of_equals_the_smallest_and_what_is_no_number_is_left_out(loaded):
    model, _, bank = loaded
    held = Candidates(model, bank)
    answers = iter([torch.full((2, 2), math.nan), torch.eye(2).log(), torch.eye(2).log()])
    try:
        assert choose_level(held, Weights.uniform(bank.names), lambda: next(answers), (1.0, 2.0, 3.0)).level == 2.0
        with pytest.raises(LoralloyError, match="not numbers at any level"):
            choose_level(held, Weights.uniform(bank.names), lambda: torch.full((2, 2), math.nan), (1.0,))
        for bad in ((), (0.0,), (1.0, math.inf), (-1.0,)):
            with pytest.raises(LoralloyError, match="give positive numbers"):
                choose_level(held, Weights.uniform(bank.names), lambda: torch.eye(2).log(), bad)
    finally:
        held.remove()


def test_any_mapping_is_scaled():
    got = scaled(Weights({"a": MappingProxyType({"*": 0.5, "m": -2}), "b": 3}), 2.0)
    assert got.coefficients == {"a": {"*": 1.0, "m": -4.0}, "b": 6.0}


@given(st.floats(0.1, 10))
@settings(deadline=None, max_examples=20)
def test_scaled_weights_scale_the_merge(world, factor):
    """Law: every rule here is homogeneous, so the level is the length of dW."""
    bank = Bank.load([world.bank / "spam", world.bank / "weather"])
    weights = Weights({"spam": 0.7, "weather": {"*": 1.0}})
    one = merge(bank, weights, Tada, dtype=torch.float32).adapter
    many = merge(bank, scaled(weights, factor), Tada, dtype=torch.float32).adapter
    m = bank.modules[0]
    assert relative(many[m].dense(), factor * one[m].dense()) < 1e-5
