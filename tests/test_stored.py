"""Hashing an adapter from its file: the same as from its tensors, and always of the file that was opened."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

import loralloy.tensor_file
from helpers import adapter, factors
from loralloy.adapter import Adapter
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors


def thing(seed: int = 0, name: str = "a") -> Adapter:
    parts = {f"layers.{i}.q": factors(9, 7, 2 + i, seed + i, 0.3).to(torch.bfloat16) for i in (1, 0, 2)}
    conv = LoraFactors(torch.randn(2, 3, 3, 3), torch.randn(4, 2, 1, 1), 0.5, "conv")
    extra = {"head.weight": torch.randn(3, 2), "steps": torch.tensor(seed)}
    return adapter(parts | {"conv": conv}, name, extra=extra)


def by_hand(a: Adapter) -> str:
    """The definition, from the tensors in memory."""
    digest = hashlib.sha256()
    for m in sorted(a):
        f = a[m]
        digest.update(f"{m}|{f.kind}|{f.scaling:.12g}|{f.A.dtype}|{list(f.A.shape)}|{list(f.B.shape)}".encode())
        for tensor in (f.A, f.B):
            digest.update(bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()))
    for n in sorted(a.extra):
        t = a.extra_tensor(n)
        digest.update(f"{n}|{t.dtype}|{list(t.shape)}".encode())
        digest.update(bytes(t.reshape(-1).view(torch.uint8).tolist()))
    return "sha256:" + digest.hexdigest()


@pytest.mark.parametrize("block", [1, 5, 1 << 18])
def test_from_the_file_as_from_tensors(block, tmp_path, monkeypatch):
    a = thing()
    a.save(tmp_path / "a")
    monkeypatch.setattr(loralloy.tensor_file, "_READ", block)
    loaded = Adapter.load(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "unchecked", lambda *_: pytest.fail("a module was mapped"))
        got = loaded.content_hash
    assert got == a.content_hash == by_hand(a) == by_hand(loaded)


@pytest.mark.parametrize("what", ["deleted", "replaced", "replaced by no safetensors file"])
def test_the_hash_is_of_the_file_that_was_opened(what, tmp_path):
    """The tensors are still those of the old file, and so is the hash."""
    old, new = thing(0), thing(5)
    old.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a")
    file = Path(tmp_path / "a" / "adapter_model.safetensors")
    if what == "replaced":
        new.save(tmp_path / "b")
        os.replace(tmp_path / "b" / file.name, file)
    else:
        file.unlink()
        if what != "deleted":
            file.write_bytes(b"\xff" * 40)
    assert loaded.content_hash == old.content_hash != new.content_hash
    assert torch.equal(loaded["conv"].A, old["conv"].A)


def test_a_file_cut_short_since(tmp_path):
    """In place: the same file, with less in it."""
    thing().save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(LoralloyError, match=r"adapter_model.safetensors ends inside tensor .*; the file is torn"):
        loaded.content_hash  # noqa: B018
    os.truncate(file, 20)
    with pytest.raises(LoralloyError, match=r"adapter_model.safetensors has no header; the file is torn"):
        loaded.content_hash  # noqa: B018


def test_damaged_entries_have_a_hash_and_are_told_when_read(tmp_path):
    spoilt = LoraFactors(torch.full((2, 3), torch.nan), torch.ones(4, 2), 1.0)
    adapter({"m": spoilt}).save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a")
    assert loaded.content_hash == adapter({"m": spoilt}).content_hash
    assert loaded.unchecked("m").A.isnan().all()
    for _ in range(2):
        with pytest.raises(LoralloyError, match=r"adapter 'a': tensor '.*m.lora_A.weight' holds NaN or infinity"):
            loaded["m"]
