"""Adapters whose modules are called as another version of transformers calls them."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from helpers import BASE, adapter, close, delta, factors, load_in_peft, tiny_llama
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError
from loralloy.live import LiveModel
from loralloy.live.base import base_fingerprint
from loralloy.live.learnable import Learnable
from loralloy.live.merged_rows import MergedRows
from loralloy.live.names import ModelNames, named_for, saved_fingerprint
from loralloy.live.paged import PagedModel
from loralloy.stored import StoredFactors
from loralloy.weights import Weights
from old_names import older, pixels, tiny_vit, vision_adapter
from vision_scenes import tiny_dinov2

MODELS = {"dinov2": tiny_dinov2, "vit": tiny_vit}
QUERY, OLD_QUERY = "encoder.layer.0.attention.q_proj", "encoder.layer.0.attention.attention.query"
ONE = Weights({"a": 0.7, "b": -0.4})


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def two(model, *, old: bool) -> Bank:
    made = [vision_adapter(model, "a", 1), vision_adapter(model, "b", 2)]
    return Bank([older(one) for one in made] if old else made)


def answers(model) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=pixels(3)).last_hidden_state


def in_live(model, bank, weights):
    live = LiveModel(model, bank)
    try:
        with live.compose(weights):
            return answers(model)
    finally:
        live.remove()


def in_paged(model, bank, weights):
    live = PagedModel(model, bank)
    try:
        live.set([weights] * 3)
        return answers(model)
    finally:
        live.close()


def in_learnable(model, bank, weights):
    live = Learnable(model, bank, "ties", "delta")
    try:
        with live.at(weights):
            return answers(model)
    finally:
        live.remove()


def in_rows(model, bank, weights):
    rows = MergedRows(model)
    try:
        with rows.use([bank["a"], dict(bank["b"])], [0, 1, -1]):
            return answers(model)
    finally:
        rows.remove()


WAYS = [in_live, in_paged, in_learnable, in_rows]


@pytest.mark.parametrize("way", WAYS)
def test_old_names_compute_what_the_models_names_do(kind, way):
    model = MODELS[kind]()
    plain, want = answers(model), way(model, two(model, old=False), ONE)
    got = way(model, two(model, old=True), ONE)
    assert not torch.equal(want, plain)
    assert torch.equal(got, want)


def test_every_name_becomes_the_models_and_nothing_is_read(kind, tmp_path, monkeypatch):
    model = MODELS[kind]()
    for one in two(model, old=True).values():
        one.save(tmp_path / one.name)
    monkeypatch.setattr(StoredFactors, "read", lambda *_: pytest.fail("a tensor was read"))
    bank = Bank.load(tmp_path)
    named = named_for(model, bank)
    assert named is not bank and set(named["a"]) == set(vision_adapter(model, "a", 1))
    assert set(bank["a"]).isdisjoint(named["a"]) or kind == "dinov2"  # whose fc1 and fc2 kept their names
    assert PagedModel(model, bank).names == ["a", "b"]


def test_ranks_scalings_hash_and_provenance_are_the_adapters(tmp_path):
    model = tiny_dinov2()
    new = vision_adapter(model, "a", 1)
    older(new).save(tmp_path / "a")  # ranks and alphas differ by module: they are patterns in the file
    loaded = Adapter.load(tmp_path / "a")
    named = ModelNames(model).adapter(loaded)
    assert loaded.config.rank_pattern and loaded.config.alpha_pattern
    assert {m: (named.rank(m), named[m].scaling) for m in named} == {m: (new.rank(m), new[m].scaling) for m in new}
    assert all(named.outline(m).shape == new[m].shape and torch.equal(named.unchecked(m).A, new[m].A) for m in new)
    assert (named.content_hash, named.provenance, named.path) == (loaded.content_hash, loaded.provenance, loaded.path)
    assert named.own_names[QUERY] == OLD_QUERY and "encoder.layer.0.mlp.fc1" not in named.own_names
    assert not loaded.own_names


def test_saved_it_is_an_adapter_of_the_new_names(tmp_path):
    model = tiny_dinov2()
    new = vision_adapter(model, "a", 1)
    older(new).save(tmp_path / "old")
    ModelNames(model).adapter(Adapter.load(tmp_path / "old", "a")).save(tmp_path / "new")
    again = Adapter.load(tmp_path / "new")
    assert again.content_hash == new.content_hash
    assert torch.equal(load_in_peft(model, tmp_path / "new").base_model.model.get_submodule(QUERY).lora_A["default"].weight,
                       new[QUERY].A)  # fmt: skip


def test_nothing_is_done_where_the_names_fit(monkeypatch):
    monkeypatch.setattr("loralloy.live.names._places", lambda *_: pytest.fail("the renamings were asked for"))
    vision, llama = tiny_dinov2(), tiny_llama()
    bank = two(vision, old=False)
    assert named_for(vision, bank) is bank and LiveModel(vision, bank).bank is bank
    text = Bank([adapter({"model.layers.0.self_attn.k_proj": factors(16, 32)})])
    assert named_for(llama, text) is text
    assert ModelNames(llama).factors(plain := {"model.layers.0.mlp.up_proj": factors(48, 32)}) is plain


def test_adapters_of_both_versions_go_together():
    model = tiny_dinov2()
    new, old = two(model, old=False), two(model, old=True)
    before, now = (BaseRef(BASE, None, f"bf16-sampled-v1:{mark}") for mark in ("00", "ff"))
    mixed = Bank([adapter(old["a"], "a", before), adapter(new["b"], "b", now)], assume_same_base=True)
    for way in (in_live, in_learnable):  # under TIES they elect signs together
        assert torch.equal(way(model, mixed, ONE), way(model, new, ONE))


def test_a_model_inside_another_module():
    inner = tiny_dinov2()
    outer = nn.ModuleDict({"backbone": inner})
    bank = Bank([adapter({f"backbone.{OLD_QUERY}": factors(16, 16)})])
    assert list(named_for(outer, bank)["a"]) == [f"backbone.{QUERY}"]


HALF = "by transformers' own renamings 1 of its modules are the model's, but "


def other(name: str) -> dict:
    return {OLD_QUERY: factors(16, 16), name: factors(16, 16, seed=1)}


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_that_fits_by_half_is_refused_and_says_so(way):
    model = tiny_dinov2()
    parts = other("encoder.layer.7.attention.attention.key")
    bank = Bank([adapter(parts), adapter(parts, "b")])
    with pytest.raises(
        LoralloyError, match=HALF + r"'encoder.layer.7.attention.attention.key' is not; use the version"
    ):
        way(model, bank, ONE)
    assert named_for(model, bank) is bank


@pytest.mark.parametrize(
    ("model", "name", "why"),
    [
        (tiny_dinov2(), QUERY, f"'{OLD_QUERY}' and '{QUERY}' would both be '{QUERY}'"),
        (tiny_dinov2(use_swiglu_ffn=True), "encoder.layer.0.mlp.weights_in", "weights_in' is fused, split or turned"),
    ],
    ids=["collision", "fused"],
)
def test_what_is_more_than_a_renaming_is_refused(model, name, why):
    bank = Bank([adapter(other(name))])
    assert named_for(model, bank) is bank
    with pytest.raises(
        LoralloyError, match="which the model does not; it is not of this base model, or of another"
    ) as said:
        LiveModel(model, bank)
    assert why in str(said.value)


def test_an_adapter_of_another_base_gets_no_hint():
    with pytest.raises(LoralloyError, match=r"it is not of this base model$"):
        LiveModel(tiny_dinov2(), Bank([adapter({"model.layers.0.self_attn.q_proj": factors()})]))


def test_an_older_transformers_renames_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    model = tiny_dinov2()
    with pytest.raises(LoralloyError, match=r"it is not of this base model$"):
        LiveModel(model, two(model, old=True))


def test_names_that_move_along_are_renamed_together(monkeypatch):
    """A name that the model has, too, is of the other version where its neighbours are."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import GroupWeightRename

    def mapping(*_, **__):
        return [GroupWeightRename([r"\.aa\.", r"\.q_proj\."], [".q_proj.", ".v_proj."])]

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", mapping)
    at = "encoder.layer.0.attention."
    bank = Bank([adapter({at + "q_proj": factors(16, 16), at + "aa": factors(16, 16, seed=1)})])
    named = named_for(tiny_dinov2(), bank)
    want = {at + "v_proj": bank["a"][at + "q_proj"], at + "q_proj": bank["a"][at + "aa"]}
    assert {m: named["a"][m] for m in named["a"]} == want


