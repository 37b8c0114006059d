"""learn(): coefficients move towards what helps, stay where nothing does, and the same run gives the same weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from helpers import Nest, adapter, factors
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.live.learnable import Learnable
from loralloy.merging import merge
from loralloy.weighting.learned import LearnConfig, learn
from loralloy.weights import Weights


class Regression:
    """A target that some known composition of the bank produces; rows in four strata."""

    def __init__(self, truth: dict[str, float], bank: Bank, rule="linear", rows: int = 16, noise: float = 0.0) -> None:
        self.model, self.size = Nest(), rows
        self.strata = [f"d{i % 4}" for i in range(rows)]
        g = torch.Generator().manual_seed(5)
        self.x = torch.randn(rows, 6, generator=g)
        live = Learnable(self.model, bank, rule)
        with live.at(Weights(truth)), torch.no_grad():
            self.y = self.model(self.x) + noise * torch.randn(rows, 6, generator=g)
        live.remove()
        self.seen: list[list[int]] = []

    def losses(self, rows, step=0):
        self.seen.append(list(rows))
        return (self.model(self.x[rows]) - self.y[rows]).square().mean(1)

    def loss(self, rows, step=0):
        each = self.losses(rows, step)
        strata = [self.strata[i] for i in rows]
        groups = [each[[k for k, s in enumerate(strata) if s == one]].mean() for one in sorted(set(strata))]
        return torch.stack(groups).mean()


@pytest.fixture(scope="module")
def bank():
    modules = ("lin", "block.lin")
    return Bank(
        adapter({m: factors(6, 6, 2, 10 * i + k, 0.5) for k, m in enumerate(modules)}, n) for i, n in enumerate("abc")
    )


def around(bank: Bank) -> float:
    """The scale that the line search lies around."""
    live = Learnable(Nest(), bank)
    try:
        return live.matching_scale()
    finally:
        live.remove()


FREE = LearnConfig(steps=150, regularisation=0.0, hold_out=0.0)


@pytest.mark.parametrize("rule", ["linear", "ties", "dare_ties", "magnitude_prune"])
def test_it_finds_the_composition_that_made_the_data(rule, bank):
    truth = {"a": 1.4, "b": 0.1, "c": 0.7}
    objective = Regression(truth, bank, rule)
    done = learn(objective.model, bank, objective, rule=rule, config=FREE, progress=False)
    assert dict(done.weights.items()) == pytest.approx(truth, abs=0.05)
    assert done.history[-1]["loss"] < 0.01 * done.history[0]["loss"]


def test_the_defaults_move_the_coefficients_and_help(bank):
    """One sample a stratum, nothing held out: c moves, and the loss falls below that of the best uniform scale."""
    objective = Regression({"a": 1.4, "b": 0.1, "c": 0.7}, bank, rows=4)
    done = learn(objective.model, bank, objective, progress=False)
    alpha = dict(done.weights.items())
    assert done.settings["hold_out"] == 0 and done.settings["start"] == "scale"
    assert alpha["a"] > done.start_scale + 0.1 and alpha["b"] < done.start_scale - 0.1
    assert done.history[-1]["loss"] < 0.7 * done.history[0]["loss"]
    assert done.history[0]["loss"] == pytest.approx(min(loss for _, loss in done.searched))
    assert len(done.history) == LearnConfig().steps + 1 and done.best_step == LearnConfig().steps


@pytest.mark.parametrize(
    ("rows", "strata", "found"), [(40, 10, "layer"), (39, 3, "adapter"), (40, 11, "adapter"), (4, 1, "adapter")]
)
def test_granularity_follows_the_number_of_samples(bank, rows, strata, found):
    """By layer from 40 samples on with 4 a stratum; whoever names one has it."""
    objective = Regression({"a": 1.4, "b": 0.1, "c": 0.7}, bank, rows=rows)
    objective.strata = [f"{i % strata}" for i in range(rows)]
    quick = {"config": LearnConfig(steps=2), "progress": False}
    done = learn(objective.model, bank, objective, **quick)
    assert done.settings["granularity"] == done.weights.explain["granularity"] == found
    assert done.weights.per_module == (found == "layer")
    named = learn(objective.model, bank, objective, granularity="adapter", **quick)
    assert named.settings["granularity"] == "adapter" and not named.weights.per_module


def test_weights_keep_the_loss_in_the_model(bank):
    """What is returned is what was measured: in the model by Learnable, and on disk by merge."""
    objective = Regression({"a": 1.4, "b": 0.1, "c": 0.7}, bank, "ties")
    done = learn(objective.model, bank, objective, rule="ties", granularity="module", config=FREE, progress=False)
    assert done.weights.per_module
    live = Learnable(objective.model, bank, "ties")
    with live.at(done.weights), torch.no_grad():
        assert float(objective.loss(range(16))) == pytest.approx(done.history[-1]["loss"], rel=1e-3, abs=1e-7)
    live.remove()
    merged = merge(bank, done.weights, "ties", rank="full").adapter
    with torch.no_grad():
        for module in merged:
            objective.model.get_submodule(module).weight += merged[module].dense(torch.float32)
        assert float(objective.loss(range(16))) == pytest.approx(done.history[-1]["loss"], rel=1e-3, abs=1e-7)


def test_nothing_to_learn_stays_at_the_start(bank):
    level = around(bank)
    truth = dict.fromkeys("abc", level)
    objective = Regression(truth, bank, rows=4)
    done = learn(objective.model, bank, objective, progress=False)
    assert done.start_scale == pytest.approx(level)
    assert dict(done.weights.items()) == pytest.approx(truth, abs=0.01)


def test_the_pull_towards_the_start(bank):
    """The stronger, the nearer; by default it weakens as samples come in."""
    objective = Regression({"a": 2.5, "b": 0.1, "c": 0.1}, bank)
    spread = []
    for pull in (0.0, 0.1, 10.0):
        config = LearnConfig(regularisation=pull, hold_out=0.0, start=0.8)
        alpha = dict(learn(objective.model, bank, objective, config=config, progress=False).weights.items())
        spread.append(alpha["a"] - alpha["b"])
    assert spread[0] > spread[1] > spread[2] >= 0
    pulls = {}
    for rows in (4, 20, 400):
        one = Regression({"a": 1.0}, bank, rows=rows)
        config = LearnConfig(steps=0, start=1.0)
        pulls[rows] = learn(one.model, bank, one, config=config, progress=False).settings["regularisation"]
    assert pulls == pytest.approx({4: 0.1, 20: 0.1 / 4, 400: 0.1 / 16})  # of 5 a stratum 1 is held out


def test_starts(bank):
    """The poster's, a given scale, and the best of a line search."""
    objective = Regression({"a": 0.3, "b": 0.3, "c": 0.3}, bank)
    run = lambda **more: learn(  # noqa: E731
        objective.model, bank, objective, config=LearnConfig(steps=0, **more), progress=False
    )
    assert run(start="zero").start_scale == pytest.approx(1.0) and not run(start="zero").searched
    assert run(start=0.6).start_scale == pytest.approx(0.6)
    found = run()
    assert found.settings["scales"] == [s for s, _ in found.searched]
    assert found.settings["scales"] == pytest.approx([around(bank) * f for f in (0.4, 0.55, 0.75, 1.0, 1.35, 1.8)])
    assert found.start_scale == pytest.approx(min(found.settings["scales"], key=lambda s: abs(s - 0.3)))
    assert run(scales=(0.1, 0.9, 7.0)).settings["scales"] == [0.1, 0.9]
    with pytest.raises(LoralloyError, match=r"none of the scales \[3.0\] is within \(0, 3\)"):
        run(scales=(3.0,))


