"""Freed memory: steps use it again inside the block, and it goes back after it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from loralloy import memory
from loralloy.memory import reused

# Two buffers of 100 MiB, filled and freed, six times: what a step of training does with its activations.
STEPS = """
import contextlib, resource, sys
import torch
from loralloy.memory import reused
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
def step():
    return [torch.ones(25 << 20).sum().item() for _ in range(2)]
step()
with reused(torch.device(sys.argv[1])) as kept:
    for _ in range(40):  # until the heap has room for what a step takes: 1 to 6 steps, by where small buffers lie
        before = faults()
        step()
        if faults() - before < 1000:
            break
    before = faults()
    for _ in range(6):
        step()
    seen = faults() - before
    with reused(torch.device(sys.argv[1])):
        pass
    inside = rss()
print(int(kept), seen, inside - rss())
"""


def steps(device):
    run = subprocess.run([sys.executable, "-c", STEPS, device], capture_output=True, text=True, check=True)
    return map(int, run.stdout.split())


@pytest.mark.skipif(memory._glibc("mallopt") is None, reason="another C library")
def test_steps_use_freed_memory_again_and_give_it_back_at_the_end():
    kept, faults, given_back = steps("cpu")
    assert kept == 1 and faults < 1000, "100 MiB of fresh pages are 25,600 faults"
    assert given_back >= 90
    kept, usual, given_back = steps("meta")
    assert kept == 0 and given_back < 10 and usual > 10 * faults, (
        "what it is for; with huge pages 600 faults, else 307,200"
    )


def test_an_inner_block_leaves_the_outer_one_as_it_is(monkeypatch):
    told = []
    monkeypatch.setattr(memory, "_glibc", lambda name: lambda *given: told.append((name, *given)))
    with pytest.raises(KeyError), reused(torch.device("cpu")):
        with reused(torch.device("cpu")):
            told.clear()
        assert told == []
        raise KeyError
    assert [t[0] for t in told[:2]] == ["mallopt", "mallopt"] and [t[2] for t in told[:2]] == list(memory._usual)
    monkeypatch.setattr(memory, "_glibc", lambda name: None)
    with reused(torch.device("cpu")) as kept:
        assert not kept
