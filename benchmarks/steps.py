"""What it brings on a CPU that steps of learning use freed memory again (loralloy.memory.reused), beside glibc's usual way.

    python benchmarks/steps.py --write        # docs/results/steps.md

Steps of `loralloy learn`: loss and gradient of --rows training rows of four sentiment tasks under four of the shipped adapters.
Each run is a process of its own, the two ways take turns, and a first step of each is left out. glibc alone has this: elsewhere
both ways are one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [p for p in (str(ROOT / "src"),) if p not in sys.path]

TASKS = ("sentiment_tweets", "sentiment_movies", "sentiment_products", "sentiment_editorials")
WAYS = ("usual", "reused")
PAGE = 4096


def work(options: argparse.Namespace) -> dict[str, Any]:
    """One run of one way: seconds of each step, and of all of them the system's seconds and the page faults."""
    import torch

    from loralloy.bank import Bank
    from loralloy.live.base import load_base
    from loralloy.live.learnable import Learnable
    from loralloy.memory import reused
    from loralloy.tasks.few import draw_few
    from loralloy.weighting.learned import TextObjective

    model, tokenizer = load_base(options.model, "float32", "cpu")
    bank = Bank.load([ROOT / "examples/bank" / name for name in TASKS])
    tasks = [ROOT / f"examples/tasks/{name}.yaml" for name in TASKS]
    objective = TextObjective(model, tokenizer, draw_few(tasks, options.rows // 8))
    live = Learnable(model, bank, "linear", "delta")
    table = torch.full((len(live.modules), len(live.names)), 0.3)
    rows = list(range(objective.size))

    def step() -> float:
        began, leaf = time.perf_counter(), table.clone().requires_grad_()
        with live.at(leaf):
            loss = objective.loss(rows)
            (slope,) = torch.autograd.grad(loss, leaf)
        found["loss"], found["slope"] = float(loss.detach()), float(slope.norm())
        return time.perf_counter() - began

    found: dict[str, Any] = {}
    with reused(torch.device("cpu")) if options.way == "reused" else contextlib.nullcontext():
        step()
        before = resource.getrusage(resource.RUSAGE_SELF)
        times = [step() for _ in range(options.steps)]
        after = resource.getrusage(resource.RUSAGE_SELF)
    system, faults = after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt
    return {
        **found, "rows": objective.size, "seconds": times, "system": system / options.steps,
        "faults": faults / options.steps, "peak": after.ru_maxrss / 1e6,
        "where": f"CPU, {torch.get_num_threads()} threads; torch {torch.__version__}",
    }  # fmt: skip


def page(runs: dict[str, list[dict[str, Any]]]) -> str:
    one = runs["usual"][0]
    lines = [
        "# Steps on a CPU: freed memory used again, and not",
        "",
        f"Made by `python benchmarks/steps.py --write`: {one['where']}.",
        f"Loss and gradient of {one['rows']} rows, SmolLM2-135M-Instruct in float32, four adapters, linear. "
        f"{len(runs['usual'])} runs of {len(one['seconds'])} steps each way, each a process, taking turns; the median step "
        "and the range over runs' medians.",
        "Faults are the fresh pages that a step asked the system for.",
        "",
        "| freed memory | a step, s | of it in the system, s | faults, GB a step | peak, GB |",
        "|---|---:|---:|---:|---:|",
    ]
    steps = {way: [median(run["seconds"]) for run in some] for way, some in runs.items()}
    for way, some in runs.items():
        mean = {key: sum(run[key] for run in some) / len(some) for key in ("system", "faults", "peak")}
        lines.append(
            f"| {way} | {median(steps[way]):.2f} ({min(steps[way]):.2f} to {max(steps[way]):.2f}) | {mean['system']:.2f} "
            f"| {mean['faults'] * PAGE / 1e9:.2f} | {mean['peak']:.1f} |"
        )
    same = len({(run["loss"], run["slope"]) for some in runs.values() for run in some}) == 1
    lines += [
        "",
        f"**{median(steps['usual']) / median(steps['reused']):.2f} times faster** with freed memory used again; loss and "
        f"gradient are {'the same to the digit' if same else 'not the same to the digit'} in all runs.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="steps.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(ROOT / ".assets/models/SmolLM2-135M-Instruct"))
    add("--rows", type=int, default=32, help="a multiple of 8")
    add("--steps", type=int, default=4)
    add("--runs", type=int, default=3)
    add("--way", choices=WAYS, help=argparse.SUPPRESS)
    add("--write", nargs="?", type=Path, const=ROOT / "docs/results", help="write steps.md there")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(work(options)))
        return 0
    if not Path(options.model).is_dir():
        raise SystemExit(f"{options.model} is not there; `make demo` makes the model")
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for turn in range(options.runs):
        for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
            words = [sys.executable, __file__, "--way", way, "--model", options.model]
            words += ["--rows", str(options.rows), "--steps", str(options.steps)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"the run of {way!r} failed; what it said stands above")
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(way, json.dumps(runs[way][-1]), flush=True)
    text = page(runs)
    print(text)
    if options.write:
        (options.write / "steps.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
