"""Killed or interrupted at any moment, a command leaves what was there or what was asked for, and runs again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import delta, relative
from loralloy.adapter import Adapter
from loralloy.retrieval import HashEmbedder, Index
from world import build_index

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")

KILLS = """
import os, random, signal, sys, time
from loralloy.adapter import Adapter
from loralloy.cli import main
from loralloy.merging import merge
bank, target, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])

def overwrite_for_ever(first):
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    while True:
        for adapter in ("spam", "weather")[first:]:
            sys.argv = ["loralloy", "merge", f"{bank}/{adapter}", "-o", target, "--overwrite"]
            main()
        first = 0

rng, seen = random.Random(0), set()
for kill in range(kills):
    folder = os.stat(target).st_ino
    child = os.fork()
    if child == 0:
        overwrite_for_ever(kill % 2)
    deadline = time.monotonic() + 20
    while kill % 3 == 0 and os.stat(target).st_ino == folder and time.monotonic() < deadline:
        time.sleep(0.001)  # on a busy machine too, some are killed only after they have replaced the folder
    time.sleep(rng.uniform(0, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    adapter = Adapter.load(target).validate()  # never missing, never torn
    assert sorted(os.listdir(target)) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "recipe.yaml"]
    seen.add(adapter.provenance["merge"]["parents"][0]["name"])
print(*sorted(seen))
"""


def test_kill_9_while_overwriting(cli, world, tmp_path):
    target = tmp_path / "out"
    assert cli("merge", world.bank / "spam", "-o", target).code == 0
    command = [sys.executable, "-c", KILLS, str(world.bank), str(target), "25"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["spam", "weather"]  # both were met: the kills fell among whole runs
    assert cli("merge", world.bank / "cooking", "-o", target, "--overwrite").code == 0
    assert os.listdir(tmp_path) == ["out"]  # the next run has cleared what the killed left
    got, want = delta(Adapter.load(target).validate()), delta(Adapter.load(world.bank / "cooking"))
    assert max(relative(got[m], want[m]) for m in want) < 1e-3


def interrupt(tmp_path, patch, *arguments):
    """Run the command with `patch` done first, and press Ctrl-C once the file `busy` is there."""
    busy = tmp_path / "busy"
    code = f"{patch}\nfrom loralloy.cli import main\nmain()"
    command = [sys.executable, "-c", code.format(busy=str(busy)), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not busy.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert busy.exists(), err
    busy.unlink()
    assert process.returncode == 130, err
    assert "Traceback" not in err and "error" not in err.lower()
    return out


SLOW_MERGE = """
import pathlib, time
import loralloy.saving as saving
real = saving.AdapterWriter.write
def slow(self, *arguments):
    real(self, *arguments)
    pathlib.Path({busy!r}).touch()
    time.sleep(0.5)
saving.AdapterWriter.write = slow
"""


def test_ctrl_c_during_merge(cli, world, tmp_path):
    target = tmp_path / "out" / "m"
    assert cli("merge", world.bank / "spam", "-o", target).code == 0
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    out = interrupt(tmp_path, SLOW_MERGE, "merge", world.bank / "weather", "-o", target, "--overwrite")
    assert out == "" and {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert os.listdir(target.parent) == ["m"]
    assert cli("merge", world.bank / "weather", "-o", target, "--overwrite").code == 0


IN_THE_MIDDLE = """
import os, sys, time
from loralloy.bank import Bank
from loralloy.merging import stacking, merge
from loralloy.weights import Weights
folder, target, rule, done = sys.argv[1:5]
stacking._BUDGET = {"cpu": 1}  # one module a batch
seen = []

def stop(module):
    seen.append(module)
    if len(seen) == int(done):
        print(len(seen), flush=True)
        time.sleep(60)

bank = Bank.load(folder)
merge(bank, Weights.uniform(bank.names), rule, out=target, overwrite=True, on_module=stop)
"""


@pytest.mark.parametrize(("rule", "done", "there"), [("linear", 1, False), ("svd", 5, True), ("ties", 13, True)])
def test_kill_9_in_the_middle_of_a_streamed_merge(cli, world, tmp_path, rule, done, there):
    """Some modules are on disk, the others are not: no reader ever sees that, and the next run clears it away."""
    target = tmp_path / "m"
    if there:
        assert cli("merge", world.bank / "spam", "-o", target).code == 0
    before = {p.name: p.read_bytes() for p in target.iterdir()} if there else {}
    command = [sys.executable, "-c", IN_THE_MIDDLE, str(world.bank), str(target), rule, str(done)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == f"{done}\n"
        (left,) = tmp_path.glob(".m.new-*")  # it is being written, beside the target and nowhere else
        assert os.listdir(left) == ["adapter_model.safetensors"]
        assert (left / "adapter_model.safetensors").read_bytes()[:8] == bytes(8)  # no reader takes it for a whole one
    finally:
        process.kill()
        process.communicate()
    assert sorted(os.listdir(tmp_path)) == sorted([left.name, *(["m"] if there else [])])
    assert ({p.name: p.read_bytes() for p in target.iterdir()} if there else {}) == before
    if there:
        Adapter.load(target).validate()
    assert cli("merge", world.bank / "cooking", "-o", target, *(["--overwrite"] if there else [])).code == 0
    assert os.listdir(tmp_path) == ["m"]
    got, want = delta(Adapter.load(target).validate()), delta(Adapter.load(world.bank / "cooking"))
    assert max(relative(got[m], want[m]) for m in want) < 1e-3


SLOW_INDEX = """
import pathlib, time
import loralloy.retrieval as retrieval, loralloy.retrieval.index as index
class Slow(retrieval.HashEmbedder):
    def encode(self, texts, progress=False):
        pathlib.Path({busy!r}).touch()
        time.sleep(60)
retrieval.Embedder = index.Embedder = lambda model=None: Slow(128)
"""


def test_ctrl_c_during_index(cli, world, hashed, tmp_path):
    """A task that was being added is not there; the others answer as before; the next run finishes."""
    folder = build_index(world.tasks / "spam.yaml", tmp_path / "i")
    before = (folder / "manifest.json").read_bytes()
    interrupt(tmp_path, SLOW_INDEX, "index", world.tasks, "-o", folder)
    assert (folder / "manifest.json").read_bytes() == before
    with Index.open(folder, HashEmbedder(128)) as opened:
        assert opened.names == ["spam"]
    ran = cli("index", world.tasks, "-o", folder)
    assert ran.code == 0 and "unchanged spam" in ran.out and ran.out.count("indexed ") == 2
    with Index.open(folder, HashEmbedder(128)) as opened:
        assert opened.names == ["cooking", "spam", "weather"]
