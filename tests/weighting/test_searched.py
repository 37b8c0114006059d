"""Black-box search: LoraHub's objective and numbers, any rule, and a generator of its own; AdaMerging's refusal."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import adapter, close, factors, logits, tiny_llama
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError
from loralloy.live import LiveModel
from loralloy.merging import RULES, Ties, TsvM, get_rule, merge
from loralloy.weighting.adamerging import adamerging
from loralloy.weighting.candidates import Candidates
from loralloy.weighting.searched import SearchConfig, loss_of, search
from loralloy.weights import Weights

IDS = torch.arange(3, 27).reshape(3, 8)
SHAPES = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.down_proj": (32, 48)}
QUICK = SearchConfig(budget=60, penalty=0.0)


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def bank():
    return Bank(
        adapter({m: factors(*shape, 3, 3 * n + j, 0.4) for j, (m, shape) in enumerate(SHAPES.items())}, name)
        for n, name in enumerate("abc")
    )


class Towards:
    """How far the model's logits are from those under known weights: the answer is known."""

    def __init__(self, model, bank, weights, rule="linear", space=None):
        self.model, self.size, self.strata = model, 3, ["x"] * 3
        held = Candidates(model, bank, rule, space)
        with held.at(weights):
            self.want = model(input_ids=IDS).logits
        held.remove()
        self.asked = 0

    def loss(self, rows, step=0):
        self.asked += 1
        assert not torch.is_grad_enabled() and list(rows) == [0, 1, 2]
        return (self.model(input_ids=IDS).logits - self.want).square().mean()


def test_finds_weights_that_are_known(base, bank):
    want = {"a": 0.8, "b": -0.5, "c": 0.3}
    objective = Towards(base, bank, Weights(want))
    plain = logits(base, IDS)
    found = search(base, bank, objective, config=SearchConfig(budget=150, penalty=0.0), progress=False)
    assert dict(found.weights.items()) == pytest.approx(want, abs=0.1)
    assert found.weights.source == "searched" and found.settings["evaluations"] == objective.asked == 150
    assert found.history[found.best_step]["value"] == min(entry["value"] for entry in found.history)
    assert found.history[found.best_step]["alpha"] == dict(found.weights.items())
    assert set(found.history[0]["alpha"].values()) == {0.0}
    assert found.history[0]["loss"] == pytest.approx(float((plain - objective.want).square().mean()), rel=1e-5)
    assert torch.equal(logits(base, IDS), plain) and not any(m._forward_hooks for m in base.modules())


def test_the_penalty_is_lorahubs(base, bank):
    """loss + 0.05 mean |w|, |w| <= 1.5, 40 evaluations; where all weights do as well, 0 is best."""
    flat = SimpleNamespace(model=base, size=1, strata=["x"], loss=lambda rows, step=0: torch.tensor(0.25))
    found = search(base, bank, flat, progress=False)
    assert len(found.history) == 40 and found.best_step == 0
    for entry in found.history:
        w = np.abs(list(entry["alpha"].values()))
        assert entry["value"] == pytest.approx(0.25 + 0.05 * w.mean()) and w.max() <= 1.5
    assert max(np.abs(list(e["alpha"].values())).max() for e in found.history) > 0.5
    tight = search(base, bank, flat, config=SearchConfig(bound=0.2, spread=0.5), progress=False)
    assert max(np.abs(list(e["alpha"].values())).max() for e in tight.history) <= 0.2


def test_nothing_drops_out_while_it_measures(base, bank):
    modes = []

    def loss(rows, step=0):
        modes.append(base.training)
        return torch.tensor(0.25)

    base.train()
    try:
        search(base, bank, SimpleNamespace(model=base, size=1, strata=["x"], loss=loss), config=QUICK, progress=False)
        assert set(modes) == {False} and all(m.training for m in base.modules())
    finally:
        base.eval()


@pytest.mark.parametrize("adapters", [1, 2])
def test_few_adapters(base, bank, adapters):
    few = bank.select(list("abc")[:adapters])
    want = dict.fromkeys(few.names, 0.7)
    found = search(base, few, Towards(base, few, Weights(want)), config=QUICK, progress=False)
    assert dict(found.weights.items()) == pytest.approx(want, abs=0.1)


def test_a_seed_decides_and_the_global_generator_is_left_alone(base, bank):
    objective = Towards(base, bank, Weights({"a": 0.5}))
    runs = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 1)):
        np.random.seed(global_seed)
        before = np.random.get_state()[1].copy()
        torch_before = torch.random.get_rng_state()
        runs.append(search(base, bank, objective, config=SearchConfig(budget=14, seed=seed), progress=False).history)
        assert np.array_equal(np.random.get_state()[1], before)
        assert torch.equal(torch.random.get_rng_state(), torch_before)
    assert runs[0] == runs[1] != runs[2]


EVERYWHERE = [(rule.name, space) for rule in RULES.values() for space in rule.spaces]


