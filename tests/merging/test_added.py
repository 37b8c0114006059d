"""linear in factors space block by block: the bytes of the batched way, and parents that are looked at through the result."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import adapter, factors
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.merging import added, merge
from loralloy.merging.entries import Entries
from loralloy.merging.rule import Rule
from loralloy.weights import Weights

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = {"layers.0.q": "linear", "layers.1.q": "linear", "layers.0.emb": "embedding", "layers.0.conv": "conv"}


def part(kind: str, seed: int, rank: int, dtype: torch.dtype, scaling: float) -> LoraFactors:
    if kind == "conv":
        f = factors(12, 27, rank, seed, scaling)
        return LoraFactors(f.A.reshape(rank, 3, 3, 3), f.B[:, :, None, None], scaling, "conv").to(dtype)
    f = factors(12, 20, rank, seed, scaling)
    return LoraFactors(f.A, f.B, scaling, kind).to(dtype)  # type: ignore[arg-type]


def stored(folder: Path, dtypes: list[torch.dtype], ranks: list[int]) -> Bank:
    """A bank on disk; modules of different ranks, so that some are padded; the last adapter lacks one."""
    for i, dtype in enumerate(dtypes):
        parts = {
            m: part(kind, 10 * i + j, ranks[j % len(ranks)], dtype, (0.5, 2.0, 1.0)[i])
            for j, (m, kind) in enumerate(KINDS.items())
            if i < 2 or j
        }
        adapter(parts, f"a{i}").save(folder / f"a{i}", overwrite=True)
    return Bank.load([folder / f"a{i}" for i in range(len(dtypes))])


def counted(monkeypatch: pytest.MonkeyPatch, block: int) -> list[int]:
    """Blocks of `block` entries, any module large enough; lists how many parts each sum had."""
    seen: list[int] = []
    original = added._sum

    def count(parts, *rest):
        seen.append(len(parts))
        return original(parts, *rest)

    monkeypatch.setattr(added, "_BLOCK", block)
    monkeypatch.setattr(added, "_sum", count)
    return seen


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    st.sampled_from([[4], [4, 2]]),
    st.integers(1, 24),
    st.sampled_from([None, torch.float32, torch.bfloat16]),
)
def test_the_bytes_are_those_of_batches(tmp_path_factory, dtypes, weights, ranks, block, dtype):
    """Whatever the block: the sum is made in the same order and rounded once."""
    folder = tmp_path_factory.mktemp("f")
    bank = stored(folder, dtypes, ranks)
    given = Weights(dict(zip(bank.names, weights, strict=False)))
    with pytest.MonkeyPatch.context() as patch:
        seen = counted(patch, block)
        want = merge(bank, given, "linear", "factors", dtype=dtype, measure="exact").adapter
        assert not seen  # what is measured goes in batches
        memory = merge(bank, given, "linear", "factors", dtype=dtype, measure="none").adapter
        assert seen and max(seen) <= len(dtypes)
        streamed = merge(bank, given, "linear", "factors", dtype=dtype, measure="none", out=folder / "out").adapter
    assert set(want) == set(memory) == set(streamed) and streamed.path is not None
    for module, f in want.items():
        for other in (memory[module], streamed[module]):
            assert torch.equal(other.A, f.A) and torch.equal(other.B, f.B)
            assert (other.A.dtype, other.kind, other.scaling) == (f.A.dtype, f.kind, f.scaling)


@pytest.mark.parametrize(
    "more", [{"space": "delta"}, {"rank": 2}, {"before": "pico"}, {"after": "svc"}, {"energy": 0.9}]
)
def test_what_is_more_than_a_sum_goes_in_batches(more, tmp_path, monkeypatch):
    bank = stored(tmp_path, [torch.float32] * 2, [4])
    seen = counted(monkeypatch, 4)
    merge(bank, Weights.uniform(bank.names), "linear", **{"space": "factors", "measure": "none"} | more)
    merge(bank, Weights.uniform(bank.names), "ties", "factors", measure="none")
    assert not seen


def test_small_modules_go_in_batches(tmp_path, monkeypatch):
    bank = stored(tmp_path, [torch.float32] * 2, [4])
    smallest = min(t.numel() for f in bank["a0"].values() for t in (f.A, f.B))
    for block, blocks in ((smallest, True), (1 << 20, False)):
        seen = counted(monkeypatch, block)
        merge(bank, Weights.uniform(bank.names), "linear", "factors", measure="none")
        assert bool(seen) == blocks


def spoilt(folder: Path, value: float, side: str) -> Bank:
    """The second module of b holds `value`, on disk."""
    for name in "ab":
        parts = {f"layers.{i}.q": factors(12, 20, 4, i, 0.5) for i in range(3)}
        if name == "b":
            f = parts["layers.1.q"]
            tensors = {"A": f.A.clone(), "B": f.B.clone()}
            tensors[side].view(-1)[-1] = value
            parts["layers.1.q"] = LoraFactors(tensors["A"], tensors["B"], 0.5)
        adapter(parts, name).save(folder / name)
    return Bank.load([folder / "a", folder / "b"])


@pytest.mark.parametrize("block", [7, 1 << 20], ids=["by block", "in batches"])
@pytest.mark.parametrize("side", "AB")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("rule", "space", "weight"),
    [("linear", "factors", 1.0), ("linear", "factors", 0.0), ("linear", "delta", -1.0), ("svd", "delta", 1.0),
     ("cat", "delta", 1.0), ("ties", "factors", 1.0)],
)  # fmt: skip
def test_a_damaged_parent_is_named(rule, space, weight, value, side, block, tmp_path, monkeypatch):
    """Also where its weight is 0, and where its tensors were not looked at before they were added."""
    bank = spoilt(tmp_path, value, side)
    monkeypatch.setattr(added, "_BLOCK", block)
    says = rf"^module 'layers.1.q' of a, b: adapter 'b': tensor '.*layers.1.q.lora_{side}.weight' holds NaN or infinity"
    for out in (None, tmp_path / "out"):
        with pytest.raises(LoralloyError, match=says):
            merge(bank, Weights({"a": 1.0, "b": weight}), rule, space, measure="none", out=out)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("block", [7, 1 << 20], ids=["by block", "in batches"])
def test_overflow_is_told_from_damage(block, tmp_path, monkeypatch):
    """A result that is infinite though its parents are not: the cast, and the remedy."""
    monkeypatch.setattr(added, "_BLOCK", block)
    for name in "ab":
        adapter({f"layers.{i}.q": factors(12, 20, 4, i, 0.5) for i in range(2)}, name).save(tmp_path / name)
    bank = Bank.load([tmp_path / "a", tmp_path / "b"])
    weights = Weights({"a": {"*": 1.0, "layers.1.q": 1e12}, "b": 1.0})
    with pytest.raises(LoralloyError, match=r"^module 'layers.1.q' of a, b: A overflows fp16; store it as bf16"):
        merge(bank, weights, "linear", "factors", measure="none", dtype=torch.float16, out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert isinstance(merge(bank, weights, "linear", "factors", measure="none").adapter, Adapter)


def hiding(entries: Entries) -> Tensor:
    """A rule whose result is finite whatever it is given."""
    return entries.summed().nan_to_num(0.0, 0.0, 0.0)


def test_a_damaged_parent_that_a_rule_would_hide(tmp_path):
    """Only of sums is the result a sign of what was added: everything else has its tensors looked at first."""
    rule = Rule("hiding", hiding, "", "", "", spaces=("factors",))
    with pytest.raises(LoralloyError, match=r"adapter 'b': tensor '.*layers.1.q.lora_A.weight' holds NaN or infinity"):
        merge(spoilt(tmp_path, math.nan, "A"), Weights({"a": 1.0, "b": 1.0}), rule, "factors", measure="none")
