"""Merging from disk to disk at Llama-2-7B's shapes: peak anonymous memory, and seconds against a plain copy of the inputs.

Examples:
    python benchmarks/merge_memory.py --write            # linear and svd at 32 and 64 layers, ties on dW at 2 and 4
    python benchmarks/merge_memory.py --layers 8 16 --delta-layers 1 2

Makes four random rank-64 bf16 adapters in a temporary folder (1.3 GB at 32 layers), merges them in a process of its own, and
samples that process's RssAnon (Linux) every 5 ms: file pages that the inputs are mapped from are not counted, as the
system takes them back when it needs to. "Beyond import torch" is the peak less what the process held once torch was
imported. The copy is `cp --reflink=never` of the same inputs. Merge and copy take turns, both warm and with nothing left to be
written by others; the least of each counts, as whatever else runs only adds to it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from loralloy.adapter_config import AdapterConfig
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef
from loralloy.factors import LoraFactors
from loralloy.saving import AdapterWriter, outline

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "merging-memory.md"
RANK, HIDDEN, MLP = 64, 4096, 11008
EACH = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}  # fmt: skip

CHILD = """
import json, sys, threading, time
import torch
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
torch.ones(8, 8) @ torch.ones(8, 8)
base = anonymous()
peak, running = base, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.005)
thread = threading.Thread(target=watch, daemon=True)
thread.start()
from loralloy import Bank, Weights
from loralloy.merging import merge
options = json.loads(sys.argv[1])
folders, out = options.pop("folders"), options.pop("out")
bank = Bank.load(folders)
start = time.perf_counter()
merged = merge(bank, Weights(dict(zip(bank.names, [0.4, 0.3, 0.2, -0.1]))), out=out, overwrite=True, **options)
seconds = time.perf_counter() - start
running = False
thread.join()
print(json.dumps({"peak": peak - base, "base": base, "seconds": seconds, "error": merged.report.error}))
"""


def make(folder: Path, layers: int, adapter: int) -> Path:
    """One random adapter, written as it is drawn."""
    g = torch.Generator().manual_seed(adapter)
    names = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in EACH.items()}
    scaling = (0.5, 1.0, 2.0, 1.0)[adapter]
    outlines = {n: outline((RANK, i), (o, RANK), torch.bfloat16, scaling) for n, (o, i) in names.items()}
    folder.mkdir()
    with AdapterWriter(folder, folder.name, BaseRef("base"), AdapterConfig(RANK, RANK), outlines) as writer:
        for n, (o, i) in names.items():
            a = (torch.randn(RANK, i, generator=g) / i**0.5).to(torch.bfloat16)
            b = (torch.randn(o, RANK, generator=g) * 0.1).to(torch.bfloat16)
            writer.write(n, LoraFactors(a, b, scaling))
        writer.finish()
    return folder


def run(folders: list[Path], out: Path, threads: int, **options: Any) -> dict[str, float]:
    text = json.dumps(options | {"folders": [str(f) for f in folders], "out": str(out)})
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", CHILD, text], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def copied(folders: list[Path], to: Path) -> float:
    to.mkdir()
    settle()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", *map(str, folders), str(to)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(to)
    return seconds


def settle() -> None:
    """Have the system write what it holds back: else whoever writes next pays for it."""
    if hasattr(os, "sync"):
        os.sync()


def hashed(folders: list[Path]) -> float:
    """Seconds that one core takes to hash the inputs."""
    bank = Bank.load(folders)
    start = time.perf_counter()
    for name in bank.names:
        bank[name].content_hash  # noqa: B018
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 64])
    parser.add_argument(
        "--delta-layers", type=int, nargs="+", default=[2, 4], help="for ties on dW, which takes minutes a layer"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", help="where to put the adapters (default: the system's temporary folder)")
    parser.add_argument("--write", action="store_true", help=f"write docs/results/{RESULT.name}")
    given = parser.parse_args()
    rows: list[str] = []
    speed: list[str] = []
    hashing = float("inf")
    for layers in sorted({*given.layers, *given.delta_layers}):
        with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
            root = Path(temporary)
            folders = [make(root / f"a{i}", layers, i) for i in range(4)]
            size = sum(p.stat().st_size for f in folders for p in f.iterdir()) / 1e9
            cases: list[dict[str, Any]] = []
            if layers in given.layers:
                cases += [{"rule": "linear", "space": "factors", "measure": m} for m in ("none", "estimate", "exact")]
                cases += [{"rule": "svd", "space": "delta", "rank": RANK, "measure": "exact"}]
            if layers in given.delta_layers:
                cases += [{"rule": "ties", "space": "delta", "rank": RANK, "measure": "exact"}]
            for case in cases:
                compared = case["rule"] == "linear" and layers == min(given.layers)
                found, copies = [], []
                for _ in range((9 if case["measure"] == "none" else 3) if compared else 1):
                    shutil.rmtree(root / "out", ignore_errors=True)  # a new output each time, as the copy has
                    settle()
                    found.append(run(folders, root / "out", given.threads, **case))
                    copies += [copied(folders, root / "copy")] if compared else []
                peak, seconds = max(f["peak"] for f in found), min(f["seconds"] for f in found)
                label = f"{case['rule']} ({case['space']}), error {case['measure']}"
                rows.append(f"| {label} | {layers} | {size:.2f} | **{peak:.0f}** | {seconds:.1f} |")
                print(rows[-1], flush=True)
                if compared:
                    plain = min(copies)
                    hashing = min(hashing, *(hashed(folders) for _ in range(3)))
                    speed.append(f"| {label} | {seconds:.2f} | {plain:.2f} | **{seconds / plain:.1f}** |")
                    print(speed[-1], flush=True)
    page = "\n".join([
        "# Merging from disk to disk",
        "",
        f"Four random rank-{RANK} bf16 adapters at Llama-2-7B's shapes (seven projections a layer), merged into one; "
        f"`python benchmarks/merge_memory.py --write` makes this page. {given.threads} threads, {platform.machine()}, torch "
        f"{torch.__version__}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}.",
        "",
        "| merge | layers | inputs, GB | peak anonymous memory beyond `import torch`, MB | seconds |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "Against `cp --reflink=never` of the same inputs, both warm, taking turns, the least of several runs. Ours also syncs "
        f"its output to disk and hashes every input, which alone takes one core {hashing:.2f} s:",
        "",
        "| merge | ours, s | cp, s | times cp |",
        "|---|---|---|---|",
        *speed,
        "",
    ])  # fmt: skip
    print(page)
    if given.write:
        RESULT.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
