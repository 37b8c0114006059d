"""Answers that are not all drawn to one side: the shift, what is folded into an adapter, and what stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import generator, peft_folder, tiny_llama
from loralloy.adapter import Adapter
from loralloy.errors import LoralloyError
from loralloy.factors import truncate
from loralloy.live.merged_rows import MergedRows
from loralloy.weighting.balance import balance, shift

LABELS = (5, 9, 17)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(2, 6), st.integers(0, 10**6))
def test_a_shift_is_centred_and_what_is_added_to_all_inputs_is_found(rows, answers, seed):
    g = generator(seed)
    logits, added = torch.randn(rows, answers, generator=g).double(), torch.randn(answers, generator=g).double()
    plain, moved = shift(logits), shift(logits + added)
    assert float(plain.sum()) == pytest.approx(0, abs=1e-9)
    assert torch.allclose(moved - plain, added - added.mean())
    assert torch.allclose(shift(logits.log_softmax(1)), plain)  # the normaliser is of the input, not of the answer


def test_answers_that_cannot_be_compared():
    with pytest.raises(LoralloyError, match="at least two inputs and two answers"):
        shift(torch.zeros(1, 3))
    with pytest.raises(LoralloyError, match="not numbers"):
        shift(torch.tensor([[0.0, float("nan")], [0.0, 1.0]]))


class World:
    """A tiny Llama whose head strongly prefers one token, prompts, and an adapter of every module."""

    def __init__(self, tmp_path: Path, rank: int = 3, targets: str | list[str] = "all-linear") -> None:
        self.model = tiny_llama()
        self.adapter = Adapter.load(peft_folder(tiny_llama(), tmp_path / "a", target_modules=targets, r=rank))
        self.ids = torch.randint(3, 40, (12, 6), generator=generator(4))
        self.ids[:, -2:] = torch.tensor([7, 3])  # the cue

    def logp(self) -> torch.Tensor:
        with torch.no_grad():
            found = self.model(input_ids=self.ids).logits[:, -1, list(LABELS)]
        found = found + torch.tensor([0.2, 0.0, -0.1])  # what no adapter did
        return found.log_softmax(1)

    @property
    def directions(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight[list(LABELS)].detach()

    def under(self, adapter: Adapter) -> torch.Tensor:
        rows = MergedRows(self.model)
        try:
            with torch.no_grad(), rows.use([adapter], [0]):
                return self.logp()
        finally:
            rows.remove()


def test_the_shift_is_gone(tmp_path):
    world = World(tmp_path, rank=12)
    before = world.under(world.adapter)
    steps = []
    done = balance(
        world.model,
        world.adapter,
        world.logp,
        world.directions,
        passes=20,
        enough=1e-3,
        on_pass=lambda: steps.append(1),
    )
    after = world.under(done.adapter)
    assert done.before == pytest.approx(float(shift(before).abs().max()), rel=1e-5)
    assert done.after == pytest.approx(float(shift(after).abs().max()), abs=1e-5)
    assert done.after <= 0.1 * done.before
    assert len(steps) == done.passes
    assert done.module == "model.layers.1.mlp.down_proj"


def test_one_module_changes_by_its_last_direction_and_one_more(tmp_path):
    world = World(tmp_path)
    done = balance(world.model, world.adapter, world.logp, world.directions)
    for module in world.adapter:
        if module != done.module:
            assert done.adapter[module] is world.adapter[module] or torch.equal(
                done.adapter[module].dense(), world.adapter[module].dense()
            )
    was, now = world.adapter[done.module], done.adapter[done.module]
    assert now.rank == was.rank and now.A.dtype == was.A.dtype
    added = now.dense() - truncate(was, was.rank - 1)[0].dense()
    values = torch.linalg.svdvals(added)
    assert values[1] < 1e-4 * values[0]  # of rank one
    spread = (world.directions - world.directions.mean(0)).double()
    u = torch.linalg.svd(added).U[:, 0]
    held = torch.linalg.lstsq(spread.mT, u[:, None]).solution
    assert torch.allclose(spread.mT @ held, u[:, None], atol=1e-4)  # it writes in the answers' directions alone
    given = []
    hook = world.model.get_submodule(done.module).register_forward_pre_hook(
        lambda _, args: given.append(args[0][:, -1])
    )
    world.under(world.adapter)
    hook.remove()
    mean = given[0].double().mean(0)
    want = torch.outer(added @ mean, mean) / mean.square().sum()  # u v^T with v = mean / ||mean||^2
    assert float((added - want).norm()) < 1e-4 * float(added.norm())


def test_what_is_balanced_is_left_alone(tmp_path):
    world = World(tmp_path)
    done = balance(world.model, world.adapter, world.logp, world.directions, enough=9.0)
    assert done.adapter is world.adapter and done.passes == 1 and done.before == done.after


def test_the_model_is_left_as_it_was(tmp_path):
    world = World(tmp_path)
    plain = world.logp()
    balance(world.model, world.adapter, world.logp, world.directions)
    assert torch.equal(world.logp(), plain)
    assert not any(m._forward_hooks for m in world.model.modules())


def test_it_survives_saving(tmp_path):
    world = World(tmp_path)
    done = balance(world.model, world.adapter, world.logp, world.directions)
    done.adapter.save(tmp_path / "out")
    assert torch.allclose(world.under(Adapter.load(tmp_path / "out")), world.under(done.adapter), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_sixteen_bits_what_is_stored_is_what_was_measured(tmp_path, dtype):
    world = World(tmp_path)
    held = world.adapter
    parts = {m: held[m].to(dtype) for m in held}
    done = balance(world.model, Adapter("a", parts, held.config, held.base), world.logp, world.directions, enough=1e-4)
    done.adapter.save(tmp_path / "out")
    stored = Adapter.load(tmp_path / "out")
    assert stored[done.module].A.dtype == dtype
    assert float(shift(world.under(stored)).abs().max()) == pytest.approx(done.after, abs=1e-4)
    assert done.after < 0.3 * done.before


def test_no_step_is_longer_than_what_the_module_answers_itself(tmp_path):
    """Answers that hardly move would else ask for any length; what was best by then comes back."""
    world = World(tmp_path)
    fixed = torch.randn(12, 3, generator=generator(6))
    own = []
    target = world.model.get_submodule("model.layers.1.mlp.down_proj")
    hook = target.register_forward_hook(lambda _, args, out: own.append((args[0][:, -1], out[:, -1])))
    world.logp()  # the plain base's answer; the input under the adapter differs a little
    hook.remove()
    done = balance(world.model, world.adapter, lambda: fixed + 1e-3 * world.logp(), world.directions, passes=4)
    was = world.adapter[done.module]
    added = done.adapter[done.module].dense() - truncate(was, was.rank - 1)[0].dense()
    written = float((added @ own[0][0].double().mean(0)).norm())
    assert 0 < written < 3.5 * float(own[0][1].norm(dim=-1).mean())
    assert done.after < done.before


def test_a_step_too_far_keeps_what_was_found_before(tmp_path):
    """And where nothing was found before, the reason is told; hooks go in either case."""
    world, calls = World(tmp_path), []

    def answers(good):
        calls.append(1)
        return world.logp() if len(calls) <= good else torch.full((12, 3), float("nan"))

    done = balance(world.model, world.adapter, lambda: answers(2), world.directions, enough=1e-6)
    assert done.after < done.before and done.passes == 2
    assert float(shift(world.under(done.adapter)).abs().max()) == pytest.approx(done.after, abs=1e-5)
    calls.clear()
    with pytest.raises(LoralloyError, match=r"evens the answers out \(the answers are not numbers"):
        balance(world.model, world.adapter, lambda: answers(1), world.directions)
    calls.clear()
    with pytest.raises(LoralloyError, match=r"^the answers are not numbers"):
        balance(world.model, world.adapter, lambda: answers(0), world.directions)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in world.model.modules())


def test_refusals(tmp_path):
    world = World(tmp_path)
    with pytest.raises(LoralloyError, match="begin with the same token"):
        balance(world.model, world.adapter, world.logp, world.directions[:1].repeat(3, 1))
    with pytest.raises(LoralloyError, match="begin with the same token"):  # two of the three
        balance(world.model, world.adapter, world.logp, world.directions[[0, 1, 0]])
    with pytest.raises(LoralloyError, match="3 answers and 2 directions"):
        balance(world.model, world.adapter, world.logp, world.directions[:2])
    line = (
        torch.tensor([[0.0], [1.0], [2.0]]) * world.directions[:1]
    )  # one direction, and a shift that it has no part in
    with pytest.raises(LoralloyError, match="no sum of the answers' directions"):
        rows = torch.tensor([1.0, -2.0, 1.0]) + torch.zeros(12, 3)
        balance(world.model, world.adapter, lambda: (world.logp(), rows)[1], line)
    silent = World(tmp_path / "silent")
    silent.model.model.layers[1].mlp.down_proj.weight.data.zero_()
    with pytest.raises(LoralloyError, match="answers zeros alone"):
        balance(silent.model, silent.adapter, silent.logp, silent.directions)
    with pytest.raises(LoralloyError, match="1 passes: the first only looks"):
        balance(world.model, world.adapter, world.logp, world.directions, passes=1)
    with pytest.raises(LoralloyError, match="no linear module that writes 31 numbers"):
        balance(world.model, world.adapter, world.logp, torch.randn(3, 31))
    with pytest.raises(LoralloyError, match="without a run of module"):
        fixed = world.logp().detach()
        balance(world.model, world.adapter, lambda: fixed, world.directions)
    with pytest.raises(LoralloyError, match=r"nothing that is written at module .* evens the answers out"):
        balance(world.model, world.adapter, lambda: (world.logp(), fixed)[1], world.directions)
    thin = World(tmp_path / "thin", rank=1)
    with pytest.raises(LoralloyError, match="rank 1: there is no room"):
        balance(thin.model, thin.adapter, thin.logp, thin.directions)
