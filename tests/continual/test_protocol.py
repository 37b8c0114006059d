"""The protocol on a toy workshop: what is trained, shared, evaluated, kept, and what a kill leaves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from toy_stream import NAMES, ToyWorkshop, stream_of

from helpers import delta, relative
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.continual.plan import make_plan
from loralloy.continual.results import Results
from loralloy.continual.run import run
from loralloy.continual.workshop import Workshop, composed
from loralloy.errors import LoralloyError
from loralloy.merging import merge
from loralloy.weights import Weights

LINEAR = [{"rule": "linear", "space": "delta"}]
ALL = [
    {"kind": "fixed", "weight": [0.5, 1.0]},
    "uniform",
    {"kind": "learned", "steps": 20},
    {"kind": "entropy", "steps": 3, "unlabelled": 8},
    "regmean",
    {"kind": "grouped", "steps": 3, "groups": 2},
    "sequential",
    "joint",
    "oracle",
]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A stream of three domains in two orders, all strategies, already run."""
    stream = stream_of(
        tmp_path_factory.mktemp("done"), orders=2, merges=LINEAR, strategies=ALL, uncut=True, keep_merged=True
    )
    workshop = ToyWorkshop(stream)
    plan = run(stream, workshop)
    return stream, workshop, plan, Results.load(stream.out)


def test_the_toy_is_a_workshop(done):
    assert isinstance(done[1], Workshop)


def test_each_domain_is_trained_once_from_the_base_whatever_the_orders(done):
    _, workshop, _, _ = done
    own = [names for names in workshop.trained if len(names) == 1]
    # one each; what is trained again goes on from another (sequential), and differs by order
    assert all(own.count((name,)) >= 1 for name in NAMES)
    stream, _, plan, _ = done
    jobs = {job.key: job for step in plan.steps.values() for job in step.adapters}
    assert len([j for j in jobs.values() if len(j.domains) == 1 and j.init is None]) == 3
    assert len(workshop.trained) == len(jobs) == len(list((stream.out / "adapters").iterdir()))


def test_orders_share_the_state_of_a_set_and_end_alike(done):
    _, _, plan, results = done
    for strategy in ("fixed weight=0.5", "learned steps=20", "joint"):
        a, b = (r for r in plan.runs if r.strategy == strategy)
        assert a.order != b.order and a.steps[-1] == b.steps[-1]
        one, two = (r for r in results.runs if r.strategy == strategy)
        assert dict(zip(one.order, one.matrix[-1], strict=True)) == dict(zip(two.order, two.matrix[-1], strict=True))
    a, b = (r for r in plan.runs if r.strategy == "sequential")
    assert a.steps[-1] != b.steps[-1]
    a, b = (r for r in plan.runs if r.kind == "grouped")
    assert a.steps[-1] != b.steps[-1]  # groups depend on who came first


def test_what_is_evaluated_is_the_merge_as_written(done):
    stream, workshop, plan, _ = done
    for step in plan.steps.values():
        if step.merge is None or step.strategy.kind != "learned":
            continue
        folder = stream.out / "experiences" / step.key
        result = json.loads((folder / "result.json").read_text())
        bank = Bank([Adapter.load(stream.out / "adapters" / job.folder, job.domains[0]) for job in step.adapters])
        weights = Weights.load(folder / "weights.json")
        assert set(weights.names) == set(step.arrived)
        again = merge(bank, weights, "linear", "delta").adapter
        stored = Adapter.load(folder / "merged")
        assert relative(delta(stored)["first"], delta(again)["first"]) < 1e-6
        with composed(workshop, folder / "merged"):
            for name, score in result["domains"].items():
                correct = workshop.evaluate(workshop.experiences[name]).correct
                assert "".join("01"[c] for c in correct) == score["correct"]


def test_composed_puts_the_base_back(done):
    stream, workshop, plan, _ = done
    x = torch.randn(5, 6)
    before = workshop.model(x)
    folder = next((stream.out / "adapters").iterdir())
    with composed(workshop, folder):
        inside = workshop.model(x)
    f = Adapter.load(folder)["first"]
    want = workshop.model.second(torch.tanh(workshop.model.first(x) + x @ f.dense(torch.float32).T))
    assert torch.allclose(inside, want, atol=1e-5) and not torch.allclose(inside, before, atol=1e-3)
    assert torch.equal(workshop.model(x), before)
    assert plan.runs


def test_the_oracle_is_each_domains_own_adapter(done):
    stream, workshop, _, results = done
    run_ = next(r for r in results.runs if r.strategy == "oracle")
    for j, name in enumerate(run_.order):
        folder = next(p for p in (stream.out / "adapters").glob(f"{name}-seed0-*") if _fresh(done, p))
        with composed(workshop, folder):
            own = workshop.evaluate(workshop.experiences[name]).accuracy
        assert [row[j] for row in run_.matrix] == [None] * j + [own] * (len(NAMES) - j)
    assert run_.metrics.forgetting == 0 == run_.metrics.backward_transfer


def _fresh(done, path):
    jobs = {job.folder: job for step in done[2].steps.values() for job in step.adapters}
    return jobs[path.name].init is None