def test_a_held_out_quarter_picks_the_step(bank):
    """Even over the strata, out of every gradient, and its best step is what is returned."""
    objective = Regression({"a": 1.4, "b": 0.1, "c": 0.7}, bank, noise=2.0)
    done = learn(objective.model, bank, objective, granularity="module", config=LearnConfig(patience=5), progress=False)
    assert done.settings["hold_out"] == 4
    sets = {tuple(rows) for rows in objective.seen}
    assert sorted(map(len, sets)) == [4, 12] and not set.intersection(*map(set, sets))
    held = next(rows for rows in sets if len(rows) == 4)
    assert sorted(objective.strata[i] for i in held) == ["d0", "d1", "d2", "d3"]
    losses = [h["held_out"] for h in done.history]
    assert done.best_step == losses.index(min(losses)) and len(losses) <= 61
    live = Learnable(objective.model, bank, "linear")
    with live.at(done.weights), torch.no_grad():
        assert float(objective.loss(list(held))) == pytest.approx(min(losses), rel=1e-4)
    live.remove()


def test_parts_make_the_same_gradient(bank):
    """Rows in several forwards, unequal strata: the same run."""
    objective = Regression({"a": 1.4, "b": 0.1, "c": 0.7}, bank)
    objective.strata = ["x"] * 9 + ["y"] * 5 + ["z"] * 2
    config = LearnConfig(hold_out=0.0, steps=20)
    whole = learn(objective.model, bank, objective, config=config, progress=False)
    parts = learn(objective.model, bank, objective, config=dataclasses.replace(config, rows_at_once=3), progress=False)
    assert dict(parts.weights.items()) == pytest.approx(dict(whole.weights.items()), rel=1e-3)
    assert [h["loss"] for h in parts.history] == pytest.approx([h["loss"] for h in whole.history], rel=1e-3)


def test_parts_are_of_about_one_length(bank):
    """Rows of an objective that tells their lengths: the same run, each part's lengths beside the next's."""
    objective = Regression({"a": 1.4, "b": 0.1, "c": 0.7}, bank)
    objective.strata = ["x"] * 9 + ["y"] * 5 + ["z"] * 2
    config = LearnConfig(hold_out=0.0, steps=20, start=0.5)
    whole = learn(objective.model, bank, objective, config=config, progress=False)
    objective.lengths, objective.seen = [(7 * i) % 16 for i in range(16)], []
    parts = learn(objective.model, bank, objective, config=dataclasses.replace(config, rows_at_once=5), progress=False)
    assert dict(parts.weights.items()) == pytest.approx(dict(whole.weights.items()), rel=1e-3)
    assert [h["loss"] for h in parts.history] == pytest.approx([h["loss"] for h in whole.history], rel=1e-3)
    seen = [[objective.lengths[i] for i in rows] for rows in objective.seen[:4]]
    assert seen == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15]]