# -- the base's fingerprint --------------------------------------------------------------------------------------------


class Before:
    """What the model was in the older version, to `base_fingerprint`."""

    def __init__(self, model):
        self.model = model

    def named_parameters(self):
        return [(older(name), p) for name, p in self.model.named_parameters()]


def test_a_fingerprint_of_the_old_names_is_the_models(kind):
    model = MODELS[kind]()
    now, before = base_fingerprint(model), base_fingerprint(Before(model))
    assert now != before == saved_fingerprint(model)
    bank = Bank([older(vision_adapter(model, "a", 1, BaseRef(BASE, None, before)))])
    LiveModel(model, bank, BaseRef(BASE, None, now)).remove()
    Learnable(model, bank, base=BaseRef(BASE, None, now)).remove()
    another = MODELS[kind](seed=1)
    for take in (LiveModel, PagedModel):
        with pytest.raises(LoralloyError, match="the fingerprints of their base tensors differ"):
            take(another, bank, BaseRef(BASE, None, base_fingerprint(another)))


def test_a_model_whose_names_never_changed_has_no_other_fingerprint():
    assert saved_fingerprint(tiny_llama()) is None


# -- weights by module -------------------------------------------------------------------------------------------------


def by_module(bank: Bank) -> Weights:
    return Weights({n: {m: 0.1 * (i + j) - 0.5 for i, m in enumerate(bank[n])} for j, n in enumerate(bank)})