def test_without_a_cut_the_uncut_merge_is_as_good(done):
    """Two adapters of rank 2 fit rank "full" of linear in delta, so cut and uncut are one."""
    _, _, plan, results = done
    run_ = next(r for r in results.runs if r.strategy == "learned steps=20")
    assert run_.steps[-1]["rank"] == "full" and run_.steps[-1]["cut"] == pytest.approx(0, abs=1e-5)
    assert run_.uncut == pytest.approx(run_.metrics.final_accuracy, abs=1e-9)
    assert plan.runs


def test_coefficients_are_learned_and_kept(done):
    _, _, _, results = done
    run_ = next(r for r in results.runs if r.kind == "learned")
    assert [set(weights) for weights in run_.weights] == [set(run_.order[: t + 1]) for t in range(3)]
    record = run_.steps[-1]["record"]
    losses = [entry["loss"] for entry in record["history"]]
    assert min(losses) < losses[0]
    assert max(abs(w - record["start_scale"]) for w in run_.weights[-1].values()) > 0.05
    assert results.mean("", "joint").value > sum(run_.base) / 3 + 0.2


def test_a_second_run_computes_nothing(done):
    stream, _, plan, _ = done
    workshop = ToyWorkshop(stream)
    run(stream, workshop)
    assert workshop.trained == [] and workshop.evaluated == 0
    assert make_plan(stream, workshop).to_dict() == plan.to_dict()


def test_a_lost_experience_is_made_again_alike(done, tmp_path):
    stream, _, plan, _ = done
    key = next(k for k, step in plan.steps.items() if step.strategy and step.strategy.kind == "learned")
    folder = stream.out / "experiences" / key
    before = json.loads((folder / "result.json").read_text())
    shutil.rmtree(folder)
    run(stream, ToyWorkshop(stream))
    after = json.loads((folder / "result.json").read_text())
    for changing in ("seconds", "memory"):
        before.pop(changing), after.pop(changing)
    assert after == before
    assert tmp_path.is_dir()


def test_killed_in_training_the_same_call_goes_on(tmp_path):
    stream = stream_of(tmp_path, merges=LINEAR, strategies=[{"kind": "fixed", "weight": 1.0}])
    first = ToyWorkshop(stream)
    first.fail = "green"  # the second domain in name order of its step is trained, then Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        run(stream, first)
    kept = list((stream.out / "experiences").iterdir())
    assert kept and all((folder / "result.json").is_file() for folder in kept)
    times = {folder: (folder / "result.json").stat().st_mtime_ns for folder in kept}
    second = ToyWorkshop(stream)
    run(stream, second)
    assert ("red",) not in second.trained and sorted(second.trained) == [("blue",), ("green",)]
    assert {folder: (folder / "result.json").stat().st_mtime_ns for folder in kept} == times
    assert Results.load(stream.out).missing == 0


class Killed(BaseException):
    """As if the process had ended there."""


@pytest.mark.parametrize("calls", [1, 2, 5, 9])
def test_killed_anywhere_it_ends_as_if_it_had_not_been(tmp_path, monkeypatch, calls):
    """Each attempt is killed at its `calls`-th training, evaluation or finished folder, the next one step later."""
    from loralloy.continual import run as module

    strategies = [{"kind": "fixed", "weight": 1.0}, {"kind": "learned", "steps": 2}, "sequential"]
    streams = [stream_of(tmp_path / n, ("red", "green"), merges=LINEAR, strategies=strategies) for n in ("one", "two")]
    run(streams[0], ToyWorkshop(streams[0]))
    count, kills = 0, 0

    def step():
        nonlocal count
        count += 1
        if count == calls + kills:  # a little later each time, or a long experience would never end
            raise Killed

    for name in ("train", "evaluate"):
        good = getattr(ToyWorkshop, name)
        monkeypatch.setattr(ToyWorkshop, name, lambda self, *a, good=good, **k: (step(), good(self, *a, **k))[1])
    saved = module.MemoryBuffer.save
    monkeypatch.setattr(module.MemoryBuffer, "save", lambda *a, **k: (step(), saved(*a, **k), step())[1])
    while True:
        count = 0
        try:
            run(streams[1], ToyWorkshop(streams[1]))
            break
        except Killed:
            kills += 1
            assert kills < 60
    assert kills > 0
    one, two = (Results.load(stream.out) for stream in streams)
    assert [(r.strategy, r.matrix, r.weights) for r in two.runs] == [
        (r.strategy, r.matrix, r.weights) for r in one.runs
    ]
    for room in ("adapters", "buffers", "experiences"):
        assert {p.name for p in (streams[0].out / room).iterdir()} == {
            p.name for p in (streams[1].out / room).iterdir()
        }


def test_what_a_dead_process_left_is_removed(tmp_path):
    stream = stream_of(tmp_path, ("red", "green"), merges=LINEAR, strategies=["uniform"])
    left = stream.out / "experiences" / ".0123456789abcdef.new-999999999-abcd"
    left.mkdir(parents=True)
    run(stream, ToyWorkshop(stream))
    assert not left.exists()


