"""The streaming safetensors writer, with safetensors itself as the oracle, byte for byte; and adapters written through it."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import loralloy.tensor_file
from helpers import BASE, adapter, close, factors, load_in_peft, logits, relative, tiny_llama
from loralloy.adapter import Adapter
from loralloy.adapter_config import AdapterConfig
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.saving import AdapterWriter, header, outline
from loralloy.tensor_file import DTYPES, TensorFile, metadata_room

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
META = {"format": "pt"}


def specs(tensors):
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def write(path, tensors, metadata=None, reserve=None, order=None):
    with TensorFile(path, specs(tensors), metadata_room(metadata or {}) if reserve is None else reserve) as file:
        for name in order or tensors:
            file.write(name, tensors[name])
        file.finish(metadata)
    return path.read_bytes()


def same(path: Path, tensors) -> bool:
    got = load_file(path)
    return set(got) == set(tensors) and all(
        got[n].dtype == t.dtype and got[n].shape == t.shape and got[n].flatten().tolist() == t.flatten().tolist()
        for n, t in tensors.items()
    )


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6),
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1,
        max_size=8,
    ),
    st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=20)),
    st.randoms(use_true_random=False),
)
def test_the_bytes_are_those_of_safetensors(tmp_path_factory, shapes, told, random):
    folder = tmp_path_factory.mktemp("f")
    shapes.pop("__metadata__", None)
    tensors = {n: torch.ones(shape, dtype=torch.float32).to(DTYPES[code]) for n, (code, shape) in shapes.items()}
    if len(tensors) > 1:
        first = next(n for n in tensors)
        tensors[first] = torch.zeros_like(tensors[first]) if "E8M0" not in shapes[first][0] else tensors[first]
    metadata = None if told is None else {"a": told}
    save_file(tensors, folder / "theirs", metadata)
    order = list(tensors)
    random.shuffle(order)
    assert write(folder / "ours", tensors, metadata, order=order) == (folder / "theirs").read_bytes()


def test_bytes_do_not_depend_on_the_order_of_metadata(tmp_path):
    tensors = {"x": torch.arange(3.0)}
    first = write(tmp_path / "a", tensors, {"b": "1", "a": "2"})
    assert first == write(tmp_path / "b", tensors, {"a": "2", "b": "1"})
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"a": "2", "b": "1"}


@given(st.integers(0, 400), st.integers(0, 400), st.integers(1, 70))
def test_any_reserve_fits_any_metadata(tmp_path_factory, reserve, size, block):
    """Also where the header outgrows its room and the data moves, in blocks that do not divide it."""
    path = tmp_path_factory.mktemp("f") / "t"
    tensors = {f"m{i}": torch.arange(7.0 + i).to(dtype) for i, dtype in enumerate(FLOATS)} | {"i": torch.arange(5)}
    was, loralloy.tensor_file._BLOCK = loralloy.tensor_file._BLOCK, block
    try:
        write(path, tensors, {"k": "é" * size}, reserve)
    finally:
        loralloy.tensor_file._BLOCK = was
    assert same(path, tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"k": "é" * size}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_views_and_other_layouts(tmp_path):
    """What is not contiguous, conjugated or part of a graph is written as its values."""
    x = torch.randn(4, 6, dtype=torch.complex64)
    tensors = {
        "t": torch.randn(4, 6).T,
        "slice": torch.randn(4, 6)[1:3, ::2],
        "expanded": torch.randn(1, 6).expand(4, 6),
        "conj": x.conj(),
        "grad": torch.randn(3, requires_grad=True),
    }
    write(tmp_path / "a", tensors)
    assert same(tmp_path / "a", {n: t.detach().resolve_conj() for n, t in tensors.items()})


def test_an_unfinished_file_is_no_file(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(RuntimeError, match="power cut"), TensorFile(path, {"x": (torch.float32, (2,))}) as file:
        file.write("x", torch.zeros(2))
        raise RuntimeError("power cut")
    assert file._file.closed
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(LoralloyError, match=r"a was not finished"), TensorFile(path, {"x": (torch.float32, (2,))}):
        pass


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("z", torch.zeros(2), r"out: there is no place for a tensor 'z'"),
        ("x", torch.zeros(3), r"'x' is torch.float32 \[3\], but torch.float32 \[2\] was announced"),
        ("x", torch.zeros(2).half(), r"'x' is torch.float16 \[2\]"),
        ("y", torch.zeros(1), r"'y' is written twice"),
    ],
)
def test_a_tensor_that_is_not_the_announced_one(name, tensor, says, tmp_path):
    with TensorFile(tmp_path / "out", {n: (torch.float32, (1 + (n == "x"),)) for n in "xy"}) as file:
        file.write("y", torch.zeros(1))
        with pytest.raises(LoralloyError, match=says):
            file.write(name, tensor)
        with pytest.raises(LoralloyError, match=r"1 tensors were announced but not written, 'x' first"):
            file.finish()
        file.write("x", torch.ones(2))
        file.finish()
    assert load_file(tmp_path / "out")["x"].tolist() == [1, 1]


def test_a_dtype_without_a_name(tmp_path):
    with pytest.raises(LoralloyError, match=r"no name for torch.complex128 \(tensor 'x'\)"):
        TensorFile(tmp_path / "a", {"x": (torch.complex128, (1,))})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("moves", [False, True])
def test_a_large_file_is_put_on_disk_while_it_is_written(moves, tmp_path, monkeypatch):
    """By another thread; what that finds wrong is not lost."""
    tensors = {f"t{i}": torch.full((8,), float(i)) for i in range(20)}
    monkeypatch.setattr(loralloy.tensor_file, "_SYNC", 64)
    synced: list[int] = []
    monkeypatch.setattr(loralloy.tensor_file.os, "fsync", synced.append)
    write(tmp_path / "a", tensors, {"k": "v" * 100}, 0 if moves else None)
    assert synced and same(tmp_path / "a", tensors)

    def broken(_: int) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(loralloy.tensor_file.os, "fsync", broken)
    for size in (64, 20 * 32):  # at the next sync, and at the end where none comes after
        monkeypatch.setattr(loralloy.tensor_file, "_SYNC", size)
        with pytest.raises(OSError, match="the disk is gone"):
            write(tmp_path / "b", tensors)


# -- adapters through it -----------------------------------------------------------------------------------------------


class Made(Mapping[str, LoraFactors]):
    """Factors made when asked for, that count how many are alive."""

    def __init__(self, count: int) -> None:
        self.count, self.alive, self.most = count, 0, 0

    def __iter__(self):
        return (f"layers.{i}.q" for i in range(self.count))

    def __len__(self):
        return self.count

    def __getitem__(self, module):
        made = factors(seed=int(module.split(".")[1]))
        for tensor in (made.A, made.B):
            weakref.finalize(tensor, self.gone)
        self.alive += 1
        self.most = max(self.most, self.alive)
        return made

    def gone(self):
        self.alive -= 0.5


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saving_holds_one_module_at_a_time(dtype, tmp_path):
    made = Made(20)
    gc.disable()  # what is held only by a cycle would be held while merging too
    try:
        Adapter("a", made, AdapterConfig(4, 2.0), BaseRef(BASE)).save(tmp_path / "a", dtype=dtype)
    finally:
        gc.enable()
    assert made.most <= 2  # the one that is being made, and the one in the loop's variable
    assert len(Adapter.load(tmp_path / "a")) == 20


def test_outlines_tell_the_dtype_and_read_nothing(tmp_path):
    parts = {"m": factors().to(torch.bfloat16), "n": LoraFactors(factors().A.half(), factors().B, 0.5)}
    extra = {"head.weight": torch.ones(3, 2).half(), "count": torch.tensor(3)}
    adapter(parts, extra=extra).save(tmp_path / "a")
    for thing in (adapter(parts, extra=extra), Adapter.load(tmp_path / "a")):
        for module, f in parts.items():
            seen = thing.outline(module)
            assert (seen.A.dtype, seen.B.dtype, seen.A.device.type) == (f.A.dtype, f.B.dtype, "meta")
            assert (seen.A.shape, seen.B.shape, seen.scaling) == (f.A.shape, f.B.shape, f.scaling)
        for name, tensor in extra.items():
            assert thing.outline_extra(name).dtype == tensor.dtype and thing.outline_extra(name).shape == tensor.shape
            assert thing.outline_extra(name).device.type == "meta"


def writer(folder, parts, **more):
    folder.mkdir()
    shapes = {m: outline(f.A.shape, f.B.shape, f.A.dtype, f.scaling, f.kind) for m, f in parts.items()}
    return AdapterWriter(folder, "a", BaseRef(BASE), AdapterConfig(4, 2.0), shapes, **more)


@pytest.mark.parametrize("reserve", [0, 100_000])
def test_a_record_that_is_known_only_at_the_end(reserve, tmp_path):
    """Modules in any order; what they cost goes into the header after the last."""
    parts = {f"layers.{i}.q": factors(seed=i, rank=2 + i % 2) for i in range(5)}
    extra = {"head.weight": torch.randn(3, 2)}
    record = {"training": {"errors": dict.fromkeys(parts, 0.001)}}
    with writer(tmp_path / "a", parts, extra=specs(extra), reserve=reserve) as out:
        out.write_extra("head.weight", extra["head.weight"])
        for module in reversed(parts):
            out.write(module, parts[module])
        out.finish(record, "mit")
    loaded = Adapter.load(tmp_path / "a")
    assert loaded.provenance["training"] == record["training"] and loaded.licence == "mit"
    assert loaded.content_hash == adapter(parts, extra=extra).content_hash
    assert all(relative(loaded[m].dense(), f.dense()) == 0 for m, f in parts.items())
    if not reserve:  # the same bytes as from an adapter in memory, whose record is known before
        whole = Adapter("a", parts, AdapterConfig(4, 2.0), BaseRef(BASE), extra, record, "mit")
        whole.save(tmp_path / "b")
        for file in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_a_module_that_is_not_the_announced_one(tmp_path):
    f = factors()
    with (
        pytest.raises(
            LoralloyError, match=r"'m' \(linear, scaling 2\) is not what was announced \(linear, scaling 0.5"
        ),
        writer(tmp_path / "a", {"m": f}) as out,
    ):
        out.write("m", LoraFactors(f.A, f.B, 2.0))
    with (
        pytest.raises(LoralloyError, match=r"'other' .* is not what was announced \(nothing\)"),
        writer(tmp_path / "b", {"m": f}) as out,
    ):
        out.write("other", f)
    with (
        pytest.raises(LoralloyError, match=r"'base_model.model.m.lora_A.weight' overflows fp16"),
        writer(tmp_path / "c", {"m": f}, dtype=torch.float16) as out,
    ):
        out.write("m", LoraFactors(f.A * 1e6, f.B, 0.5))


def test_saved_modules_alone(tmp_path):
    head = {"head.weight": torch.randn(3, 2)}
    Adapter("a", {}, AdapterConfig(8, 4.0), BaseRef(BASE), head).save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a")
    assert len(loaded) == 0 and torch.equal(loaded.extra_tensor("head.weight"), head["head.weight"])
    assert (loaded.config.rank, loaded.config.alpha) == (8, 4.0)


def test_peft_and_the_old_bytes(tmp_path):
    """PEFT loads it, and the file is safetensors' own with the metadata in order."""
    base = tiny_llama()
    names = [f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in ("q_proj", "o_proj")]
    thing = adapter({n: factors(32, 32, 4, i) for i, n in enumerate(names)})
    thing.save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    metadata = header(thing.base, {})
    save_file({k: v.clone() for k, v in load_file(file).items()}, tmp_path / "theirs", metadata)
    ours, theirs = file.read_bytes(), (tmp_path / "theirs").read_bytes()
    size = 8 + int.from_bytes(ours[:8], "little")
    assert len(ours) == len(theirs) and ours[:8] == theirs[:8] and ours[size:] == theirs[size:]
    assert json.loads(ours[8:size]) == json.loads(theirs[8:size])
    assert file.stat().st_mode == (tmp_path / "a" / "README.md").stat().st_mode
    ids = torch.arange(10)[None]
    peft = load_in_peft(base, tmp_path / "a")
    want = logits(base, ids)
    with torch.no_grad():
        for n in names:
            base.get_submodule(n).weight += thing[n].dense(torch.float32)
    assert close(logits(peft, ids), logits(base, ids)) and not close(logits(peft, ids), want)
