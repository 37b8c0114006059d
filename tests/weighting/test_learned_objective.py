"""The text objective: its scores are evaluation's, its losses are what they say, and gradients go to coefficients alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import tiny

from helpers import PROJECTIONS, peft_folder
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.live.base import load_base
from loralloy.live.learnable import Learnable
from loralloy.live.scoring import score_options
from loralloy.tasks.task import Example
from loralloy.weighting.learned import TextObjective


def example(n, prompt, answer, options, task="t"):
    return Example(f"{task}/train/{n}", task, prompt, prompt, prompt, answer, options)


CLOSED = [
    example(0, "short", "bb", ("a", "bb", "ccc dd")),
    example(1, "Is the sky blue?\nAnswer:", "no", ("yes", "no"), "sky"),
    example(2, "a somewhat longer prompt than the others, on purpose:", "a", ("a", "b")),
    example(3, "x y z", "one", ("one", "and a very long option", "x", "yy")),
    example(4, "again", "yes", ("yes", "no"), "sky"),
]
FREE = example(5, "write:", "some words", ())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return load_base(str(tiny.save_model(tmp_path_factory.mktemp("objective") / "llama")), "float32", "cpu")


@pytest.fixture(scope="module")
def live(pair, tmp_path_factory):
    root = tmp_path_factory.mktemp("bank")
    for seed, name in enumerate("ab"):
        peft_folder(pair[0], root / name, seed, target_modules=PROJECTIONS, r=2)
    live = Learnable(pair[0], Bank.load(root), "ties")
    yield live
    live.remove()


def scored(pair, examples):
    return score_options(*pair, [e.prompt for e in examples], [e.options or (e.answer,) for e in examples])


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 0], [2], [1, 4]])
def test_scores_are_those_of_evaluation(pair, live, order):
    objective = TextObjective(*pair, CLOSED)
    for table in (None, torch.tensor([0.7, 1.2])):
        with live.at(table):
            got, want = objective.scores(order), scored(pair, [CLOSED[i] for i in order])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.detach(), b, atol=2e-4, rtol=1e-5)


def test_losses(pair):
    """Cross-entropy over the options; nothing but the answer's tokens where there are none; one alone is as among others."""
    examples = [*CLOSED, FREE]
    objective = TextObjective(*pair, examples)
    scores = scored(pair, examples)
    want = [-float(s.log_softmax(0)[e.options.index(e.answer)]) for s, e in zip(scores, CLOSED, strict=False)]
    want.append(-float(scores[5][0]) / len(" some words"))  # one token a byte
    losses = objective.losses(range(6)).detach()
    assert losses.tolist() == pytest.approx(want, abs=2e-4)
    for i in range(6):
        assert float(objective.losses([i]).detach()[0]) == pytest.approx(want[i], abs=2e-4)


def test_normalised(pair):
    scores = scored(pair, CLOSED)
    want = [
        -float((s / torch.tensor([len(" " + o) for o in e.options])).log_softmax(0)[e.options.index(e.answer)])
        for s, e in zip(scores, CLOSED, strict=True)
    ]
    got = TextObjective(*pair, CLOSED, normalise=True).losses(range(5)).detach()
    assert got.tolist() == pytest.approx(want, abs=1e-4)


def test_entropy_needs_no_label(pair):
    unlabeled = [example(i, e.prompt, "?", e.options) for i, e in enumerate(CLOSED)]
    objective = TextObjective(*pair, unlabeled, kind="entropy")
    want = [float(torch.distributions.Categorical(logits=s).entropy()) for s in scored(pair, CLOSED)]
    assert objective.losses(range(5)).detach().tolist() == pytest.approx(want, abs=1e-4)
    assert objective.strata == ["t"] * 5


def test_strata_weigh_alike(pair):
    objective = TextObjective(*pair, [*CLOSED, FREE])
    assert objective.strata == ["t", "sky/no", "t", "t", "sky/yes", "t"] and objective.size == 6
    rows = [1, 1, 1, 4]
    each = objective.losses(rows).detach()
    assert float(objective.loss(rows).detach()) == pytest.approx(float((each[:3].mean() + each[3]) / 2), abs=1e-5)


def test_answers_are_classes_where_a_task_s_rows_choose_among_the_same_options(pair):
    own = [example(n, "q", f"a{n}", (f"a{n}", f"b{n}"), "quiz") for n in range(3)] + [
        example(3, "q", "x", ("y", "x"), "quiz")
    ]
    turned = [example(n, "q", "yes", options, "sky") for n, options in enumerate((("yes", "no"), ("no", "yes")))]
    two = [example(n, "q", "b", ("a", "b"), "") for n in range(2)] + [
        example(n, "q", "d", ("c", "d"), "") for n in range(2)
    ]
    objective = TextObjective(*pair, [*own, *turned, *two, FREE])
    assert objective.strata == ["quiz"] * 4 + ["sky/yes"] * 2 + ["/b"] * 2 + ["/d"] * 2 + ["t"]
    assert objective.choices == [2] * 10 + [0]


def test_gradients_go_to_the_coefficients_alone(pair, live):
    """Padding or not, the same; the model's own flags are put back and its parameters have no gradient."""
    model = pair[0]
    objective = TextObjective(*pair, CLOSED)
    model.train()
    model.lm_head.weight.requires_grad_(True)
    asked = [p.requires_grad for p in model.parameters()]
    table = torch.tensor([0.7, 1.2], requires_grad=True)
    with live.at(table):
        losses = objective.losses(range(5))
        together = torch.autograd.grad(losses.sum(), table)[0]
    apart = torch.zeros(2)
    for i in range(5):
        with live.at(table):
            apart += torch.autograd.grad(objective.losses([i])[0], table)[0]
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    assert float(together.abs().min()) > 0
    assert model.training and [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None for p in model.parameters())
    model.eval()


def test_a_step_against_the_gradient_lowers_the_loss(pair, live):
    objective = TextObjective(*pair, CLOSED)
    table = torch.full((len(live.modules), 2), 0.7, requires_grad=True)
    with live.at(table):
        before = objective.loss(range(5))
        before.backward()
    with torch.no_grad(), live.at(table - 0.05 * table.grad / table.grad.norm()):
        after = objective.loss(range(5))
    slope = 0.05 * float(table.grad.norm())
    assert float(before.detach() - after) == pytest.approx(slope, rel=0.2)


@pytest.mark.parametrize(
    ("examples", "more", "said"),
    [
        ([], {}, "there are no examples"),
        ([example(0, "p", "c", ("a", "b"))], {}, r"the answer 'c' is not one of its options \['a', 'b'\]"),
        ([FREE], {"kind": "entropy"}, "'t/train/5' has no options, so it has no entropy"),
        ([FREE], {"kind": "loss"}, "kind 'loss' is not known; choose answer, entropy"),
        ([example(0, "p" * 600, "a", ("a", "b"))], {}, "prompt and answer have 602 tokens, the model takes 512"),
        ([example(0, "p", " ", ())], {}, "has no text to score"),
    ],
)
def test_refusals(pair, examples, more, said):
    with pytest.raises(LoralloyError, match=said):
        TextObjective(*pair, examples, **more)
