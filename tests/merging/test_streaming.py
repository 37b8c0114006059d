"""merge(out=folder): the same adapter as in memory, one module at a time, and nothing where it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import (
    adapter,
    close,
    delta,
    factors,
    load_in_peft,
    logits,
    peft_deltas,
    peft_folder,
    relative,
    tiny_llama,
)
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.merging import RULES, merge, stacking
from loralloy.weights import Weights

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
SHAPES = {"layers.0.q": (14, 10), "layers.0.up": (22, 10), "layers.1.q": (14, 10), "layers.1.up": (22, 10)}
WEIGHTS = Weights({"b": 0.7, "a": {"*": -0.4, "layers.0.up": 0.0}})
EVERYWHERE = [(name, space) for name, rule in RULES.items() for space in rule.spaces]


def bank(dtype: torch.dtype = torch.float32, extra: dict[str, Tensor] | None = None, rank: int = 5) -> Bank:
    parts = {
        n: {m: factors(*shape, r, 10 * i + j, 0.4, dtype) for j, (m, shape) in enumerate(SHAPES.items())}
        for i, (n, r) in enumerate((("a", 5), ("b", rank)))
    }
    return Bank(adapter(p, n, extra=extra) for n, p in parts.items())


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def unpadded(data: bytes) -> object:
    """A safetensors file's header and data: a streamed file may have left more room for the header."""
    size = int.from_bytes(data[:8], "little")
    return (json.loads(data[8 : 8 + size]), data[8 + size :]) if size < len(data) else data


