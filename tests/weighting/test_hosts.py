"""Where a balance goes: by width, name, rank and run; what is read there; and what is refused before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import adapter, factors, generator, peft_folder, tiny_gpt2, tiny_llama
from loralloy.adapter import Adapter
from loralloy.errors import LoralloyError
from loralloy.weighting.balance import balance
from loralloy.weighting.gating import Gate
from loralloy.weighting.hosts import Reading, hosts
from loralloy.weighting.tada import compose


class Named(nn.Module):
    """Layers of one width under given names."""

    def __init__(self, names: list[str], width: int = 8) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(width, width))


def square(names: list[str], ranks: dict[str, int] | None = None) -> Adapter:
    return adapter({n: factors(8, 8, (ranks or {}).get(n, 3), seed=i) for i, n in enumerate(names)})


INNER = [
    "q_proj",
    "k_proj",
    "v_proj",
    "query",
    "key",
    "value",
    "query_key_value",
    "qkv",
    "Wqkv",
    "q_lin",
    "v_lin",
    "to_k",
    "v",
]
OUTER = ["o_proj", "down_proj", "dense", "fc2", "c_proj", "wo", "out_lin", "to_out", "dense_4h_to_h", "w2"]


def test_what_is_as_wide_as_the_residual_stream_and_not_written_to_it():
    names = OUTER + INNER
    assert hosts(Named(names), square(names), 8) == OUTER
    with pytest.raises(LoralloyError, match=r"no linear module that writes 8 .*leave the balance out"):
        hosts(Named(INNER), square(INNER), 8)
    assert hosts(Named(INNER), square(INNER), 8, "v_proj") == ["v_proj"]  # who names it means it


def test_a_module_of_rank_one_has_no_room_and_another_may():
    names = ["o_proj", "down_proj"]
    assert hosts(Named(names), square(names, {"down_proj": 1}), 8) == ["o_proj"]
    thin = square(names, dict.fromkeys(names, 1))
    with pytest.raises(LoralloyError, match=r"rank 1: there is no room .* \(--rank\)"):
        hosts(Named(names), thin, 8)
    assert hosts(Named(names), thin, 8, least=1) == names


def test_a_name_that_is_not_there():
    with pytest.raises(LoralloyError, match="called 'nowhere'"):
        hosts(Named(["fc2"]), square(["fc2"]), 8, "nowhere")


def test_gpt2s_transposed_layers(tmp_path):
    found = Adapter.load(peft_folder(tiny_gpt2(), tmp_path / "a", target_modules=["c_attn", "c_proj", "c_fc"], r=2))
    assert hosts(tiny_gpt2(), found, 16)[-1] == "transformer.h.1.mlp.c_proj"


class Odd(nn.Module):
    """Registers its layers in another order than it runs them, pools one token, and has a tower that it never runs."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("late", "early", "pooler", "tower"):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.late(x + self.early(x))
        return self.pooler(x[:, 0])


def test_the_last_to_run_and_not_the_last_by_name():
    model, x = Odd(), torch.randn(5, 3, 8, generator=generator(0))
    names = hosts(model, square(["late", "early", "pooler", "tower"]), 8)
    with torch.no_grad(), Reading(model, names, -1) as seen:
        model(x[:2])
        model(x[2:])
    assert seen.last == "late"
    mean, size = seen.of("late")
    with torch.no_grad():
        given = x + model.early(x)
        assert torch.allclose(mean, given[:, -1].mean(0).double(), atol=1e-6)
        assert size == pytest.approx(float(model.late(given)[:, -1].norm(dim=-1).mean()), rel=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_tokens_of_an_answer_that_run_over_the_cache_are_not_read():
    """Else the mean input of labels of several tokens would be that of the labels."""
    from transformers import DynamicCache

    model, name = tiny_llama(), "model.layers.1.mlp.down_proj"
    ids = torch.randint(3, 40, (4, 6), generator=generator(1))
    with torch.no_grad():
        with Reading(model, [name], -1) as alone:
            model(input_ids=ids)
        with Reading(model, [name], -1) as both:
            cache = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
            model(input_ids=ids[:, :2], past_key_values=cache, use_cache=True)
    assert torch.allclose(both.of(name)[0], alone.of(name)[0], atol=1e-6)
    assert both.of(name)[1] == pytest.approx(alone.of(name)[1], rel=1e-5)


def test_what_was_saved_whole_is_not_what_the_model_is_asked_with(tmp_path):
    model = tiny_llama()
    plain = Adapter.load(peft_folder(tiny_llama(), tmp_path / "a", target_modules=["down_proj"], r=2))
    parts = {m: plain[m] for m in plain}
    head = model.lm_head.weight.detach()

    def ask(extra):
        held = adapter(parts, extra={"lm_head.weight": extra})
        rows = torch.randn(4, 2, generator=generator(0))
        return balance(model, held, lambda: rows, head[:2], enough=9.0)

    with pytest.raises(LoralloyError, match=r"saved 'lm_head.weight' whole \(modules_to_save\)"):
        ask(head + 1)
    assert ask(head.clone()).passes == 1


def never():
    raise AssertionError("the probe was begun")
    yield


@pytest.mark.parametrize(
    ("targets", "options", "said"),
    [
        (["q_proj", "v_proj"], {}, "no linear module that writes 32 numbers"),
        (["down_proj"], {"rank": 1}, "the merge has rank 1"),
        (["down_proj"], {"common": -1}, "-1 of 'domain'; give a number of 0 or more"),
        (["down_proj"], {"common_of": "task"}, "of 'all' or 'domain'"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(tmp_path: Path, targets, options, said):
    paths = [peft_folder(tiny_llama(), tmp_path / n, target_modules=targets, r=2, seed=i) for i, n in enumerate("ab")]
    with pytest.raises(LoralloyError, match=said):
        compose(
            paths, tiny_llama(), never(), gate=Gate(kind="uniform"), answers=lambda: torch.zeros(2, 2), levels=(),
            directions=torch.randn(2, 32, generator=generator(0)), **options,
        )  # fmt: skip


def test_a_balance_that_fails_after_the_merge_leaves_the_disk_as_it_was(tmp_path: Path):
    paths = [
        peft_folder(tiny_llama(), tmp_path / n, target_modules=["down_proj"], r=2, seed=i) for i, n in enumerate("ab")
    ]
    out, model = tmp_path / "out", tiny_llama()
    shutil.copytree(paths[0], out)
    was = {f.name: f.read_bytes() for f in out.iterdir()}
    fixed = torch.randn(4, 2, generator=generator(3)).log_softmax(1)

    def answers():
        model(input_ids=torch.randint(3, 40, (4, 6), generator=generator(1)))
        return fixed

    with pytest.raises(LoralloyError, match=r"balance: nothing that is written at module .* leave the balance out"):
        compose(
            paths, model, [{"input_ids": torch.randint(3, 40, (4, 6), generator=generator(2))}], out, overwrite=True,
            gate=Gate(kind="uniform"), answers=answers, levels=(), directions=torch.randn(2, 32, generator=generator(0)),
        )  # fmt: skip
    assert {f.name: f.read_bytes() for f in out.iterdir()} == was
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "b", "out"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
