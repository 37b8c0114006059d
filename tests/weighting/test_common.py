"""What all inputs have in common: the sketch against dense eigenvectors, freed adapters, and `compose` with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import adapter, factors, generator, peft_folder, tiny_llama
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.recipe import Recipe
from loralloy.weighting.common import Common, Sketch, freed, freed_bank, taken
from loralloy.weighting.gating import Gate
from loralloy.weighting.probed import probe
from loralloy.weighting.tada import compose


def inputs(tokens: int, width: int, strong: int = 2, seed: int = 0) -> torch.Tensor:
    """Tokens with a few directions that all of them share."""
    g = generator(seed)
    shared = torch.randn(strong, width, generator=g)
    return torch.randn(tokens, width, generator=g) + (3 + torch.rand(tokens, strong, generator=g)) @ shared


def dense_moment(x: torch.Tensor) -> torch.Tensor:
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    return unit.mT @ unit / len(x)


def sketched(x: torch.Tensor, count: int, parts: int = 3) -> Common:
    sketch = Sketch(x.shape[1], count, torch.device("cpu"))
    for part in x.tensor_split(parts):
        sketch.add(part)
    return sketch.common()


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 60), st.integers(4, 24), st.integers(1, 3), st.integers(0, 10**6))
def test_directions_hold_the_energy_that_dense_eigenvectors_hold(tokens, width, count, seed):
    x = inputs(tokens, width, seed=seed)
    moment = dense_moment(x)
    best = torch.linalg.eigvalsh(moment).flip(0)
    found = sketched(x, count)
    q = found.directions.double()
    assert torch.allclose(q.mT @ q, torch.eye(q.shape[1], dtype=torch.float64), atol=1e-5)
    held = (q.mT @ moment @ q).trace()
    assert held <= best[: q.shape[1]].sum() + 1e-5
    assert held >= 0.97 * best[:count].sum()
    if width <= count + 8:  # the sketch is the moment itself
        assert torch.allclose(found.energy.double(), best[:count], atol=1e-4)


def test_directions_are_told_from_a_long_tail():
    """A few shared directions over a tail that falls slowly, as a language model's modules are given."""
    g = generator(0)
    spectrum = torch.cat([torch.tensor([0.3, 0.06, 0.04, 0.03]), 0.2 / torch.arange(20, 528).float()]).sqrt()
    basis = torch.linalg.qr(torch.randn(512, 512, generator=g)).Q
    x = (torch.randn(700, 512, generator=g) * spectrum) @ basis.mT
    q, moment = sketched(x, 4).directions.double(), dense_moment(x)
    assert (q.mT @ moment @ q).trace() > 0.97 * torch.linalg.eigvalsh(moment)[-4:].sum()
    for massive in (torch.float16, torch.bfloat16):
        much = x.clone()
        much[::9, 7] = 3e4
        much = much.to(massive)
        q, moment = sketched(much, 2).directions.double(), dense_moment(much)
        assert (q.mT @ moment @ q).trace() > 0.95 * torch.linalg.eigvalsh(moment)[-2:].sum()


def test_inputs_of_few_directions_have_no_more_than_those():
    x = torch.randn(30, 2, generator=generator(0)) @ torch.randn(2, 12, generator=generator(1))
    found = sketched(x, 5)
    assert found.directions.shape == (12, 2)
    assert float(found.energy.sum()) == pytest.approx(1.0, abs=1e-4)
    nothing = sketched(torch.zeros(4, 6), 3)
    assert nothing.directions.shape == (6, 0)


def test_size_of_a_token_does_not_matter_and_order_neither():
    x = inputs(40, 10)
    one, other = sketched(x, 2), sketched((x * torch.rand(40, 1, generator=generator(3)).add(0.1)).flip(0), 2)
    assert torch.allclose(one.directions @ one.directions.mT, other.directions @ other.directions.mT, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(5, 12), st.integers(1, 3), st.floats(0.1, 5), st.integers(0, 10**6))
def test_a_freed_adapter_answers_to_nothing_common_and_to_the_rest_as_before(rank, width, count, scaling, seed):
    f = replace(factors(7, width, rank, seed=seed), scaling=scaling)
    found = sketched(inputs(50, width, seed=seed), count)
    q = found.directions.double()
    g = freed(f, found)
    assert (g.rank, g.A.dtype, g.scaling) == (f.rank, f.A.dtype, f.scaling)
    want = f.dense() @ (torch.eye(width, dtype=torch.float64) - q @ q.mT)
    assert torch.allclose(g.dense(), want, atol=1e-4 * float(f.dense().norm()))
    again = freed(g, found)
    assert torch.allclose(again.dense(), g.dense(), atol=1e-4 * float(f.dense().norm()))


def test_gauge_changes_nothing():
    f = factors(6, 9, 3)
    found = sketched(inputs(50, 9), 2)
    gauge = torch.randn(3, 3, generator=generator(5)) + 3 * torch.eye(3)
    other = replace(f, A=gauge @ f.A, B=f.B @ torch.linalg.inv(gauge))
    assert torch.allclose(freed(f, found).dense(), freed(other, found).dense(), atol=1e-4)


