"""What a row that no weights answer right may do to a few rows: the search for a start, and the likelihood of chance answers."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import Nest, adapter, factors
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.live.learnable import Learnable
from loralloy.weighting.learned import LearnConfig, learn
from loralloy.weights import Weights

TRUTH = {"a": 0.9, "b": 0.5, "c": 0.7}


class Answers:
    """Rows whose -log p is 0 under some composition of the bank; `wrong` of them ask for the opposite of it. One a stratum."""

    def __init__(self, bank: Bank, rows: int = 8, wrong: int = 0, choices: int = 4) -> None:
        self.model, self.size = Nest(), rows
        self.strata, self.choices = [f"d{i}" for i in range(rows)], [choices] * rows
        self.x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(3))
        live = Learnable(self.model, bank)
        with torch.no_grad():
            plain = self.model(self.x)
            with live.at(Weights(TRUTH)):
                self.y = self.model(self.x)
        live.remove()
        self.y[:wrong] = plain[:wrong] - 4 * (self.y[:wrong] - plain[:wrong])

    def losses(self, rows, step=0):
        return (self.model(self.x[list(rows)]) - self.y[list(rows)]).square().sum(1)

    def loss(self, rows, step=0):
        return self.losses(rows, step).mean()


@pytest.fixture(scope="module")
def bank():
    modules = ("lin", "block.lin")
    return Bank(
        adapter({m: factors(6, 6, 2, 10 * i + k, 0.5) for k, m in enumerate(modules)}, n) for i, n in enumerate("abc")
    )


def run(objective, bank, **config):
    return learn(objective.model, bank, objective, granularity="adapter", config=LearnConfig(**config), progress=False)


def test_few_rows_are_searched_close_to_an_adapter_s_length(bank):
    """Whoever names a search has it, and from four rows of each stratum on it is the wide one."""
    objective = Answers(bank)
    live = Learnable(Nest(), bank)
    around = live.matching_scale()
    live.remove()
    near, wide = [0.7, 0.84, 1.0, 1.2, 1.4], [0.4, 0.55, 0.75, 1.0, 1.35, 1.8]
    for strata, named, shares in ((8, "auto", near), (2, "auto", wide), (8, "wide", wide), (2, "near", near)):
        objective.strata = [f"d{i % strata}" for i in range(8)]
        found = run(objective, bank, steps=0, scales=named)
        assert found.settings["scales"] == pytest.approx([around * share for share in shares])
    with pytest.raises(LoralloyError, match="scales is 'far'; give 'auto', 'near', 'wide' or at least one scale"):
        LearnConfig(scales="far")


@pytest.mark.parametrize("at_once", [32, 3])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.7])
def test_the_loss_is_that_of_answers_drawn_by_chance_with_that_probability(bank, noise, at_once):
    """float64 by hand; rows without choices are as they are, and so are all without noise."""
    objective = Answers(bank, wrong=1)
    objective.choices = [4, 2, 0, 8, 4, 0, 2, 3]
    done = run(objective, bank, steps=0, start=0.8, label_noise=noise, rows_at_once=at_once)
    live = Learnable(objective.model, bank)
    with live.at(Weights(dict.fromkeys("abc", 0.8))), torch.no_grad():
        plain = objective.losses(range(8)).double()
    live.remove()
    by_hand = [
        -math.log((1 - noise) * math.exp(-v) + noise / n) if n and noise else float(v)
        for v, n in zip(plain, objective.choices, strict=True)
    ]
    assert done.history[0]["loss"] == pytest.approx(sum(by_hand) / 8, rel=1e-5)
    assert done.settings["label_noise"] == noise


def test_a_row_that_no_weights_answer_right_is_not_all_that_is_learned_from(bank):
    def off(wrong, **config):
        alpha = dict(run(Answers(bank, wrong=wrong), bank, **config).weights.items())
        return max(abs(alpha[n] - TRUTH[n]) for n in TRUTH)

    plain = {wrong: off(wrong, label_noise=0.0) for wrong in (0, 1)}
    assert off(0) == pytest.approx(plain[0], abs=0.05), "where all can be answered it changes little"
    assert plain[1] > 0.3 and off(1) < 0.5 * plain[1]


def test_with_few_rows_one_answer_of_ten_is_taken_to_be_by_chance(bank):
    """Where a stratum has fewer than four and examples choose; entropy and free text do without, and so do more rows."""
    objective = Answers(bank, wrong=1)
    few, many, free = (8, [4] * 8, 0.1), (2, [4] * 8, 0.0), (8, [0] * 8, 0.0)
    for strata, choices, noise in (few, many, free, (8, [], 0.0), (3, [0] * 7 + [2], 0.1)):
        objective.strata, objective.choices = [f"d{i % strata}" for i in range(8)], choices
        assert run(objective, bank, steps=0, start=0.8).settings["label_noise"] == noise
        assert run(objective, bank, steps=0, start=0.8, label_noise=0.0).settings["label_noise"] == 0
    objective.strata, objective.choices = ["d"] * 6 + ["free"] * 2, [4] * 6 + [0] * 2
    assert run(objective, bank, steps=0, start=0.8).settings["label_noise"] == 0, (
        "it is the ones with choices that count"
    )
    objective.strata, objective.choices = [f"d{i}" for i in range(8)], [4] * 8
    ways = ({}, {"label_noise": 0.1}, {"label_noise": 0.0})
    auto, given, plain = (run(objective, bank, **more).history[-1]["loss"] for more in ways)
    assert auto == given != plain


def test_noise_without_choices_is_refused(bank):
    objective = Answers(bank)
    for choices in ([0] * 8, []):
        objective.choices = choices
        with pytest.raises(LoralloyError, match=r"label_noise is 0\.1, and no example chooses among options"):
            run(objective, bank, label_noise=0.1)
    objective.choices = [4] * 7
    with pytest.raises(LoralloyError, match="has 8 examples and 7 choices; give one each, or none"):
        run(objective, bank)
    for value in (1.0, -0.1, True, "some"):
        with pytest.raises(LoralloyError, match=r"label_noise is .*; give 'auto' or a number from 0, below 1"):
            LearnConfig(label_noise=value)
