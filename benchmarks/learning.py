"""How long learning a merge's coefficients takes: with a step recorded as a CUDA graph, and without.

    python benchmarks/learning.py --write                  # a GPU; docs/results/learning.md
    python benchmarks/learning.py --device cpu --rules ties

Four of the shipped adapters, one labelled row a class and task (8 rows), the library's defaults: a line search and 60 steps.
Both ways run in one process, one after the other, `--runs` times each after a warm-up; the losses at one table of coefficients
are compared, and the gradients, beside how far two runs without recording are from each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [p for p in (str(ROOT / "src"),) if p not in sys.path]

import torch  # noqa: E402

from loralloy.bank import Bank  # noqa: E402
from loralloy.errors import LoralloyError  # noqa: E402
from loralloy.live.base import load_base  # noqa: E402
from loralloy.live.learnable import Learnable  # noqa: E402
from loralloy.tasks.task import Example, Task  # noqa: E402
from loralloy.weighting.learned import LearnConfig, TextObjective, learn  # noqa: E402
from loralloy.weighting.learned.replay import Steps  # noqa: E402

TASKS = ("sentiment_tweets", "sentiment_movies", "sentiment_products", "sentiment_editorials")
RULES = {"linear": ("linear", "delta"), "ties": ("ties", "delta"), "ties-factors": ("ties", "factors")}


def rows() -> list[Example]:
    """The first training row of each class of each task."""
    found = []
    for name in TASKS:
        task = Task.load(ROOT / f"examples/tasks/{name}.yaml")
        seen: dict[str, Example] = {}
        for example in task.examples("train"):
            seen.setdefault(example.answer, example)
        found += [seen[label] for label in task.labels]
    return found


def seconds(work: Any, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compared(live: Learnable, objective: TextObjective) -> dict[str, float]:
    """At random tables: how far a recording is from the step, and the step from itself."""
    recorded, plain = Steps(live, True), Steps(live, False)
    generator, worst = torch.Generator().manual_seed(0), {"loss": 0.0, "gradient": 0.0, "gradient_twice": 0.0}
    index = list(range(objective.size))

    def part() -> Any:
        return objective.loss(index)

    for turn in range(6):
        table = (0.1 + 0.5 * torch.rand(len(live.modules), len(live.names), generator=generator)).to(live.device)
        loss, slope = (x.clone() for x in recorded.run(part, table, "rows", True, more=100))  # type: ignore[union-attr]
        if turn < 3:  # not recorded yet
            continue
        own, first = plain.run(part, table, "rows", True)
        _, again = plain.run(part, table, "rows", True)
        assert first is not None and again is not None
        worst["loss"] = max(worst["loss"], float((loss - own).abs() / own.abs()))
        worst["gradient"] = max(worst["gradient"], float((slope - first).norm() / first.norm()))
        worst["gradient_twice"] = max(worst["gradient_twice"], float((again - first).norm() / first.norm()))
    recorded.close()
    return worst


def measured(
    options: argparse.Namespace, name: str, model: Any, bank: Bank, objective: TextObjective
) -> dict[str, Any]:
    rule, space = RULES[name]
    live = Learnable(model, bank, rule, space)
    found: dict[str, Any] = {"rule": rule, "space": space}
    try:
        for replay in (False, True):
            config = LearnConfig(replay=replay)

            def work(config: LearnConfig = config) -> Any:
                return learn(model, bank, objective, config=config, learnable=live, progress=False)

            learn(model, bank, objective, config=dataclasses.replace(config, steps=8), learnable=live, progress=False)
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times = [seconds(work, options.device) for _ in range(options.runs)]
            memory = torch.cuda.max_memory_allocated() if options.device == "cuda" else None
            found["replayed" if replay else "plain"] = {"seconds": times, "memory": memory}
            if options.device == "cpu":
                break
        if options.device == "cuda":
            found["difference"] = compared(live, objective)
    finally:
        live.remove()
    return found


def page(result: dict[str, Any]) -> str:
    lines = [
        "# Learning: a step recorded, and not",
        "",
        f"Made by `python benchmarks/learning.py --write`: {result['where']}.",
        f"SmolLM2-135M-Instruct in float32, TF32 products; {len(TASKS)} of the shipped adapters, {result['rows']} rows, one",
        "coefficient an adapter, a line search and 60 steps. Runs: "
        f"{result['runs']} each, medians and ranges; one process, nothing beside it. "
        "Differences: of the loss without label noise.",
        "",
        "| rule, space | plain, s | recorded, s | times faster | memory, GB | loss, relative difference "
        "| gradient, relative difference | gradient of two plain runs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in result["rules"]:
        plain, fast, far = one["plain"], one["replayed"], one["difference"]
        ratio = median(plain["seconds"]) / median(fast["seconds"])
        memory = f"{plain['memory'] / 1e9:.2f} / {fast['memory'] / 1e9:.2f}"
        lines.append(
            f"| {one['rule']}, {one['space']} | {told(plain['seconds'])} | {told(fast['seconds'])} | **{ratio:.1f}** | {memory} "
            f"| {far['loss']:.1g} | {far['gradient']:.1g} | {far['gradient_twice']:.1g} |"
        )
    return "\n".join(lines) + "\n"


def told(times: list[float]) -> str:
    return f"{median(times):.2f} ({min(times):.2f} to {max(times):.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="learning.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--model", default=str(ROOT / ".assets/models/SmolLM2-135M-Instruct"))
    add("--bank", type=Path, default=ROOT / "examples/bank")
    add("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    add("--runs", type=int, default=3)
    add("--write", nargs="?", type=Path, const=ROOT / "docs/results", help="write learning.{md,json} there")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; give --device cpu")
    torch.set_float32_matmul_precision("high")
    try:
        model, tokenizer = load_base(options.model, "float32", options.device)
        bank = Bank.load([options.bank / name for name in TASKS])
        objective = TextObjective(model, tokenizer, rows())
    except LoralloyError as error:
        raise SystemExit(f"{error}\n`make demo` makes the model") from None
    import transformers

    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    result: dict[str, Any] = {
        "where": f"{where}; torch {torch.__version__}, transformers {transformers.__version__}", "rows": objective.size,
        "runs": options.runs, "rules": [],
    }  # fmt: skip
    print(result["where"], flush=True)
    for name in options.rules:
        result["rules"].append(measured(options, name, model, bank, objective))
        print(json.dumps(result["rules"][-1]), flush=True)
    if options.device == "cuda":
        print(page(result))
    if options.write:
        if options.device != "cuda":
            raise SystemExit("--write is for a GPU: the page compares recorded steps")
        options.write.mkdir(parents=True, exist_ok=True)
        (options.write / "learning.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (options.write / "learning.md").write_text(page(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
