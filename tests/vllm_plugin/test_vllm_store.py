"""The cache on disk: whole folders or none, one maker, a limit, and nothing deleted that a living process holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from loralloy.errors import LoralloyError
from loralloy.vllm_plugin.store import REPORT, Full, Store

KEYS = [c * 32 for c in "0123456789abcdef"]


def maker(size=1000, seen=None):
    def make(folder):
        if seen is not None:
            seen.append(folder)
        (folder / "adapter.bin").write_bytes(b"x" * (size - 2))
        (folder / REPORT).write_text("{}")

    return make


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "cache", 3500)
    yield made
    made.close()


def test_made_once_and_whole(store):
    seen = []
    assert store.take(KEYS[0], 1000, maker(seen=seen))
    assert not store.take(KEYS[0], 1000, maker(seen=seen))
    assert len(seen) == 1 and seen[0] != store.path(KEYS[0])
    assert sorted(p.name for p in store.path(KEYS[0]).iterdir()) == ["adapter.bin", REPORT]
    assert (store.held, store.size) == ({KEYS[0]}, 1000)


def test_a_failed_make_leaves_nothing(store):
    def fail(folder):
        (folder / "adapter.bin").write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        store.take(KEYS[0], 1000, fail)
    assert not store.has(KEYS[0]) and not store.held
    assert [p.name for p in store.folder.iterdir() if KEYS[0] in p.name] == []


def test_threads_and_processes_make_one_thing_once(store):
    other, seen, wait = Store(store.folder, 3500), [], threading.Event()

    def slow(folder):
        assert wait.wait(20)
        maker(seen=seen)(folder)

    threads = [threading.Thread(target=s.take, args=(KEYS[0], 1000, slow)) for s in (store, store, other)]
    for thread in threads:
        thread.start()
    wait.set()
    for thread in threads:
        thread.join(20)
    assert len(seen) == 1
    assert store.held == other.held == {KEYS[0]}
    other.close()


def test_the_one_used_longest_ago_goes(store):
    for i, key in enumerate(KEYS[:3]):
        store.take(key, 1000, maker())
        os.utime(store.path(key), (i, i))
    store.hold(KEYS[0])  # used again
    for key in KEYS[:3]:
        store.release(key)
    assert store.take(KEYS[3], 1000, maker())
    assert [store.has(k) for k in KEYS[:4]] == [True, False, True, True]
    assert store.evicted == 1


def test_what_is_held_stays(store):
    other = Store(store.folder, 3500)
    for key in KEYS[:2]:
        store.take(key, 1000, maker())
    other.take(KEYS[2], 1000, maker())
    with pytest.raises(Full, match=r"3 merged adapters are held.*LORALLOY_CACHE_GIB"):
        store.take(KEYS[3], 1000, maker())
    assert all(store.has(k) for k in KEYS[:3])
    other.close()  # as a process that ends
    assert store.take(KEYS[3], 1000, maker())
    assert [store.has(k) for k in KEYS[:4]] == [True, True, False, True]


def test_too_large_is_said(store):
    with pytest.raises(Full, match="raise LORALLOY_CACHE_GIB"):
        store.take(KEYS[0], 4000, maker())


def test_a_killed_process_holds_nothing_and_leaves_no_half_folder(store):
    code = (
        "import sys, time; from pathlib import Path; from loralloy.vllm_plugin.store import Store\n"
        "store = Store(Path(sys.argv[1]), 3500)\n"
        "def make(folder):\n"
        "    (folder / 'adapter.bin').write_bytes(b'x' * 998); (folder / 'loralloy.json').write_text('{}')\n"
        "store.take('1' * 32, 1000, make)\n"
        "def hang(folder):\n"
        "    (folder / 'half').write_bytes(b'half'); print('making', flush=True); time.sleep(60)\n"
        "store.take('2' * 32, 1000, hang)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(store.folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "making\n"
    for key in (KEYS[3], KEYS[4]):
        store.take(key, 1000, maker())
    with pytest.raises(Full):  # it lives, and holds one
        store.take(KEYS[5], 1000, maker())
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    assert not store.has(KEYS[2])
    assert store.take(KEYS[5], 1000, maker())  # in the place of what the dead one held
    assert not store.has(KEYS[1])
    store.sweep()
    assert not list(store.folder.glob("*half*")) and not list(store.folder.glob(".*.new-*"))
    assert store.folder.joinpath(".held").iterdir()
    assert len(list(store.folder.joinpath(".held").iterdir())) == 1


def test_a_sweep_leaves_what_is_being_made(store):
    inside, go = threading.Event(), threading.Event()

    def slow(folder):
        inside.set()
        assert go.wait(20)
        maker()(folder)

    thread = threading.Thread(target=store.take, args=(KEYS[0], 1000, slow))
    thread.start()
    assert inside.wait(20)
    Store(store.folder, 3500).sweep()
    go.set()
    thread.join(20)
    assert store.has(KEYS[0])


def test_what_was_left_under_a_number_that_lives_again_is_swept(store):
    """In a container the next server has the number of the one that was killed."""
    left = store.folder / f".{KEYS[0]}.new-{os.getpid()}-0a1b2c3d"
    left.mkdir()
    (left / "half").write_bytes(b"half")
    theirs = store.folder / f".notes.new-{os.getpid()}-0a1b2c3d"  # of nobody here
    theirs.mkdir()
    store.sweep()
    assert not left.exists() and theirs.exists()


def test_a_folder_without_its_report_is_made_anew(store):
    store.path(KEYS[0]).mkdir()
    (store.path(KEYS[0]) / "adapter.bin").write_bytes(b"half")
    assert store.take(KEYS[0], 1000, maker()) and store.has(KEYS[0]) and store.size == 1000
    assert not list(store.folder.glob(".gone-*"))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoralloyError, match="LORALLOY_CACHE"):
        Store(tmp_path / "file" / "cache", 1000)
