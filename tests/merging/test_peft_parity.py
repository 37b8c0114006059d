"""PEFT's own add_weighted_adapter against ours: dW within 1e-5, equal logits; tiny models and the shipped bank.

Random masks and the choice among equal magnitudes are handed to PEFT (see peft_oracle.py); DARE is compared by distribution as
well, and what PEFT's own top-k keeps as a multiset.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft_oracle import ENTRYWISE, NEAR, agree, agree_cut, both, loaded, ours, theirs
from torch import Tensor

from helpers import (
    PROJECTIONS,
    ConvNet,
    close,
    factors,
    load_in_peft,
    logits,
    peft_deltas,
    peft_folder,
    relative,
    tiny_gpt2,
    tiny_llama,
)
from loralloy.bank import Bank
from loralloy.merging import DareLinear, DareTies, Linear, Ties, merge, merge_factors
from loralloy.weights import Weights

IDS = torch.arange(3, 19).reshape(2, 8)


# -- tiny models -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Same rank; alphas differ; the third has fewer modules."""
    root = tmp_path_factory.mktemp("same")
    return [
        peft_folder(base, root / "a", 1, target_modules=PROJECTIONS, lora_alpha=8),
        peft_folder(base, root / "b", 2, target_modules=PROJECTIONS, lora_alpha=2),
        peft_folder(base, root / "c", 3, target_modules=["q_proj", "down_proj"], lora_alpha=16),
    ]


@pytest.fixture(scope="module")
def mixed(base, tmp_path_factory):
    """Ranks differ."""
    root = tmp_path_factory.mktemp("mixed")
    return [
        peft_folder(base, root / "a", 1, target_modules=PROJECTIONS, r=2, lora_alpha=8),
        peft_folder(base, root / "b", 2, target_modules=PROJECTIONS, r=7, lora_alpha=2),
        peft_folder(base, root / "c", 3, target_modules=["q_proj", "lm_head"], r=4),
    ]


KINDS = {
    "llama": (tiny_llama, ["embed_tokens", "q_proj", "v_proj", "down_proj", "lm_head"], ["v_proj", "embed_tokens"]),
    "gpt2": (tiny_gpt2, ["wte", "c_attn", "c_proj"], ["c_attn", "c_fc"]),  # Conv1D, stored transposed
    "conv": (ConvNet, ["one", "two", "point", "three", "out"], ["two", "out", "three"]),
}
_FOUND: dict[str, tuple[Any, Bank]] = {}


@pytest.fixture
def kind(request, tmp_path_factory):
    """(PEFT's model, our bank) of three adapters of one rank: other alphas, one rsLoRA, an alpha of its own, fewer modules.

    The second is rsLoRA, not the first: PEFT would keep the first one's setting and scale the result by it.
    """
    name = request.param
    if name not in _FOUND:
        make, targets, fewer = KINDS[name]
        model, root = make(), tmp_path_factory.mktemp(name)
        transposed = {"fan_in_fan_out": True} if name == "gpt2" else {}
        paths = [
            peft_folder(model, root / "a", 1, target_modules=targets, lora_alpha=8, **transposed),
            peft_folder(model, root / "b", 2, target_modules=targets, lora_alpha=3, use_rslora=True, **transposed),
            peft_folder(
                model, root / "c", 3, target_modules=fewer, lora_alpha=16, alpha_pattern={fewer[0]: 5}, **transposed
            ),
        ]
        _FOUND[name] = loaded(model, paths), Bank.load(paths)
    return _FOUND[name]


WEIGHTS = [{"a": 0.5, "b": 0.5}, {"a": 0.9, "b": -0.4, "c": 1.3}, {"a": -1.0, "b": 2.0}, {"c": 1.0, "b": 0.0, "a": 0.3}]
DENSITIES = [0.0, 0.1, 0.37, 0.5, 0.8, 1.0]