def test_other_kinds_stay_and_wrong_widths_are_named():
    found = sketched(inputs(50, 9), 2)
    embedding = replace(factors(6, 9, 3), kind="embedding")
    assert freed(embedding, found) is embedding
    with pytest.raises(LoralloyError, match="9 inputs and the module has 8"):
        freed(factors(6, 8, 3), found)


def bank() -> Bank:
    return Bank([adapter({"m": factors(6, 9, 3)}, "task"), adapter({"m": factors(6, 9, 2, seed=1)}, "domain")])


def test_a_bank_is_freed_by_name():
    found = {"m": sketched(inputs(50, 9), 4)}
    whole = bank()
    made = freed_bank(whole, found, 2, ["domain"])
    assert made["task"] is whole["task"]
    assert torch.equal(made["domain"]["m"].dense(), freed(whole["domain"]["m"], found["m"].leading(2)).dense())
    lost = taken(whole, made)
    q = found["m"].directions[:, :2].double()
    dense = whole["domain"]["m"].dense()
    assert lost["task"] == 0
    assert lost["domain"] == pytest.approx(float((dense @ q).norm() ** 2 / dense.norm() ** 2), rel=1e-3)
    with pytest.raises(LoralloyError, match="no adapter 'other' to free; the bank has task, domain"):
        freed_bank(whole, found, 2, ["other"])
    with pytest.raises(LoralloyError, match="-1 common directions"):
        freed_bank(whole, found, -1)


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 40, (4, 7), generator=generator(2))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:], "attention_mask": mask[2:]}]


def test_the_probe_reads_what_the_modules_are_given_without_padding(tmp_path: Path):
    model = tiny_llama()
    folder = peft_folder(tiny_llama(), tmp_path / "a", target_modules=["q_proj", "down_proj"], r=2)
    held = Bank([Adapter.load(folder)])
    name = next(m for m in held.modules if m.endswith("down_proj"))
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    readings = probe(model, held, batches(), common=2)
    handle.remove()
    real = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, batches(), strict=True)])
    want, got = sketched(real, 2, parts=1), readings.common[name]
    assert torch.allclose(got.directions @ got.directions.mT, want.directions @ want.directions.mT, atol=1e-4)
    assert torch.allclose(got.energy, want.energy, atol=1e-5)
    assert set(readings.common) == set(held.modules)
    assert not probe(model, held, batches()).common


def two(tmp_path: Path) -> list[Path]:
    return [
        peft_folder(tiny_llama(), tmp_path / name, target_modules=["q_proj", "down_proj"], r=2, seed=seed)
        for seed, name in enumerate(("task", "domain"))
    ]


@pytest.mark.parametrize("which", ["all", "domain"])
def test_compose_merges_freed_adapters_and_its_recipe_repeats_it(tmp_path: Path, which):
    paths = two(tmp_path)
    gate = Gate(kind="uniform")
    out = tmp_path / "out"
    done = compose(paths, tiny_llama(), batches(), out, gate=gate, common=2, common_of=which, rank="full")
    held = Bank.load([str(p) for p in paths])
    common = probe(tiny_llama(), held, batches(), common=2).common
    parts = freed_bank(held, common, 2, None if which == "all" else ["domain"])
    stored = Adapter.load(out)
    for module in held.modules:
        want = sum(parts[n][module].dense() for n in parts.names)
        assert torch.allclose(stored[module].dense(), want, atol=1e-5)
    assert set(done.freed) == set(held.names if which == "all" else held.names[1:])
    assert all(0 < share < 1 for share in done.freed.values())
    assert not done.conflicts and not any("no recipe.yaml is written" in note for note in done.notes)
    job = Recipe.load(out / "recipe.yaml").prepare()
    assert set(job.freed) == set(done.freed) and job.merge().adapter.content_hash == stored.content_hash
    merged = job.merge(tmp_path / "again").adapter
    assert merged.content_hash == stored.content_hash
    assert (tmp_path / "again/freed.safetensors").read_bytes() == (out / "freed.safetensors").read_bytes()


def test_so_many_directions_that_nothing_is_left(tmp_path: Path):
    with pytest.raises(LoralloyError, match=r"leave nothing of adapter 'domain'.*--common"):
        compose(two(tmp_path), tiny_llama(), long(), gate=Gate(kind="uniform"), common=500, common_of="domain")


def long() -> list[dict[str, torch.Tensor]]:
    """More tokens than any module has inputs."""
    return [{"input_ids": torch.randint(3, 60, (8, 40), generator=generator(2))}]


def test_inputs_that_have_fewer_directions_than_are_taken(tmp_path: Path):
    done = compose(two(tmp_path), tiny_llama(), batches(), gate=Gate(kind="uniform"), common=30, common_of="domain")
    assert any("4 modules have fewer than 30 directions" in note for note in done.notes)


def test_common_and_activations_do_not_go_together(tmp_path: Path):
    with pytest.raises(LoralloyError, match="leave `common` at 0"):
        compose(two(tmp_path), tiny_llama(), batches(), gate=Gate(kind="uniform"), judge="activations", common=1)
