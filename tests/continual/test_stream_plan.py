"""What a plan's keys depend on: all that decides a result, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
from toy_stream import ToyWorkshop, stream_of

from loralloy.continual.plan import make_plan

BASE = {
    "merges": [{"rule": "ties", "space": "delta"}],
    "strategies": [
        {"kind": "fixed", "weight": 1.0, "name": "f"},
        {"kind": "learned", "name": "l"},
        "joint",
        "sequential",
    ],
}


def planned(tmp_path, order=("red", "green"), settings=None, **fields):
    stream = stream_of(tmp_path, ("red", "green"), orders=[list(order)], **{**BASE, **fields})
    workshop = ToyWorkshop(stream)
    workshop.settings = settings or {}
    return make_plan(stream, workshop)


def keys(plan):
    return {(run.strategy, t): keys for run in plan.runs for t, keys in enumerate(run.steps)}


def changed(one, two):
    a, b = keys(one), keys(two)
    assert a.keys() == b.keys()
    return {strategy for strategy, t in a if a[strategy, t] != b[strategy, t]}


ALL = {"f", "l", "joint", "sequential"}


@pytest.mark.parametrize(
    ("fields", "which"),
    [
        ({}, set()),
        ({"title": "Other", "out": "elsewhere", "keep_merged": True}, set()),
        ({"buffer": {"per_class": 2}}, {"l"}),
        ({"buffer": {"selection": "herding"}}, {"l"}),
        ({"buffer": {"total": 3}}, {"l"}),
        ({"seeds": [1]}, ALL),
        ({"rank": 2}, {"f", "l"}),
        ({"uncut": True}, {"f", "l"}),
        ({"merges": [{"rule": {"name": "ties", "density": 0.9}, "space": "delta"}]}, {"f", "l"}),
        ({"merges": [{"rule": "ties", "space": "factors"}]}, {"f", "l"}),
        ({"strategies": [{"kind": "fixed", "weight": 2.0, "name": "f"}, *BASE["strategies"][1:]]}, {"f"}),
        (
            {"strategies": [BASE["strategies"][0], {"kind": "learned", "name": "l", "lr": 0.2}, "joint", "sequential"]},
            {"l"},
        ),
        ({"settings": {"train": {"lr": 1}}}, ALL),
        ({"settings": {"evaluate": {"limit": 1}}}, ALL),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_a_change_renames_what_it_changes(tmp_path, fields, which):
    assert changed(planned(tmp_path), planned(tmp_path, **fields)) == which


def test_what_is_learned_is_made_anew_where_the_library_s_defaults_have_changed(tmp_path, monkeypatch):
    from loralloy.weighting import adamerging, learned

    entropy = [*BASE["strategies"], {"kind": "entropy", "name": "e"}, {"kind": "grouped", "name": "g"}]
    before = planned(tmp_path, strategies=entropy)
    other = dataclasses.make_dataclass("Other", [("lr", float, 0.2)], bases=(learned.LearnConfig,), frozen=True)
    monkeypatch.setattr(learned, "LearnConfig", other)
    assert changed(before, planned(tmp_path, strategies=entropy)) == {"l", "g"}
    monkeypatch.setattr(adamerging, "CONFIG", dataclasses.replace(adamerging.CONFIG, steps=7))
    assert changed(before, planned(tmp_path, strategies=entropy)) == {"l", "g", "e"}
    monkeypatch.undo()
    assert changed(before, planned(tmp_path, strategies=entropy)) == set()
    monkeypatch.setattr(learned.config, "NOISE", 0.2)  # what "auto" is
    assert changed(before, planned(tmp_path, strategies=entropy)) == {"l", "g", "e"}


def test_without_unseen_domains_the_first_experience_is_another(tmp_path):
    one, two = planned(tmp_path), planned(tmp_path, evaluate={"unseen": False})
    a, b = keys(one), keys(two)
    assert all(a[name, 0] != b[name, 0] and a[name, 1] == b[name, 1] for name in ALL)


@pytest.mark.parametrize(("buffer", "same"), [({"per_class": 1}, True), ({"per_class": 2, "total": 3}, False)])
def test_a_bounded_buffer_makes_learning_depend_on_the_order(tmp_path, buffer, same):
    forward, backward = (planned(tmp_path, order, buffer=buffer) for order in (("red", "green"), ("green", "red")))
    last = [{run.strategy: run.steps[-1] for run in plan.runs} for plan in (forward, backward)]
    assert last[0]["f"] == last[1]["f"] and last[0]["joint"] == last[1]["joint"]
    assert (last[0]["l"] == last[1]["l"]) is same
    assert last[0]["sequential"] != last[1]["sequential"]


def test_one_adapter_as_it_is_is_evaluated_once_for_all_who_use_it(tmp_path):
    plan = planned(tmp_path)
    first = {run.strategy: run.steps[0] for run in plan.runs}
    assert first["joint"] == first["sequential"] != first["f"]


def test_stages_come_in_order_so_that_adapters_are_trained_when_their_domain_arrives(tmp_path):
    sizes = [len(step.arrived) for step in planned(tmp_path).steps.values() if step.strategy]
    assert sizes == sorted(sizes)
