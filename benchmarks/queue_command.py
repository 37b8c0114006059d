"""The command of a queue of work: its flags, its list of what there is to do, and the processes that it starts side by side."""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from queue_cells import STOP

if TYPE_CHECKING:
    from sites import SiteWorker


def add_flags(parser: argparse.ArgumentParser, out: str, parts: Mapping[str, str]) -> None:
    """The flags that every such command has. parts: of the work -> what each is."""
    add = parser.add_argument
    told = "; ".join(f"{name}: {what}" for name, what in parts.items())
    add("--parts", nargs="+", choices=list(parts), help=f"only these: {told}")
    add("--seeds", nargs="+", type=int, help="only these")
    add("--jobs", type=int, default=1, help="processes side by side")
    add(
        "--until",
        type=float,
        default=1e9,
        help="seconds after which no training and no cell is begun (`touch OUT/stop` ends it so too)",
    )
    add("--grace", type=float, default=30, help="seconds after that in which what has begun may end")
    add("--pack", type=Path, help="put all cells into this .tar.xz at the end")
    add("--gpus", type=int, help="GPUs that processes are spread over (default: all there are)")
    add("--out", type=Path, help=f"adapters, cells, locks and errors ({out}, a toy's in toy/)")
    add("--device", help="cpu, cuda (default: the plan's)")
    add("--toy", action="store_true", help="few steps and rows: to see whether it runs, not a result")
    add("--list", action="store_true", help="print the groups of cells in order, and stop")
    add("--worker", nargs=3, metavar=("NUMBER", "DEADLINE", "RUN"), help=argparse.SUPPRESS)
    parser.set_defaults(packed=())


def settle(options: argparse.Namespace, out: Path) -> argparse.Namespace:
    """With the folder that goes without saying: a toy never lies beside results."""
    if options.out is None:
        options.out = out / "toy" if options.toy else out
    return options


def command(
    file: str,
    argv: Sequence[str] | None,
    parser: argparse.ArgumentParser,
    out: Path,
    worker: type[SiteWorker],
    listed: Callable[[argparse.Namespace], int],
) -> int:
    """What a command does: list the work, be one of the processes that do it, or start them."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = settle(parser.parse_args(words), out)
    if options.list:
        return listed(options)
    if options.worker:
        return worker(options).run()
    return launch(file, words, options, lambda: sum(not worker.done(g, options.out) for g in worker.wanted(options)))


def list_groups(options: argparse.Namespace, worker: type[SiteWorker], width: int, by_part: bool = False) -> int:
    """Print the groups of work in order, and how many trainings and cells there are. width: of the parts' names."""
    by: dict[str, list[int]] = {}
    for group in worker.wanted(options):
        names = [job.name for job in group.jobs] + [cell.name for cell in group.cells]
        count = by.setdefault(f"{group.site} {group.part}", [0, 0])
        count[0] += len(group.jobs)
        count[1] += len(group.cells)
        said = "done" if worker.done(group, options.out) else "    "
        some = f"{names[0]}{' ...' if names[1:] else ''}"
        print(f"{said} {group.site} {group.part:{width}} s{group.seed} {len(names):3}: {some}")
    if by_part:
        for name, (jobs, cells) in by.items():
            print(f"{name}: {jobs} trainings, {cells} cells")
    print(f"{sum(jobs for jobs, _ in by.values())} trainings, {sum(cells for _, cells in by.values())} cells")
    return 0


def launch(file: str, words: Sequence[str], options: argparse.Namespace, left: Callable[[], int]) -> int:
    """Run the same command in options.jobs processes (``--worker``), and say what is left."""
    deadline, run = time.time() + options.until, secrets.token_hex(4)
    (options.out / STOP).unlink(missing_ok=True)
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
    command = [sys.executable, file, *words, "--worker"]
    workers = [subprocess.Popen([*command, str(n), str(deadline), run], env=one) for n, one in enumerate(one_each)]
    try:
        codes = [_ended(worker, deadline + options.grace) for worker in workers]
    finally:
        for worker in workers:  # their files are whole: an adapter or a cell is there, or is not
            if worker.poll() is None:
                worker.kill()
    if options.pack:
        pack(options.out, options.pack, options.packed)
    cells = sum(1 for _ in (options.out / "cells").glob("*/*.json"))
    errors, later = (len(list((options.out / "errors").glob(f"{run}-*.{kind}"))) for kind in ("txt", "later"))
    put_off = f", {later} put off for lack of memory" if later else ""
    print(
        f"{time.time() - began:.0f} s, {cells} cells; {left()} groups of work left, {errors} errors in this call{put_off}",
        flush=True,
    )
    return max(abs(code) for code in codes)


def _ended(worker: subprocess.Popen[bytes], by: float) -> int:
    """Its exit code; 0 for one that is still busy with its last piece of work when time is up."""
    try:
        return worker.wait(max(0.0, min(by - time.time(), 1e8)))
    except subprocess.TimeoutExpired:
        return 0


def pack(out: Path, target: Path, folders: Sequence[str] = ()) -> None:
    """All cells, and what went wrong, as one archive."""
    import tarfile

    with tarfile.open(target, "w:xz") as tar:
        for name in ("cells", "errors", *folders):
            if (out / name).is_dir():
                tar.add(out / name, name)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB", flush=True)
