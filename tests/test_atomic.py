"""Killed at any moment, the target is the old or the new, and the next run cleans up."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from loralloy import atomic
from loralloy.adapter import Adapter
from loralloy.atomic import atomic_file, atomic_folder, recover
from loralloy.errors import LoralloyError

SRC = Path(__file__).resolve().parents[1] / "src"
posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def start(code: str, *args: object) -> subprocess.Popen[str]:
    """A Python process running `code`; returns when it says it is ready."""
    environment = os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- plain use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "out[1]", "out *", ".hidden", "é"])
def test_new_and_replaced(tmp_path, name):
    target = tmp_path / "deep" / name
    with atomic_folder(target) as new:
        (new / "a").write_text("1")
        assert not target.exists() and new.parent == target.parent
    with (
        pytest.raises(LoralloyError, match="exists already; choose another output or pass --overwrite"),
        atomic_folder(target),
    ):
        raise AssertionError("the body must not run")
    assert (target / "a").read_text() == "1"
    with atomic_folder(target, overwrite=True) as new:
        assert names(new) == []  # nothing of the old one shines through
        (new / "b").write_text("2")
    assert names(target) == ["b"] and names(target.parent) == [name]


def test_an_error_leaves_the_disk_as_it_was(tmp_path):
    target = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mine"), atomic_folder(target, overwrite=True) as new:
            (new / "half").write_text("x")
            raise RuntimeError("mine")
    assert names(tmp_path) == []
    with atomic_folder(target) as new:
        (new / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), atomic_folder(target, overwrite=True) as new:
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"] and names(target) == ["a"]


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(LoralloyError, match="appeared while writing"), atomic_folder(target):
        target.mkdir()
        (target / "theirs").write_text("x")
    assert names(target) == ["theirs"] and names(tmp_path) == ["out"]


def test_a_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data").write_text("x")
    (tmp_path / "out").symlink_to(tmp_path / "precious", target_is_directory=True)
    with atomic_folder(tmp_path / "out", overwrite=True) as new:
        (new / "a").write_text("1")
    assert names(tmp_path / "precious") == ["data"] and names(tmp_path / "out") == ["a"]
    assert names(tmp_path) == ["out", "precious"]


def test_file(tmp_path):
    target = tmp_path / "sub" / "f.json"
    atomic_file(target, "one")
    atomic_file(target, b"two")
    assert target.read_bytes() == b"two" and names(target.parent) == ["f.json"]
    with pytest.raises(LoralloyError, match="exists already"):
        atomic_file(target, "three", overwrite=False)
    assert target.read_bytes() == b"two"


@pytest.mark.parametrize("fail_at", [None, 1, 2])
def test_where_the_system_cannot_exchange(tmp_path, monkeypatch, fail_at):
    """The journal path (Windows, odd file systems): both renames, and an error in either of them."""
    target = tmp_path / "out"
    with atomic_folder(target) as new:
        (new / "old").write_text("1")
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    real, calls = os.rename, []

    def rename(a, b):
        calls.append(a)
        if len(calls) == fail_at:
            raise OSError("no")
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    if fail_at is None:
        with atomic_folder(target, overwrite=True) as new:
            (new / "new").write_text("2")
        assert names(target) == ["new"]
    else:
        with pytest.raises(OSError, match="no"), atomic_folder(target, overwrite=True) as new:
            (new / "new").write_text("2")
        assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@posix
def test_recover(tmp_path):
    """Died between the two renames: the old folder comes back. Died later: it goes. The living keep theirs."""
    target, dead = tmp_path / "out[1]", dead_pid()
    old, new = tmp_path / f".out[1].old-{dead}-abcd", tmp_path / f".out[1].new-{dead}-abcd"
    alive = tmp_path / f".out[1].new-{os.getpid()}-abcd"
    for folder in (old, new, alive):
        folder.mkdir()
        (folder / "x").write_text(folder.name)
    recover(target)
    assert names(tmp_path) == [alive.name, "out[1]"] and (target / "x").read_text() == old.name
    old.mkdir()
    recover(target)
    assert names(tmp_path) == [alive.name, "out[1]"]
    other = tmp_path / f".out[1]-b.new-{dead}-abcd"
    other.mkdir()
    recover(target)
    assert other.is_dir()  # another target's


# -- killed ------------------------------------------------------------------------------------------------------------

LOOP = """
    import sys, pathlib, torch
    from loralloy import Adapter, LoraFactors
    from loralloy.adapter_config import AdapterConfig
    from loralloy.base_ref import BaseRef
    from loralloy import atomic
    if sys.argv[2] == "journal":
        atomic._exchange = lambda a, b: False
    def save(i):
        parts = {f"m{k}": LoraFactors(torch.full((4, 64), float(i)), torch.full((64, 4), float(i))) for k in range(8)}
        thing = Adapter("a", parts, AdapterConfig(4, 4.0), BaseRef("b"), provenance={"run": i})
        thing.save(sys.argv[1], overwrite=True)
    save(1)
    print("ready", flush=True)
    i = 1
    while True:
        i += 1
        save(i)
"""


@posix
@pytest.mark.parametrize("how", ["exchange", "journal"])
def test_kill_minus_nine_at_random_moments(tmp_path, how):
    target, moments = tmp_path / "adapter", random.Random(0)
    leftovers, advanced = 0, 0
    for _ in range(4):
        process = start(LOOP, target, how)
        time.sleep(moments.uniform(0.05, 0.2))
        process.kill()
        process.wait()
        leftovers += len(names(tmp_path)) > 1
        recover(target)  # what any next run does first
        assert names(tmp_path) == ["adapter"]
        assert names(target) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        survivor = Adapter.load(target).validate()
        run = survivor.provenance["run"]
        advanced += run > 1
        for m in survivor:  # every file and tensor is of one run
            assert survivor[m].A.unique().tolist() == survivor[m].B.unique().tolist() == [run]
    assert advanced, "the loop was never past its first save: the test proved nothing"


@posix
@pytest.mark.parametrize("exists", [False, True])
def test_ctrl_c_leaves_the_disk_as_it_was(tmp_path, exists):
    target = tmp_path / "out"
    if exists:
        target.mkdir()
        (target / "old").write_text("1")
    before = [(p, p.is_dir() or p.read_bytes()) for p in sorted(tmp_path.rglob("*"))]
    process = start(
        """
        import sys, time
        from loralloy.atomic import atomic_folder
        with atomic_folder(sys.argv[1], overwrite=True) as new:
            (new / "half").write_text("x")
            print("ready", flush=True)
            time.sleep(60)
        """,
        target,
    )
    assert len(names(tmp_path)) == 1 + exists
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0
    assert [(p, p.is_dir() or p.read_bytes()) for p in sorted(tmp_path.rglob("*"))] == before