def test_two_runs_on_one_folder_are_refused(tmp_path):
    from loralloy.training.lock import locked

    stream = stream_of(tmp_path, merges=LINEAR, strategies=["uniform"])
    with locked(stream.out), pytest.raises(LoralloyError, match="another run"):
        run(stream, ToyWorkshop(stream))


def test_a_failing_experience_leaves_the_others_alone(tmp_path):
    stream = stream_of(tmp_path, merges=LINEAR, strategies=["uniform", "joint"])
    workshop = ToyWorkshop(stream)
    good = workshop.train

    def train(experiences, out, seed, init=None):
        if len(experiences) > 1:
            raise LoralloyError("no joint training today")
        return good(experiences, out, seed, init)

    workshop.train = train
    with pytest.raises(LoralloyError, match=r"2 of 7 experiences failed.*no joint training today"):
        run(stream, workshop)
    results = Results.load(stream.out)
    assert (results.missing, [r.strategy for r in results.runs]) == (1, ["uniform"])


def test_a_changed_setting_computes_what_it_changes(tmp_path):
    fields = {"merges": LINEAR, "strategies": ["uniform", "joint"]}
    run(stream_of(tmp_path, **fields), ToyWorkshop(stream_of(tmp_path)))
    more = stream_of(tmp_path, **fields | {"strategies": ["uniform", "joint", {"kind": "fixed", "weight": 2.0}]})
    workshop = ToyWorkshop(more)
    run(more, workshop)
    assert workshop.trained == [] and workshop.evaluated == 3 * 3  # the new strategy's experiences alone
    other = ToyWorkshop(more)
    other.settings = {"evaluate": {"limit": 10}}
    run(more, other)
    assert other.trained == [] and other.evaluated > 9
    third = ToyWorkshop(more)
    third.settings = {"train": {"lr": 1}, "evaluate": {"limit": 10}}
    run(more, third)
    assert len(third.trained) == 5  # three domains, joint on two and on three


@pytest.mark.parametrize("head", [False, True])
def test_a_renamed_experience_is_not_taken_for_the_old_one(tmp_path, monkeypatch, head):
    """What is on disk is written by domain: buffers and results of the old name are of no use to the new."""
    monkeypatch.setattr(ToyWorkshop, "fingerprint", lambda self, e: e.domain)
    data = ToyWorkshop.data
    monkeypatch.setattr(ToyWorkshop, "data", lambda self, e, split: data(self, replace(e, name=e.domain), split))
    fields = {"merges": LINEAR, "strategies": [{"kind": "learned", "steps": 2}, "oracle"]}
    run(s := stream_of(tmp_path, ("red", "green"), **fields), ToyWorkshop(s, remembers=head))
    fields["experiences"] = [{"name": "red"}, {"name": "verde", "domain": "green"}]
    run(s := stream_of(tmp_path, **fields), ToyWorkshop(s, remembers=head))
    results = Results.load(s.out)
    learned = next(r for r in results.runs if r.kind == "learned")
    assert results.missing == 0 and learned.order == ("red", "verde")
    assert all(None not in r.matrix[1] for r in results.runs) and set(learned.weights[1]) == {"red", "verde"}


def test_a_head_learned_on_the_first_domain_makes_adapters_of_an_order(tmp_path):
    stream = stream_of(tmp_path, ("red", "green"), orders=2, merges=LINEAR, strategies=["uniform"])
    workshop = ToyWorkshop(stream, leads=True)
    plan = run(stream, workshop)
    assert sorted(workshop.trained) == [("green",), ("green",), ("red",), ("red",)]
    a, b = plan.runs
    assert a.steps[-1] != b.steps[-1]
    assert workshop.begun is not None and workshop.begun[1] is not None


def test_prototypes_are_given_the_buffer_by_every_strategy(tmp_path):
    stream = stream_of(tmp_path, ("red", "green"), merges=LINEAR, strategies=["uniform", "joint"])
    workshop = ToyWorkshop(stream, remembers=True)
    run(stream, workshop)
    assert set(workshop.given) == {2, 4}  # one row a class and domain


def test_after_last_merges_once(tmp_path):
    stream = stream_of(tmp_path, merges=LINEAR, strategies=["uniform"], after="last")
    plan = run(stream, ToyWorkshop(stream))
    assert [len(keys) for keys in plan.runs[0].steps] == [0, 0, 1]
    assert not list((stream.out / "experiences").glob("*/merged"))  # unless keep_merged asks for them
    run_ = Results.load(stream.out).runs[0]
    assert run_.matrix[0] == (None,) * 3 and run_.metrics.final_accuracy > 0.3
    assert run_.metrics.to_dict()["forgetting"] is None


def test_a_rule_that_cannot_be_learned_through_is_said_before_any_work(tmp_path):
    stream = stream_of(tmp_path, merges=["tsv_m"], strategies=["learned"])
    workshop = ToyWorkshop(stream)
    with pytest.raises(LoralloyError, match=r"'learned' cannot be run with merge 'tsv_m delta'.*`only`"):
        run(stream, workshop)
    assert workshop.trained == []