def test_the_same_seed_gives_the_same_weights(bank):
    objective = Regression({"a": 1.4, "b": 0.1, "c": 0.7}, bank, noise=0.5)
    runs = [
        learn(objective.model, bank, objective, config=LearnConfig(batch_size=5, steps=15, seed=s), progress=False)
        for s in (1, 1, 2)
    ]
    assert runs[0].weights == runs[1].weights and runs[0].history == runs[1].history
    assert runs[0].weights.coefficients != runs[2].weights.coefficients


def test_everything_is_put_back(bank):
    """Also where a run ends in an error."""
    objective = Regression({"a": 1.4}, bank)
    model = objective.model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    asked = [p.requires_grad for p in model.parameters()]
    learn(model, bank, objective, rule="ties", config=LearnConfig(steps=2), progress=False)
    objective.y = objective.y * torch.nan
    with pytest.raises(LoralloyError, match="not a number at any scale"):
        learn(model, bank, objective, rule="ties", progress=False)
    with pytest.raises(LoralloyError, match="the loss is not a number at step 0"):
        learn(model, bank, objective, config=LearnConfig(start="zero"), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and [p.requires_grad for p in model.parameters()] == asked == [True] * 4
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or "weight" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_it_learns_wherever_it_is_called(around, bank):
    objective, config = Regression({"a": 1.4, "b": 0.1, "c": 0.7}, bank), LearnConfig(steps=5)
    want = learn(objective.model, bank, objective, rule="ties", config=config, progress=False)
    with around():
        got = learn(objective.model, bank, objective, rule="ties", config=config, progress=False)
    assert got.weights == want.weights


def test_an_objective_of_another_model_is_refused(bank):
    model, objective = Nest(), Regression({"a": 1.4}, bank)
    with pytest.raises(LoralloyError, match=r"no gradient flows .* must run the very model"):
        learn(model, bank, objective, config=LearnConfig(start="zero"), progress=False)
    assert all(p.requires_grad for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())


def test_a_given_learnable_is_used_and_kept(bank):
    objective = Regression({"a": 1.4, "b": 0.1, "c": 0.7}, bank)
    live = Learnable(objective.model, bank, "ties")
    config = LearnConfig(steps=5)
    done = learn(objective.model, bank, objective, learnable=live, config=config, progress=False)
    assert done.settings["rule"] == str(live.rule) and done.settings["space"] == "delta"
    fresh = learn(objective.model, bank, objective, rule="ties", config=config, progress=False)
    assert done.weights == fresh.weights
    with live.at(torch.ones(3)), torch.no_grad():
        assert not torch.equal(objective.model(objective.x), Nest()(objective.x))
    for more, said in (
        ({"rule": "linear"}, "is of rule ties.*, not linear"),
        ({"space": "knots"}, "is of delta space, not knots"),
    ):
        with pytest.raises(LoralloyError, match=said):
            learn(objective.model, bank, objective, learnable=live, progress=False, **more)
    with pytest.raises(LoralloyError, match="of another model or bank"):
        learn(Nest(), bank, objective, learnable=live, progress=False)
    live.remove()


def test_weights_file(bank, tmp_path):
    objective = Regression({"a": 1.4}, bank)
    done = learn(
        objective.model,
        bank,
        objective,
        form="signed",
        granularity="layer",
        config=LearnConfig(steps=3),
        progress=False,
    )
    done.weights.save(tmp_path / "w.json")
    again = Weights.load(tmp_path / "w.json")
    assert again.coefficients == done.weights.coefficients and again.source == "learned"
    settings = again.explain["settings"]
    assert settings["form"] == "signed" and settings["steps"] == 3 and settings["rule"] == "linear"
    merge(bank, again, "linear")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"lr": 0}, "lr is 0; give a number above 0"),
        ({"steps": -1}, "steps is -1; give a whole number from 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"regularisation": -0.1}, "regularisation is -0.1; give a number from 0"),
        ({"hold_out": 1.0}, "hold_out is 1.0; give 'auto' or a fraction"),
        ({"start": "one"}, "start is 'one'; give 'scale', 'zero' or a number"),
        ({"patience": 0}, "patience is 0"),
        ({"rows_at_once": 0}, "rows_at_once is 0"),
        ({"scales": ()}, "at least one scale"),
    ],
)
def test_settings_out_of_range(more, said):
    with pytest.raises(LoralloyError, match=said):
        LearnConfig(**more)


def test_an_objective_without_strata_is_refused(bank):
    objective = Regression({"a": 1.4}, bank)
    objective.strata = []
    with pytest.raises(LoralloyError, match="has 16 examples and 0 strata"):
        learn(objective.model, bank, objective, progress=False)
    assert isinstance(objective.model, nn.Module)
