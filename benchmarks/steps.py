"""What it brings on a CPU that steps of learning use freed memory again (loralloy.memory.reused), beside glibc's usual way.

    python benchmarks/steps.py --write        # docs/results/steps.md

`learn` with its defaults but for the number of steps: --per-class training rows a class of four sentiment tasks, four of the
shipped adapters. Each run is a process of its own, and the two ways take turns. glibc alone has this: elsewhere both are one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [p for p in (str(ROOT / "src"),) if p not in sys.path]

TASKS = ("sentiment_tweets", "sentiment_movies", "sentiment_products", "sentiment_editorials")
WAYS = ("usual", "reused")
PAGE = 4096


def work(options: argparse.Namespace) -> dict[str, Any]:
    """One run of one way: its seconds, those in the system, and its page faults."""
    import torch

    import loralloy.weighting.learned.fit as fit
    from loralloy.bank import Bank
    from loralloy.live.base import load_base
    from loralloy.tasks.few import draw_few
    from loralloy.weighting.learned import LearnConfig, TextObjective

    if options.way == "usual":
        fit.reused = lambda device: contextlib.nullcontext(False)
    model, tokenizer = load_base(options.model, "float32", "cpu")
    bank = Bank.load([ROOT / "examples/bank" / name for name in TASKS])
    tasks = [ROOT / f"examples/tasks/{name}.yaml" for name in TASKS]
    objective = TextObjective(model, tokenizer, draw_few(tasks, options.per_class))
    before = resource.getrusage(resource.RUSAGE_SELF)
    done = fit.learn(model, bank, objective, config=LearnConfig(steps=options.steps), progress=False)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "losses": [step["loss"] for step in done.history], "rows": objective.size, "steps": options.steps,
        "seconds": done.seconds, "system": after.ru_stime - before.ru_stime, "faults": after.ru_minflt - before.ru_minflt,
        "peak": after.ru_maxrss / 1e6, "where": f"CPU, {torch.get_num_threads()} threads; torch {torch.__version__}",
    }  # fmt: skip


def page(runs: dict[str, list[dict[str, Any]]]) -> str:
    one = runs["usual"][0]
    lines = [
        "# Learning on a CPU: freed memory used again, and not",
        "",
        f"Made by `python benchmarks/steps.py --write`: {one['where']}.",
        f"`learn` on {one['rows']} rows, {one['steps']} steps, SmolLM2-135M-Instruct in float32, four adapters, linear. "
        f"{len(runs['usual'])} runs each way, each a process, taking turns; medians and ranges.",
        "",
        "| freed memory | seconds | of them in the system | pages from the system, GB | peak, GB |",
        "|---|---:|---:|---:|---:|",
    ]
    for way, some in runs.items():
        told = [
            f"{median(x):.1f} ({min(x):.1f} to {max(x):.1f})"
            for x in ([r[k] for r in some] for k in ("seconds", "system"))
        ]
        faults, peak = (median(run[key] for run in some) for key in ("faults", "peak"))
        lines.append(f"| {way} | {' | '.join(told)} | {faults * PAGE / 1e9:.1f} | {peak:.1f} |")
    same = len({tuple(run["losses"]) for some in runs.values() for run in some}) == 1
    usual, again = (median(run["seconds"] for run in runs[way]) for way in WAYS)
    lines += [
        "",
        f"**{usual / again:.2f} times faster** with freed memory used again; the losses of all steps are "
        f"{'the same to the digit' if same else 'not the same to the digit'} in all runs.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="steps.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(ROOT / ".assets/models/SmolLM2-135M-Instruct"))
    add("--per-class", type=int, default=5)
    add("--steps", type=int, default=4)
    add("--runs", type=int, default=2)
    add("--way", choices=WAYS, help=argparse.SUPPRESS)
    add("--write", nargs="?", type=Path, const=ROOT / "docs/results", help="write steps.md there")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(work(options)))
        return 0
    if min(options.runs, options.steps, options.per_class) < 1:
        raise SystemExit("--runs, --steps and --per-class are numbers from 1")
    if not Path(options.model).is_dir():
        raise SystemExit(f"{options.model} is not there; `make demo` makes the model")
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for turn in range(options.runs):
        for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
            words = [sys.executable, __file__, "--way", way, "--model", options.model]
            words += ["--per-class", str(options.per_class), "--steps", str(options.steps)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"the run of {way!r} failed; what it said stands above")
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(way, json.dumps(runs[way][-1]), flush=True)
    text = page(runs)
    print(text)
    if options.write:
        from loralloy.atomic import atomic_file

        atomic_file(options.write / "steps.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
