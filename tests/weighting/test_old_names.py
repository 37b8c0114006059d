"""Weights of adapters whose modules an older transformers named: they are what new names give, by the bank's own names."""

from __future__ import annotations

import pytest
import torch

from helpers import close, delta
from loralloy import merge
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.live.learnable import Learnable
from loralloy.live.names import ModelNames
from loralloy.recipe import Recipe
from loralloy.weighting.balance import balance
from loralloy.weighting.candidates import Candidates
from loralloy.weighting.learned import LearnConfig, learn
from loralloy.weighting.probed import probe
from loralloy.weighting.regmean import regmean
from loralloy.weighting.tada import compose
from loralloy.weights import Weights
from old_names import older, pixels, vision_adapter
from vision_scenes import tiny_dinov2

ROWS = 6
BATCHES = [{"pixel_values": pixels(4, 1)}, {"pixel_values": pixels(2, 2)}]


def banks(model) -> tuple[Bank, Bank]:
    new = [vision_adapter(model, name, seed) for seed, name in enumerate("ab")]
    return Bank(new), Bank([older(one) for one in new])


def by_old_names(weights: Weights) -> dict:
    return {n: {older(m): w for m, w in value.items()} for n, value in weights.coefficients.items()}


class Target:
    """How far the class token is from a random one."""

    def __init__(self, model) -> None:
        self.model, self.size, self.strata = model, ROWS, ["all"] * ROWS
        self.x, self.y = pixels(ROWS), torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(3))

    def loss(self, rows, step=0):
        return (
            (self.model(pixel_values=self.x[list(rows)]).last_hidden_state[:, 0] - self.y[list(rows)]).square().mean()
        )


def test_regmean():
    model = tiny_dinov2()
    new, old = banks(model)
    inputs = dict.fromkeys("ab", BATCHES)
    want, got = (regmean(model, bank, inputs, progress=False).weights for bank in (new, old))
    assert dict(got.coefficients) == by_old_names(want)
    merge(old, got)


@pytest.mark.parametrize("given", [False, True], ids=["its own", "a learnable"])
def test_learned(given):
    model = tiny_dinov2()
    new, old = banks(model)
    config = LearnConfig(steps=3, start=0.3, hold_out=0.0)
    found = []
    for bank in (new, old):
        candidates = Candidates(model, bank, "ties", "delta")
        made = candidates.live if given else None
        assert isinstance(candidates.live, Learnable)
        if not given:
            candidates.remove()
        found.append(learn(model, bank, Target(model), rule="ties", space="delta", granularity="module", config=config,
                           learnable=made, progress=False).weights)  # fmt: skip
        candidates.remove()
    assert dict(found[1].coefficients) == by_old_names(found[0])
    merge(old, found[1])


@pytest.mark.parametrize(("rule", "rank"), [("ties", "full"), ("ties", 2), ("tsv_m", "full")])
def test_candidates(rule, rank):
    model = tiny_dinov2()
    found = []
    for bank in banks(model):
        weights = Weights({n: {m: 0.1 * i for i, m in enumerate(bank[n])} for n in bank})
        candidates = Candidates(model, bank, rule, None, rank)
        with candidates.at(weights):
            found.append(model(pixel_values=pixels(2)).last_hidden_state)
        candidates.remove()
    assert torch.equal(*found)


def test_readings_go_by_the_models_names():
    model = tiny_dinov2()
    new, old = (probe(model, bank, BATCHES) for bank in banks(model))
    assert old.modules == new.modules
    assert (old.sums["response"] == new.sums["response"]).all()


def test_balance():
    model = tiny_dinov2()
    new, old = (bank["a"] for bank in banks(model))

    def scores():
        return model(pixel_values=pixels(4)).last_hidden_state[:, 0, :3].log_softmax(1)

    directions = torch.eye(16)[:3]
    want, got = (balance(model, one, scores, directions, at=0) for one in (new, old))
    assert (got.module, got.before, got.after) == (want.module, want.before, want.after)
    assert want.after < want.before
    assert all(torch.equal(delta(got.adapter)[m], d) for m, d in delta(want.adapter).items())


@pytest.mark.parametrize("common", [0, 1])
def test_tada_and_the_recipe_that_repeats_it(tmp_path, common):
    model = tiny_dinov2()
    made = {}
    for kind, bank in zip(("new", "old"), banks(model), strict=True):
        for name in "ab":
            bank[name].save(tmp_path / kind / name)
        folders = [tmp_path / kind / name for name in "ab"]
        made[kind] = compose(folders, model, BATCHES, tmp_path / kind / "out", general=BATCHES[:1], common=common)
    want, got = made["new"], made["old"]
    assert got.weights.coefficients == want.weights.coefficients
    assert dict(got.own_weights.coefficients) == by_old_names(want.weights)
    assert want.own_weights is want.weights
    assert all(torch.equal(delta(got.merged.adapter)[m], d) for m, d in delta(want.merged.adapter).items())
    recipe = tmp_path / "old" / "out" / "recipe.yaml"
    # it knows no model, so the modules keep the names in the files, and the directions go by those
    again = Recipe.load(recipe).prepare().merge(tmp_path / "again").adapter
    assert OLD in again and (tmp_path / "again/freed.safetensors").exists() is bool(common)
    named = ModelNames(model).adapter(Adapter.load(tmp_path / "again"))
    assert all(close(delta(named)[m], d) for m, d in delta(got.merged.adapter).items())


OLD = "encoder.layer.0.attention.attention.query"
