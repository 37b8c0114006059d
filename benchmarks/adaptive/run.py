"""Adaptive merging on real data: trains the adapters, then computes cells, several processes side by side on one GPU.

    python benchmarks/adaptive/run.py --bench emoji4 sentiment4 --jobs 12 --until 540
    python benchmarks/adaptive/run.py --bench emoji4 --list          # what there is to do, in order
    python benchmarks/adaptive/report.py --write                     # docs/results/adaptive-*

Work is taken in the order of `plan.PARTS`; a process that comes to a group that another has goes on to the next. Stopped or
killed anywhere, the same command goes on: an adapter or a cell that is there is not made again. After --until seconds
nothing new is begun. A cell that fails is told, kept under OUT/errors, and tried again by the next call.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [p for p in (str(Path(__file__).resolve().parent), str(ROOT / "src")) if p not in sys.path]

from plan import BENCHES, PARTS  # noqa: E402
from worker import Worker, done, wanted  # noqa: E402

OUT = ROOT / ".assets/adaptive"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--bench", nargs="+", choices=list(BENCHES), default=["emoji4", "sentiment4"])
    found.add_argument(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        help="only these: " + "; ".join(f"{k}: {v[1]}" for k, v in PARTS.items()),
    )
    found.add_argument("--seeds", nargs="+", type=int, help="only these")
    found.add_argument("--jobs", type=int, default=1, help="processes side by side")
    found.add_argument("--until", type=float, default=1e9, help="seconds after which no training and no cell is begun")
    found.add_argument("--grace", type=float, default=30, help="seconds after that in which what has begun may end")
    found.add_argument("--pack", type=Path, help="put all cells into this .tar.xz at the end")
    found.add_argument("--gpus", type=int, help="GPUs that processes are spread over (default: all there are)")
    found.add_argument("--out", type=Path, help="adapters, cells, locks and errors (.assets/adaptive, a toy's in toy/)")
    found.add_argument("--device", help="cpu, cuda (default: the stream file's)")
    found.add_argument("--toy", action="store_true", help="few steps and rows: to see whether it runs, not a result")
    found.add_argument("--list", action="store_true", help="print the groups of cells in order, and stop")
    found.add_argument("--worker", nargs=3, metavar=("NUMBER", "DEADLINE", "RUN"), help=argparse.SUPPRESS)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(words)
    if options.out is None:
        options.out = OUT / "toy" if options.toy else OUT
    if options.list:
        return listed(options)
    if options.worker:
        return Worker(options).run()
    deadline, run = time.time() + options.until, secrets.token_hex(4)
    environment = os.environ | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    began = time.time()
    import torch

    gpus = options.gpus or torch.cuda.device_count()
    one_each = [
        environment | ({"CUDA_VISIBLE_DEVICES": str(n % gpus)} if gpus > 1 else {}) for n in range(options.jobs)
    ]
    command = [sys.executable, __file__, *words, "--worker"]
    workers = [subprocess.Popen([*command, str(n), str(deadline), run], env=one) for n, one in enumerate(one_each)]
    try:
        codes = [ended(worker, deadline + options.grace) for worker in workers]
    finally:
        for worker in workers:  # their files are whole: an adapter or a cell is there, or is not
            if worker.poll() is None:
                worker.kill()
    if options.pack:
        pack(options.out, options.pack)
    todo = [g for g in wanted(options) if not done(g, options.out)]
    cells = sum(1 for _ in (options.out / "cells").glob("*/*.json"))
    errors = len(list((options.out / "errors").glob(f"{run}-*")))
    print(
        f"{time.time() - began:.0f} s, {cells} cells; {len(todo)} groups of work left, {errors} errors in this call",
        flush=True,
    )
    return max(abs(code) for code in codes)


def ended(worker: subprocess.Popen[bytes], by: float) -> int:
    """Its exit code; 0 for one that is still busy with its last piece of work when time is up."""
    try:
        return worker.wait(max(0.0, min(by - time.time(), 1e8)))
    except subprocess.TimeoutExpired:
        return 0


def pack(out: Path, target: Path) -> None:
    """All cells, and what went wrong, as one archive."""
    import tarfile

    with tarfile.open(target, "w:xz") as tar:
        for name in ("cells", "errors"):
            if (out / name).is_dir():
                tar.add(out / name, name)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB", flush=True)


def listed(options: argparse.Namespace) -> int:
    total = [0, 0]
    for group in wanted(options):
        names = [job.name for job in group.jobs] + [cell.name for cell in group.cells]
        total[0] += len(group.jobs)
        total[1] += len(group.cells)
        said = "done" if done(group, options.out) else "    "
        print(
            f"{said} {group.bench} {group.part:5} s{group.seed} {len(names):3}: {names[0]}{' ...' if len(names) > 1 else ''}"
        )
    print(f"{total[0]} trainings, {total[1]} cells")
    return 0


if __name__ == "__main__":
    sys.exit(main())
