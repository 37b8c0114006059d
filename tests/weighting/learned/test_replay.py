"""Recorded steps: what is replayed is what was computed; and when a step is recorded at all."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

import tiny

from helpers import PROJECTIONS, peft_folder
from loralloy.bank import Bank
from loralloy.live.base import load_base
from loralloy.live.learnable import Learnable
from loralloy.tasks.task import Example
from loralloy.weighting.learned import LearnConfig, TextObjective, learn, replay

CONFIG = LearnConfig(steps=14, hold_out=0.0, start="zero", lr=0.2)


def example(n, prompt, answer, options, task):
    return Example(f"{task}/train/{n}", task, prompt, prompt, prompt, answer, options)


EXAMPLES = [
    example(n, f"{'long ' * (n % 3)}prompt number {n}:", ("yes", "no")[n % 2], ("yes", "no"), f"t{n % 2}")
    for n in range(6)
] + [example(6, "one of three:", "b", ("a", "b", "a longer one"), "t0"), example(7, "write", "some words", (), "t1")]


def setting(folder, device):
    model, tokenizer = load_base(str(tiny.save_model(folder / "llama")), "float32", device)
    for seed, name in enumerate("ab"):
        peft_folder(model, folder / "bank" / name, seed, target_modules=PROJECTIONS, r=2)
    return model, Bank.load(folder / "bank"), TextObjective(model, tokenizer, EXAMPLES)


class Fake:
    """Stands for a graph: what it would have recorded is computed when it is replayed."""

    made: ClassVar[list[str]] = []

    def __init__(self, live, part, table, gradient, pool, inputs):
        assert inputs[0] is not None
        self.work = lambda t: replay._once(live, part, t, gradient)
        Fake.made.append("gradient" if gradient else "loss")

    def run(self, table):
        return self.work(table)


@pytest.fixture
def recorded(monkeypatch):
    """Recording, as on a GPU."""
    Fake.made = []
    monkeypatch.setattr(replay, "_Recording", Fake)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    given = replay.Steps.__init__

    def init(self, live, record):
        given(self, live, record)
        self.record = record

    monkeypatch.setattr(replay.Steps, "__init__", init)


def run(model, bank, objective, config, **more):
    return learn(model, bank, objective, config=config, progress=False, **more)


def test_a_gpu_alone_records(tmp_path):
    assert run(*setting(tmp_path, "cpu"), CONFIG).settings["replayed"] == 0


@pytest.mark.parametrize("at_once", [3, 32])
def test_steps_after_the_third_are_replayed(tmp_path, recorded, at_once):
    """Steps 1 and 2 run as they are (and 0, which sees rows as no later step does); 3 to 13 do not."""
    given = setting(tmp_path, "cpu")
    config = dataclasses.replace(CONFIG, rows_at_once=at_once)
    done = run(*given, config)
    parts = 3 if at_once == 3 else 1
    assert Fake.made == ["gradient"] * parts and done.settings["replayed"] == 11 * parts
    plain = run(*given, dataclasses.replace(config, replay=False))
    assert plain.settings["replayed"] == 0
    assert dict(done.weights.items()) == dict(plain.weights.items())


def test_held_out_rows_are_replayed_too(tmp_path, recorded):
    done = run(*setting(tmp_path, "cpu"), dataclasses.replace(CONFIG, hold_out=0.5, patience=100))
    assert sorted(Fake.made) == ["gradient", "loss"]
    assert done.settings["replayed"] == 11 + 13  # held-out rows are never augmented: steps 0 and 1 are before them


def test_changing_batches_and_few_steps_are_not_recorded(tmp_path, recorded):
    given = setting(tmp_path, "cpu")
    assert run(*given, dataclasses.replace(CONFIG, batch_size=3)).settings["replayed"] == 0
    assert run(*given, dataclasses.replace(CONFIG, steps=6)).settings["replayed"] == 0


def test_an_objective_that_says_nothing_of_it_is_not_recorded(tmp_path, recorded):
    model, bank, objective = setting(tmp_path, "cpu")

    class Plain:
        model, size, strata = objective.model, objective.size, objective.strata

        def loss(self, rows, step=0):
            return objective.loss(rows, step)

    assert run(model, bank, Plain(), CONFIG).settings["replayed"] == 0


def test_a_failed_recording_changes_nothing(tmp_path, recorded, monkeypatch):
    given = setting(tmp_path, "cpu")

    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "_Recording", fails)
    done = run(*given, CONFIG)
    plain = run(*given, dataclasses.replace(CONFIG, replay=False))
    assert done.settings["replayed"] == 0 and dict(done.weights.items()) == dict(plain.weights.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "rule, space", [("linear", "delta"), ("ties", "delta"), ("ties", "factors"), ("dare_ties", "delta")]
)
def test_on_a_gpu_a_recording_gives_what_the_steps_give(tmp_path, rule, space):
    given = setting(tmp_path, "cuda")
    for config in (CONFIG, dataclasses.replace(CONFIG, rows_at_once=3), dataclasses.replace(CONFIG, hold_out=0.5)):
        done = run(*given, config, rule=rule, space=space, granularity="layer")
        plain = run(*given, dataclasses.replace(config, replay=False), rule=rule, space=space, granularity="layer")
        assert done.settings["replayed"] > 0 and plain.settings["replayed"] == 0
        for name in "ab":
            a, b = done.weights[name], plain.weights[name]
            assert a == pytest.approx(b, abs=1e-4)
    live = Learnable(*given[:2], rule, space)  # nothing of it is left in the model
    live.remove()


def test_when_one_part_cannot_be_recorded_none_is(tmp_path, recorded, monkeypatch):
    """What is replayed must be fed before each step, and nothing is fed any more once recording has stopped."""
    given, made = setting(tmp_path, "cpu"), []

    class Second(Fake):
        def __init__(self, *arguments):
            made.append(1)
            if len(made) == 2:
                raise RuntimeError("out of memory")
            super().__init__(*arguments)

    monkeypatch.setattr(replay, "_Recording", Second)
    done = run(*given, dataclasses.replace(CONFIG, rows_at_once=3))
    assert len(made) == 2 and done.settings["replayed"] == 1


def test_a_recording_keeps_what_it_reads(tmp_path, recorded, monkeypatch):
    """With batches that change, an objective lets go of rows; those of a recording must live on."""
    from loralloy.weighting.learned import objective as objectives

    given, kept = setting(tmp_path, "cpu"), []

    class Keeps(Fake):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            kept.append(arguments[-1][0])

    monkeypatch.setattr(replay, "_Recording", Keeps)
    monkeypatch.setattr(objectives, "_KEPT", 1)
    run(*given, dataclasses.replace(CONFIG, batch_size=2, hold_out=0.5, steps=30, patience=100))
    assert kept and all(isinstance(one, objectives._Batch) for one in kept)
    assert any(one is not held for one in kept for held in given[2]._batches.values())
