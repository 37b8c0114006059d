"""A real vLLM server on this machine's CPU, and the compositions that it is asked for."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
BASE = "the-base"


def vllm_python() -> str | None:
    """The Python that has vLLM: LORALLOY_VLLM_PYTHON, or this one; None if there is none."""
    return os.environ.get("LORALLOY_VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)


@dataclass
class Vllm:
    url: str
    log: Path
    cache: Path
    process: subprocess.Popen

    def ask(self, model: str, prompt: str, **more: Any) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0} | more
        return httpx.post(self.url + "/v1/completions", json=body, timeout=300)

    @property
    def merges(self) -> list[str]:
        """The compositions merged so far, by the server's log."""
        return re.findall(r"'(.*)' merged in ", self.log.read_text(errors="replace"))

    @property
    def kept(self) -> list[Path]:
        return sorted(p.parent for p in self.cache.glob("*/loralloy.json"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def vllm_server(model: Path, bank: Path, folder: Path, *flags: str, **environment: str) -> Iterator[Vllm]:
    """Started, answering, and gone with the block. The folder gets its cache and its log."""
    port, cache, log = free_port(), folder / "cache", folder / "vllm.log"
    python = vllm_python()
    assert python is not None
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model), "--served-model-name", BASE, "--host", "127.0.0.1", "--port", str(port),
        "--enable-lora", "--max-lora-rank", "16", "--max-loras", "8", "--max-cpu-loras", "12",
        "--max-model-len", "512", "--max-num-seqs", "16", "--dtype", "float32", "--enforce-eager", *flags,
    ]  # fmt: skip
    given = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "LORALLOY_BANK": str(bank), "LORALLOY_CACHE": str(cache), "LORALLOY_CACHE_GIB": "2",
    }  # fmt: skip
    with running(command, log, given | environment, f"http://127.0.0.1:{port}", "/health", 240) as process:
        yield Vllm(f"http://127.0.0.1:{port}", log, cache, process)


@contextlib.contextmanager
def running(
    command: list[str], log: Path, environment: dict[str, str], url: str, path: str, seconds: float
) -> Iterator[subprocess.Popen]:
    """A server in a session of its own, which answers at url + path; ended with all that it started."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORALLOY_", "VLLM_", "OMP_"))}
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=kept | environment,
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(url + path, timeout=5)
                break
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"it did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(1)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def compositions(bank: list[str], count: int, seed: int = 0) -> list[str]:
    """Distinct ones: weighted sums of one to four adapters, with signs, and other rules and ranks among them."""
    draw = random.Random(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        names = draw.sample(bank, draw.randint(2, 4))
        text = ""
        for i, name in enumerate(names):
            sign = "" if i == 0 else " - " if draw.random() < 0.15 else " + "
            text += f"{sign}{draw.choice((0.3, 0.5, 0.7, 0.9, 1.2))}*{name}"
        kind = len(made) % 10
        if kind == 7:
            text += f" @ ties(density={draw.choice((0.3, 0.6))}, space=factors)"
        elif kind == 8:
            text += f" @ dare_linear(density=0.5, seed={draw.randint(0, 9)}, space=factors)"
        elif kind == 9:
            text += " @ svd(rank=5)"
        made[text] = None
    return list(made)
