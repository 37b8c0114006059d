"""Compositions of a Learnable one after the other: nested, interrupted, of two banks, and after it was taken out."""

from __future__ import annotations

import pytest
import torch

from helpers import close, logits, peft_folder, tiny_llama
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.live.learnable import Learnable

IDS = torch.arange(3, 27).reshape(3, 8)


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def bank(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("bank")
    for seed, (name, modules) in enumerate({"a": ["q_proj"], "b": ["q_proj", "up_proj"], "c": ["lm_head"]}.items()):
        peft_folder(base, root / name, seed + 1, target_modules=modules, r=3)
    return Bank.load(root)


def test_nesting_and_errors_restore(base, bank):
    live, plain = Learnable(base, bank, "ties"), logits(base, IDS)
    outer = torch.tensor([0.5, 0.4, 0.3])
    with live.at(outer) as model:
        want = logits(model, IDS)
        with live.at(outer * 2), live.at(None):
            assert torch.equal(logits(model, IDS), plain)
        with pytest.raises(RuntimeError, match="mine"), live.at(outer * 3):
            raise RuntimeError("mine")
        with (
            pytest.raises(LoralloyError, match=r"are \[2\]; give \[3\] for all modules or \[5, 3\]"),
            live.at(outer[:2]),
        ):
            pass
        assert torch.equal(logits(model, IDS), want)
    assert torch.equal(logits(base, IDS), plain)
    live.remove()


@pytest.mark.parametrize("rule", ["linear", "ties"])
def test_gradients_flow_on_after_a_look(rule, base, bank):
    """Something measured inside the block, without gradients, takes nothing from the way to the table."""
    live, w = Learnable(base, bank, rule), torch.tensor([0.5, -1.0, 0.8], requires_grad=True)
    with live.at(w) as model:
        with torch.no_grad(), live.at(w * 2):
            logits(model, IDS)
        model(input_ids=IDS).logits.square().sum().backward()
    assert w.grad is not None and bool((w.grad != 0).all())
    live.remove()


def test_an_interrupted_set_leaves_the_base(base, bank, monkeypatch):
    live, plain, w = Learnable(base, bank, "ties"), logits(base, IDS), torch.tensor([0.5, 0.4, 0.3])

    def stop(table):
        raise KeyboardInterrupt

    for outer in (None, w):
        with live.at(outer) as model:
            before = logits(model, IDS)
            with monkeypatch.context() as patch:
                patch.setattr(live._parts[3], "merge", stop)
                with pytest.raises(KeyboardInterrupt), live.at(w * 2):
                    pass
            assert torch.equal(logits(model, IDS), before)
    with monkeypatch.context() as patch:
        patch.setattr(live._parts[3], "merge", stop)
        with pytest.raises(KeyboardInterrupt):
            live.set(w)
    assert torch.equal(logits(base, IDS), plain)
    live.remove()


def test_two_in_one_model_take_turns(base, bank):
    one, two, w = Learnable(base, bank, "ties"), Learnable(base, bank, "linear"), torch.tensor([0.5, 0.4, 0.3])
    plain = logits(base, IDS)
    with one.at(w):
        want = logits(base, IDS)
        for table in (w, w.clone().requires_grad_()):
            with pytest.raises(LoralloyError, match="holds another composition already"), two.at(table):
                pass
        two.set(None)
        assert torch.equal(logits(base, IDS), want)
    with two.at(w):
        assert not torch.equal(logits(base, IDS), plain)
    two.remove()
    with one.at(w):
        assert torch.equal(logits(base, IDS), want)
        with one.at(w * 2):
            one.remove()
        assert torch.equal(logits(base, IDS), plain)
    for table in (w, w.clone().requires_grad_()):
        with pytest.raises(LoralloyError, match="make another Learnable"):
            one.set(table)
    assert torch.equal(logits(base, IDS), plain)


@pytest.mark.parametrize("rule", ["linear", "ties"])
def test_tables_with_and_without_gradients_replace_each_other(rule, base, bank):
    live, w = Learnable(base, bank, rule), torch.tensor([0.5, -1.0, 0.8])
    with live.at(w) as model:
        first = logits(model, IDS)
        with live.at((w * 2).requires_grad_()):
            second = model(input_ids=IDS).logits.detach()
            with live.at(w):
                assert torch.equal(logits(model, IDS), first)
            assert close(model(input_ids=IDS).logits.detach(), second) and not close(second, first, 1e-2)
        assert torch.equal(logits(model, IDS), first)
    live.remove()