@pytest.mark.parametrize("way", [in_live, in_paged, in_learnable])
def test_weights_by_module_go_by_either_name(way):
    model = tiny_dinov2()
    new, old = two(model, old=False), two(model, old=True)
    want = way(model, new, by_module(new))
    assert torch.equal(way(model, old, by_module(new)), want)
    assert torch.equal(way(model, old, by_module(old)), want)
    assert torch.equal(way(model, old, Weights({"a": {OLD_QUERY: 0.3, "*": 1.0}})),
                       way(model, new, Weights({"a": {QUERY: 0.3, "*": 1.0}})))  # fmt: skip
    with pytest.raises(LoralloyError, match=f"weights of adapter 'a' name module '{QUERY}' twice"):
        way(model, old, Weights({"a": {OLD_QUERY: 0.3, QUERY: 0.3}}))
    with pytest.raises(LoralloyError, match=r"name module 'encoder.layer.0.atention.q_proj', which it does not have"):
        way(model, old, Weights({"a": {"encoder.layer.0.atention.q_proj": 0.3}}))


def test_weights_go_back_to_the_names_of_the_files():
    model = tiny_dinov2()
    old = two(model, old=True)
    named, given = named_for(model, old), by_module(old)
    there = named.fit_weights(given)
    assert there.coefficients != given.coefficients and QUERY in there.coefficients["a"]
    assert named.own_weights(there) == given
    assert named.own_weights(ONE) is ONE and old.fit_weights(given) is given


def test_a_merge_carries_the_names_of_its_bank():
    from loralloy import merge

    model = tiny_dinov2()
    old = two(model, old=True)
    named = named_for(model, old)
    before, after = (merge(bank, by_module(old), "ties", "delta").adapter for bank in (old, named))
    assert set(before) == set(old["a"]) and set(after) == set(named["a"])
    assert all(close(delta(after)[m], delta(ModelNames(model).adapter(before))[m]) for m in after)