def same(one: Adapter, two: Adapter) -> bool:
    return set(one) == set(two) and all(
        torch.equal(f.A, two[m].A)
        and torch.equal(f.B, two[m].B)
        and (f.scaling, f.kind, f.A.dtype) == (two[m].scaling, two[m].kind, two[m].A.dtype)
        for m, f in one.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rule", "space"), EVERYWHERE, ids=lambda x: x)
def test_streamed_is_what_is_made_in_memory(rule, space, dtype, tmp_path):
    """Bit for bit, saved or streamed; and the same bytes twice."""
    b = bank(extra={"head.weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(7)})
    for n, a in b.items():
        a.save(tmp_path / n)
    b = Bank.load([tmp_path / n for n in b])
    seen: list[str] = []
    memory = merge(b, WEIGHTS, rule, space, dtype=dtype)
    streamed = merge(b, WEIGHTS, rule, space, dtype=dtype, out=tmp_path / "one", name="merged", on_module=seen.append)
    merge(b, WEIGHTS, rule, space, dtype=dtype, out=tmp_path / "two")
    memory.adapter.save(tmp_path / "three")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "one", "three", "two"]
    assert sorted(content(tmp_path / "one")) == FILES
    one, two, three = (content(tmp_path / n) for n in ("one", "two", "three"))
    assert one == two
    assert {n: unpadded(x) for n, x in one.items()} == {n: unpadded(x) for n, x in three.items()}
    assert same(memory.adapter, streamed.adapter) and streamed.adapter.path == tmp_path / "one"
    assert memory.report == streamed.report
    assert memory.adapter.provenance["merge"] == streamed.adapter.provenance["merge"]
    assert sorted(seen) == sorted(streamed.adapter) == sorted(SHAPES)
    assert set(streamed.adapter.extra) == {"head.weight", "steps"}
    assert streamed.adapter.extra_tensor("head.weight").dtype == dtype
    assert torch.equal(streamed.adapter.extra_tensor("steps"), torch.tensor(7))  # a counter stays a counter
    hashes = [p["hash"] for p in streamed.adapter.provenance["merge"]["parents"]]
    assert hashes == [b[n].content_hash for n in ("b", "a")]


@pytest.mark.parametrize("rule", ["linear", "svd", "ties"])
def test_what_was_streamed_loads_in_peft(rule, tmp_path):
    """Mixed ranks, modules that only some have, a saved head: PEFT says nothing and computes the same."""
    base = tiny_llama()
    peft_folder(base, tmp_path / "a", 1, target_modules=["q_proj", "v_proj"], r=3, modules_to_save=["lm_head"])
    peft_folder(base, tmp_path / "b", 2, target_modules=["q_proj", "up_proj"], r=5, modules_to_save=["lm_head"])
    b = Bank.load([tmp_path / "a", tmp_path / "b"])
    merged = merge(b, Weights({"a": 0.8, "b": -0.5}), rule, out=tmp_path / "m").adapter
    assert merged.extra == ["lm_head.weight"]
    assert torch.equal(merged.extra_tensor("lm_head.weight"), base.lm_head.weight)
    model = load_in_peft(base, tmp_path / "m")
    theirs = peft_deltas(model)
    assert set(theirs) == set(merged) and max(relative(theirs[m], d) for m, d in delta(merged).items()) < 1e-6
    dense = tiny_llama()
    with torch.no_grad():
        for m, d in delta(merged).items():
            dense.get_submodule(m).weight += d.float()
    ids = torch.arange(3, 19).reshape(2, 8)
    assert close(logits(model, ids), logits(dense, ids))


def test_the_target_is_refused_or_replaced(tmp_path):
    merge(bank(), WEIGHTS, "svd", out=tmp_path / "m")
    before = content(tmp_path / "m")
    seen: list[str] = []
    with pytest.raises(LoralloyError, match="m exists already; choose another output or pass --overwrite"):
        merge(bank(), WEIGHTS, "ties", out=tmp_path / "m", on_module=seen.append)
    assert content(tmp_path / "m") == before and seen == []  # refused before the work, not after it
    merge(bank(), WEIGHTS, "ties", out=tmp_path / "m", overwrite=True)
    assert Adapter.load(tmp_path / "m").provenance["merge"]["rule"] == "ties" and os.listdir(tmp_path) == ["m"]


def test_merging_onto_a_parent(tmp_path):
    """The adapter that is being read is replaced only when all of it has been read."""
    b = bank()
    for n, a in b.items():
        a.save(tmp_path / n)
    loaded = Bank.load([tmp_path / "a", tmp_path / "b"])
    want = delta(merge(b, WEIGHTS).adapter)
    got = delta(merge(loaded, WEIGHTS, out=tmp_path / "a", overwrite=True).adapter)
    assert max(relative(got[m], x) for m, x in want.items()) < 1e-6 and sorted(os.listdir(tmp_path)) == ["a", "b"]


# -- errors in the middle ----------------------------------------------------------------------------------------------


def poisoned(tmp_path: Path) -> Bank:
    """The last module of b holds a NaN, on disk."""
    b = bank()
    parts = dict(b["b"])
    last = parts["layers.1.up"]
    spoilt = last.A.clone()
    spoilt[1, 2] = torch.nan
    parts["layers.1.up"] = LoraFactors(spoilt, last.B, last.scaling)
    b["a"].save(tmp_path / "bank" / "a")
    adapter(parts, "b").save(tmp_path / "bank" / "b")
    return Bank.load(tmp_path / "bank")


TOO_LARGE = Weights({"a": {"*": 1.0, "layers.1.up": 1e12}, "b": 1.0})
DIFFERENT_HEADS = {"a": {"head": torch.ones(2)}, "b": {"head": torch.zeros(2)}}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failure", ["nan", "overflow", "heads", "progress"])
@pytest.mark.parametrize("rule", ["linear", "svd", "ties"])
def test_an_error_in_the_middle_leaves_no_trace(rule, failure, overwrite, tmp_path, monkeypatch):
    monkeypatch.setattr(stacking, "_BUDGET", {"cpu": 1})  # one module a batch: others are written before it fails
    target = tmp_path / "out" / "m"
    if overwrite:
        merge(bank(), WEIGHTS, "svd", out=target)
    before = content(target) if overwrite else None
    seen: list[str] = []

    def progress(module: str) -> None:
        seen.append(module)
        if failure == "progress" and len(seen) == 3:
            raise KeyboardInterrupt

    b, weights, dtype, error, says = bank(), Weights({"a": 1.0, "b": 1.0}), None, LoralloyError, None
    if failure == "nan":
        b, says = (
            poisoned(tmp_path),
            r"^module 'layers.1.up' of a, b: adapter 'b': tensor '.*layers.1.up.lora_A.weight' ",
        )
    elif failure == "overflow":
        weights, dtype, says = TOO_LARGE, torch.float16, r"^module 'layers.1.up' of a, b: . overflows fp16"
    elif failure == "heads":
        b = Bank(adapter(dict(a), n, extra=DIFFERENT_HEADS[n]) for n, a in b.items())
        says = "each saved their own 'head'"
    else:
        error = KeyboardInterrupt  # type: ignore[assignment]
    with pytest.raises(error, match=says):
        merge(b, weights, rule, dtype=dtype, out=target, overwrite=overwrite, on_module=progress)
    assert failure == "heads" or len(seen) == 3  # it was in the middle
    if overwrite:
        assert content(target) == before and os.listdir(target.parent) == ["m"]
    else:
        assert not target.parent.exists() or os.listdir(target.parent) == []
    merge(bank(), WEIGHTS, rule, out=target, overwrite=overwrite)  # and it works again


@pytest.mark.parametrize("rule", ["linear", "ties"])
def test_an_error_in_a_batch_names_its_module(rule, tmp_path):
    """Two modules in one batch, the second of them damaged."""
    with pytest.raises(LoralloyError, match=r"^module 'layers.1.up' of a, b: adapter 'b': tensor .* holds NaN"):
        merge(poisoned(tmp_path), Weights({"a": 1.0, "b": 1.0}), rule, out=tmp_path / "m")
    assert os.listdir(tmp_path) == ["bank"]


def test_a_saved_tensor_that_overflows_leaves_no_trace(tmp_path):
    b = bank(extra={"head.weight": torch.full((2,), 1e6)})
    with pytest.raises(LoralloyError, match=r"tensor '.*head.weight' overflows fp16"):
        merge(b, WEIGHTS, dtype=torch.float16, out=tmp_path / "m")
    assert os.listdir(tmp_path) == []


# -- memory and files, in a process of its own -------------------------------------------------------------------------

STREAM = """
import json, os, sys, tempfile
folder, size = sys.argv[1], int(sys.argv[2])
os.environ["MALLOC_ARENA_MAX"] = "1"
import torch
torch.set_num_threads(1)
from loralloy.bank import Bank
from loralloy.merging import stacking, merge
from loralloy.weights import Weights
stacking._BUDGET = {"cpu": 4 << 20}
written, watching = [], [False]

def hook(event, arguments):
    if not watching[0]:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = os.fsdecode(arguments[0]), arguments[1], arguments[2]
        if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(os.path.abspath(path))
    elif event in ("os.mkdir", "os.rename", "os.symlink", "os.link", "tempfile.mkstemp", "tempfile.mkdtemp"):
        written.extend(os.path.abspath(os.fsdecode(a)) for a in arguments[:2] if isinstance(a, (str, bytes, os.PathLike)))

sys.addaudithook(hook)

def private():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def peak(n, rule, rank):
    seen = []
    bank = Bank.load(os.path.join(folder, f"bank{n}"))
    before = private()
    watching[0] = True
    merge(bank, Weights.uniform(bank.names), rule, rank=rank, out=os.path.join(folder, "out", rule), overwrite=True,
          on_module=lambda m: seen.append(private()))
    watching[0] = False
    assert len(seen) == n
    return max(seen) - before

peak(size, "linear", "full"), peak(size, "svd", 32)  # warm: libraries, thread pools
print(json.dumps({
    "peaks": {rule: [peak(n, rule, rank) for n in (size, 2 * size)] for rule, rank in (("linear", "full"), ("svd", 32))},
    "written": sorted({os.path.relpath(p, folder) for p in written}),
}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_modules_and_nothing_is_written_elsewhere(tmp_path):
    """64 and 128 modules of 0.5 MB: the 32 MB that are added must not show."""
    size, rank, side = 64, 64, 512
    per_module = 2 * 2 * rank * side * 4  # two parents, A and B, float32; the exact merge writes as much again
    for n in (size, 2 * size):
        for seed, name in enumerate("ab"):
            f = factors(side, side, rank, seed)
            adapter({f"m{i}": f for i in range(n)}, name).save(tmp_path / f"bank{n}" / name)
    command = [sys.executable, "-c", STREAM, str(tmp_path), str(size)]
    empty = tmp_path / "tmp"
    empty.mkdir()
    (tmp_path / "out").mkdir()
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=empty, env=os.environ | {"TMPDIR": str(empty)}
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    for rule, (one, two) in said["peaks"].items():
        added = size * per_module
        assert two - one < added / 2, (
            f"{rule}: {one / 2**20:.0f} MB and {two / 2**20:.0f} MB; {added / 2**20:.0f} added"
        )
        assert two < added, f"{rule}: {two / 2**20:.0f} MB"
    written = said["written"]
    new = [p for p in written if p.startswith(("out/.linear.new-", "out/.svd.new-"))]
    assert {Path(p).name for p in new if p.count("/") == 2} == set(FILES)
    assert set(written) - set(new) <= {"out", "out/linear", "out/svd"}, (
        written
    )  # the folder itself: made, or renamed onto
    assert os.listdir(empty) == [] and sorted(os.listdir(tmp_path / "out")) == ["linear", "svd"]
