"""Memory of a long-running server: what is freed goes back, and a large bank stays on disk."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers import close, logits, tiny_llama
from loralloy import memory
from loralloy.bank import Bank
from loralloy.live import LiveModel
from loralloy.live.paged import PagedModel
from loralloy.memory import keep_steady
from loralloy.serving import engine as engine_
from loralloy.serving.sampling import Sampling
from loralloy.weights import Weights

# Buffers of 4 MiB are freed one by one, while small ones between them live: without a word to malloc they leave holes.
CHURN = """
import sys
from loralloy.memory import keep_steady
if sys.argv[1] == "steady":
    keep_steady()
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
del_me = bytearray(30 << 20)
del del_me
before, kept = rss(), []
large = []
for _ in range(50):
    large.append(bytearray(b"x") * (4 << 20))
    kept.append(bytearray(b"x") * (200 << 10))
large.clear()
print(rss() - before)
"""


# A stack of adapters that grows: each time a little too large for the hole that the last one left.
HOLES = """
import sys
from loralloy.memory import give_back, keep_steady
keep_steady()
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
before, kept = rss(), []
for _ in range(2000):
    hole = bytearray(b"x") * (100 << 10)
    kept.append(bytearray(b"x") * 1000)
    del hole
    kept.append(bytearray(b"x") * (101 << 10))
del kept[1::2]
high = rss() - before
given = give_back()
print(high, rss() - before, given)
"""

glibc = pytest.mark.skipif(not (sys.platform.startswith("linux") and keep_steady()), reason="needs glibc")


@glibc
def test_holes_go_back():
    done = subprocess.run(
        [sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    high, left, given = done.stdout.split()
    assert int(high) > 100 and given == "True"
    assert int(left) < 40  # what is kept has 2 MiB


def test_where_there_is_nothing_to_tell_it_is_said(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda name: None)
    assert (memory.give_back(), memory.keep_steady()) == (False, False)


def test_memory_goes_back_while_rows_run_and_after(scheduler, monkeypatch):
    """Every so often between two steps, and once when there is nothing left to do."""
    calls, running = [], []
    monkeypatch.setattr(engine_, "GIVE_BACK", 0.05)
    monkeypatch.setattr(engine_, "give_back", lambda: calls.append(made.running))
    made = engine_.Engine(scheduler)
    scheduler.ends = set()
    step = scheduler.step
    monkeypatch.setattr(scheduler, "step", lambda: (time.sleep(0.02), step(), running.append(len(calls))))
    made.start()

    async def go():
        with made.stream([[40, 41]], [Weights({"spam": 1.0})], [Sampling(max_tokens=20)]) as stream:
            async for _ in stream:
                pass
        await asyncio.sleep(0.3)

    asyncio.run(go())
    busy = running[-1]
    assert 2 <= busy < len(running) and set(calls[1:busy]) == {1}
    assert len(calls) == busy + 1 and calls[-1] == 0  # once: nothing came since
    made.stop()


def test_nobody_waits_while_memory_goes_back(scheduler, monkeypatch):
    """The event loop takes the engine's lock for each request; giving back a large heap may take long."""
    free, made = [], engine_.Engine(scheduler)

    def slow():
        asked = threading.Thread(target=made.cancel, args=([],))
        asked.start()
        asked.join(5)
        free.append(not asked.is_alive())

    monkeypatch.setattr(engine_, "GIVE_BACK", 0.05)
    monkeypatch.setattr(engine_, "give_back", slow)
    made.start()

    async def go():
        with made.stream([[40, 41]], [Weights({"spam": 1.0})], [Sampling(max_tokens=3)]) as stream:
            async for _ in stream:
                pass
        while len(free) < 2:
            await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(go(), 30))
    assert len(free) >= 2 and all(free)
    made.stop()


@glibc
def test_freed_buffers_go_back():
    left = {}
    for how in ("steady", "default"):
        done = subprocess.run(
            [sys.executable, "-c", CHURN, how], capture_output=True, text=True, check=True, env=dict(os.environ)
        )
        left[how] = int(done.stdout)
    assert left["steady"] < 40  # what is kept has 10 MiB
    assert left["default"] > 150  # else there is nothing to be steady about


def write_adapter(folder: Path, seed: int, base: str) -> None:
    """An adapter of rank 1 on q_proj and v_proj, in PEFT's format."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for name, out in (("q_proj", 32), ("v_proj", 16)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}."
            tensors[at + "lora_A.weight"] = torch.randn(1, 32, generator=g)
            tensors[at + "lora_B.weight"] = 0.2 * torch.randn(out, 1, generator=g)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": base, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_a_thousand_adapters_through_a_small_memory(tmp_path):
    """Only those in use and the last few others are in memory, whoever asks; and each row has its own."""
    for i in range(1000):
        write_adapter(tmp_path / f"a{i:03d}", i, "tiny/llama")
    bank, base = Bank.load(tmp_path), tiny_llama()
    ids = torch.arange(3, 35).reshape(4, 8)
    paged = PagedModel(base, bank, resident=16)
    assert paged.loaded == [] and len(paged.names) == 1000
    g = torch.Generator().manual_seed(0)
    most = 0
    for step in range(120):
        chosen = torch.randint(1000, (4, 2), generator=g).tolist()
        rows = [Weights({f"a{i:03d}": 0.7, f"a{j:03d}": -0.4}) for i, j in chosen]
        paged.set(rows)
        most = max(most, len(paged.loaded))
        stacked = sum(group.A.shape[0] for group in paged._groups) / len(paged._groups)
        assert stacked <= 2 * 2 * 64  # q and v: ranks in the stack, spare ones included
        if step % 40 == 0:
            got = logits(base, ids)
            paged.set(None)
            live = LiveModel(base, bank.select(sorted({n for row in rows for n in row.names})))
            with live.compose(rows):
                assert close(got, logits(base, ids))
            live.remove()
    assert most <= 16
    paged.close()