@pytest.mark.parametrize(("rule", "space"), EVERYWHERE)
def test_candidates_are_merges(base, bank, rule, space):
    """Under any rule and space, the model under a candidate is the model with the merged adapter (rank full)."""
    weights = Weights({"a": 0.9, "b": -0.4, "c": 0.6})
    held = Candidates(base, bank, rule, space)
    plain = logits(base, IDS)
    with held.at(weights):
        got = logits(base, IDS)
    with held.at(None):
        assert torch.equal(logits(base, IDS), plain)
    with held.at(Weights({"a": 0.0})):
        assert close(logits(base, IDS), plain)
    held.remove()
    assert torch.equal(logits(base, IDS), plain) and not any(m._forward_hooks for m in base.modules())
    merged = merge(bank, weights, rule, space, "full", torch.float32).adapter
    live = LiveModel(base, Bank([merged]))
    with live.compose(Weights({merged.name: 1.0})):
        assert close(got, logits(base, IDS), 2e-5)
        assert not close(got, plain, 1e-2)
    live.remove()


def test_a_rank_cuts_each_candidate(base, bank):
    weights = Weights({"a": 0.9, "b": 0.4})
    held = Candidates(base, bank, Ties(density=0.5), "delta", rank=2)
    with held.at(weights):
        got = logits(base, IDS)
    held.remove()
    merged = merge(bank, weights, Ties(density=0.5), "delta", 2, torch.float32).adapter
    live = LiveModel(base, Bank([merged]))
    with live.compose(Weights({merged.name: 1.0})):
        assert close(got, logits(base, IDS))
    live.remove()


def test_search_through_a_rule_that_gradients_cannot_take(base, bank):
    want = {"a": 0.8, "b": 0.4, "c": 0.6}
    objective = Towards(base, bank, Weights(want), "tsv_m")
    found = search(base, bank, objective, rule=TsvM, config=QUICK, progress=False)
    assert found.settings["rule"] == str(TsvM) and found.settings["space"] == "delta"
    assert found.history[found.best_step]["loss"] < 0.2 * found.history[0]["loss"]


def test_losses_in_parts_are_the_loss(base):
    strata = ["x"] * 50 + ["y"] * 9
    values = torch.rand(59, generator=torch.Generator().manual_seed(0))
    seen = []

    def losses(rows, step=0):
        seen.append(len(rows))
        return values[list(rows)]

    objective = SimpleNamespace(model=base, size=59, strata=strata, losses=losses)
    assert loss_of(objective) == pytest.approx(float(values[:50].mean() + values[50:].mean()) / 2)
    assert len(seen) > 1 and sum(seen) == 59


def test_losses_that_are_no_numbers(base, bank):
    """They are the worst there is; where there are no others, it says so."""
    seen = []

    def loss(rows, step=0):
        seen.append(None)
        return torch.tensor(torch.nan if len(seen) % 2 else 1.0 / len(seen))

    found = search(base, bank, SimpleNamespace(model=base, size=1, strata=["x"], loss=loss), progress=False)
    assert np.isfinite(found.history[found.best_step]["loss"]) and len(found.history) == 40
    broken = SimpleNamespace(model=base, size=1, strata=["x"], loss=lambda rows, step=0: torch.tensor(torch.nan))
    with pytest.raises(LoralloyError, match=r"the loss of none of \d+ candidates is a number"):
        search(base, bank, broken, progress=False)
    assert not any(m._forward_hooks for m in base.modules())


def test_refusals(base, bank, monkeypatch):
    objective = SimpleNamespace(model=base, size=1, strata=["x"], loss=lambda rows, step=0: torch.tensor(0.0))
    for config, says in (
        ({"budget": 1}, "budget is 1"),
        ({"bound": 0.0}, "bound is 0.0"),
        ({"penalty": -1.0}, "penalty is -1.0"),
    ):
        with pytest.raises(LoralloyError, match=says):
            SearchConfig(**config)
    with pytest.raises(LoralloyError, match="rule 'tis' is not known"):
        search(base, bank, objective, rule="tis", progress=False)
    for rule in ("linear", "tsv_m"):
        with pytest.raises(LoralloyError, match="load the model the adapters were trained on"):
            search(base, bank, objective, rule=rule, base=BaseRef("another/model"), progress=False)
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(LoralloyError, match=r"needs pycma: pip install 'loralloy\[search\]'"):
        search(base, bank, objective, progress=False)
    assert not any(m._forward_hooks for m in base.modules())


class Unsure:
    """Entropy of the next token over a few: an objective without labels."""

    kind = "entropy"

    def __init__(self, model):
        self.model, self.size, self.strata = model, 3, ["x"] * 3

    def loss(self, rows, step=0):
        logp = self.model(input_ids=IDS[list(rows)]).logits[:, -1, :4].log_softmax(-1)
        return -(logp.exp() * logp).sum(-1).mean()


def test_adamerging_lowers_entropy_from_its_start_and_by_layer(base, bank):
    found = adamerging(base, bank, Unsure(base), rule=get_rule("ties"), progress=False)
    assert found.start_scale == pytest.approx(0.3) and found.settings["granularity"] == "layer"
    assert list(found.history[0]["alpha"].values()) == pytest.approx([0.3] * 3)
    assert found.history[-1]["loss"] < found.history[0]["loss"] - 1e-3
    values = [found.weights.of(n, m) for n in "abc" for m in SHAPES]
    assert 0 < min(values) < max(values) < 1 and max(abs(v - 0.3) for v in values) > 0.1
    with pytest.raises(LoralloyError, match="of kind 'answer'; make it with kind='entropy'"):
        adamerging(base, bank, SimpleNamespace(kind="answer"))