@pytest.mark.parametrize("rule", ENTRYWISE, ids=str)
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_factors_space_is_peft_s(kind, rule):
    """Every density with two kinds of weights: 0 votes, negative ones sign A, sums need not be 1."""
    model, bank = kind
    for at, density in enumerate(DENSITIES):
        if density == 0 and "seed" in rule.values:
            continue  # PEFT divides by 0
        for weights in (WEIGHTS[at % 4], WEIGHTS[(at + 1) % 4]):
            agree(*both(model, bank, weights, rule(density=density)))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_linear_and_cat_are_peft_s(kind, weights):
    model, bank = kind
    agree(*both(model, bank, weights, Linear))
    agree(ours(bank, weights, "cat", "factors"), theirs(model, weights, "cat"))


@pytest.mark.parametrize("rule", [r(density=0.37) for r in ENTRYWISE], ids=str)
def test_logits_are_peft_s(rule, base, folders, tmp_path):
    peft, bank = loaded(base, folders), Bank.load(folders)
    both(peft, bank, WEIGHTS[1], rule)
    merge(bank, Weights(WEIGHTS[1]), rule, "factors").adapter.save(tmp_path / "ours")
    assert close(logits(load_in_peft(base, tmp_path / "ours"), IDS), logits(peft, IDS))
    assert float((logits(peft, IDS) - logits(base, IDS)).abs().max()) > 1e-2


@pytest.mark.parametrize("rule", [DareLinear, DareTies], ids=str)
def test_density_0_of_dare_is_nothing_here_and_nan_in_peft(rule, base, folders):
    want = theirs(loaded(base, folders), WEIGHTS[0], rule.name, density=0.0)
    assert all(bool(w.isnan().all()) for w in want.values())
    assert all(
        float(g.abs().max()) == 0 for g in ours(Bank.load(folders), WEIGHTS[0], rule(density=0), "factors").values()
    )


def test_one_adapter_peft_never_prunes(base, folders):
    """add_weighted_adapter turns any rule into linear where one adapter is given; a rule here means what it says."""
    peft, bank = loaded(base, folders), Bank.load(folders)
    want = theirs(peft, {"a": 0.5}, "ties", density=0.2)
    agree(ours(bank, {"a": 0.5}, "linear", "factors"), want)
    assert (
        relative(ours(bank, {"a": 0.5}, Ties(density=0.2), "factors")[next(iter(want))], next(iter(want.values())))
        > 0.1
    )
    agree(ours(bank, {"a": 0.5}, Ties(density=1), "factors"), want)


@pytest.mark.parametrize("rule", ENTRYWISE, ids=str)
@pytest.mark.parametrize("cut", [1, 5, 32])
def test_delta_space_is_peft_s_svd_variants(rule, cut, base, mixed):
    """Ranks differ; cut 32 is the full rank. PEFT counts a zero-weighted adapter as a vote, so those stay out here."""
    peft, bank = loaded(base, mixed), Bank.load(mixed)
    for density, weights in ((0.1, WEIGHTS[0]), (0.5, WEIGHTS[1]), (0.8, WEIGHTS[2]), (1.0, WEIGHTS[1])):
        got, want = both(peft, bank, weights, rule(density=density), cut)
        agree_cut(got, want, ours(bank, weights, rule(density=density), "delta", "full"), cut)


@pytest.mark.parametrize("rule", ENTRYWISE, ids=str)
@pytest.mark.parametrize(("which", "rank"), [("gpt2", 6), ("conv", 3)])
def test_delta_space_of_stored_transposed_embeddings_and_conv2d(which, rank, rule, base, tmp_path):
    """(PEFT's `_svd` variants know Conv2d, not Conv1d or Conv3d.)"""
    model = KINDS[which][0]()
    targets = ["wte", "c_attn", "c_proj"] if which == "gpt2" else ["two", "point", "out"]
    more = {"target_modules": targets, "fan_in_fan_out": which == "gpt2"}
    paths = [peft_folder(model, tmp_path / n, i, lora_alpha=3 + i, **more) for i, n in enumerate("ab")]
    bank, weights, rule = Bank.load(paths), {"a": 0.8, "b": -0.5}, rule(density=0.37)
    got, want = both(loaded(model, paths), bank, weights, rule, rank)
    agree_cut(got, want, ours(bank, weights, rule, "delta", "full"), rank)


CASES = [
    ("linear", "factors", "folders"),
    ("cat", "delta", "folders"),
    ("cat", "factors", "mixed"),
    ("svd", "delta", "mixed"),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("rule", "space", "which"), CASES)
def test_tiny(rule, space, which, weights, base, request, tmp_path):
    paths = request.getfixturevalue(which)
    peft = loaded(base, paths)
    # max rank is that of the adapters that take part: PEFT counts a zero-weighted one, so the rank is given
    rank = 5 if rule == "svd" else None
    want = theirs(peft, weights, rule, **({"svd_rank": rank} if rank else {}))
    merged = merge(Bank.load(paths), Weights(weights), rule, space, rank)
    merged.adapter.save(tmp_path / "ours")
    model = load_in_peft(base, tmp_path / "ours")
    agree(peft_deltas(model), want)
    assert close(logits(model, IDS), logits(peft, IDS))
    assert float((logits(peft, IDS) - logits(base, IDS)).abs().max()) > 1e-2


def test_default_svd_rank_is_peft_s(base, mixed):
    peft = loaded(base, mixed)
    want = theirs(peft, {"a": 1.0, "b": 0.5}, "svd")
    got = merge(Bank.load(mixed), Weights({"a": 1.0, "b": 0.5}), "svd").adapter
    assert got.max_rank == 7
    assert all(relative(got[m].dense(), want[m]) < NEAR for m in got)


def test_rslora_is_where_peft_is_wrong(base, tmp_path):
    """PEFT 0.21.2 keeps use_rslora on the merged adapter, so its cat comes out sqrt(r) too strong; ours does not."""
    paths = [
        peft_folder(base, tmp_path / n, i, target_modules=["q_proj"], use_rslora=True, r=8) for i, n in enumerate("ab")
    ]
    peft = loaded(base, paths)
    want = theirs(peft, {"a": 0.5, "b": 0.5}, "cat")
    bank = Bank.load(paths)
    got = merge(bank, Weights({"a": 0.5, "b": 0.5}), "cat").adapter
    for m in got:
        truth = sum(0.5 * f.dense() for f in bank.factors(m).values())
        assert relative(got[m].dense(), truth) < NEAR
        assert relative(want[m], 4 * truth) < NEAR  # sqrt(16): if this fails PEFT is mended, and docs should say so


# -- DARE by distribution ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [DareLinear, DareTies], ids=str)
def test_dare_s_mean_and_variance_over_seeds_are_peft_s(rule):
    """Of dW entries over 500 seeds, each within 5 standard errors of the other; the estimate of a variance has kurtosis."""
    from peft.utils import merge_utils

    density, runs, weights = 0.4, 500, [0.8, -0.3, 0.5]
    parts = [factors(5, 4, 3, i, 1.0) for i in range(3)]
    root = torch.tensor(weights).abs().sqrt()
    signed, kind = root * torch.tensor(weights).sign(), getattr(merge_utils, rule.name)

    def ours_at(seed: int) -> Tensor:
        return merge_factors([{"m": f} for f in parts], weights, rule(density=density, seed=seed), "factors")[
            "m"
        ].dense()

    def theirs_at(seed: int) -> Tensor:
        torch.manual_seed(seed)
        a, b = (kind([getattr(f, x) for f in parts], w, density) for x, w in (("A", signed), ("B", root)))
        return (b @ a).double()

    with torch.random.fork_rng():
        got, want = (torch.stack([draw(seed) for seed in range(runs)]) for draw in (ours_at, theirs_at))
    error = (got.var(0) + want.var(0)).div(runs).sqrt()
    apart = ((got.mean(0) - want.mean(0)) / error).abs()
    assert float(apart.max()) < 4 and float(apart.square().mean()) < 2
    squares = [(x - x.mean(0)).square() for x in (got, want)]
    error = (squares[0].var(0) + squares[1].var(0)).div(runs).sqrt()
    apart = ((squares[0].mean(0) - squares[1].mean(0)) / error).abs()
    assert float(apart.max()) < 4 and float(apart.square().mean()) < 2
    if rule.name == "dare_linear":  # and unbiased: A and B are dropped apart, so the mean is linear's
        linear = merge_factors([{"m": f} for f in parts], weights, Linear, "factors")["m"].dense()
        assert float(((got.mean(0) - linear) / (got.var(0) / runs).sqrt()).abs().max()) < 4
