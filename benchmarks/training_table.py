"""One table of what adapters learned, from the metrics.json files that `loralloy train` leaves.

    python benchmarks/training_table.py                       # from docs/results/training.json
    python benchmarks/training_table.py "rank 4, lr 1e-3=RUN_A" "rank 4, lr 3e-4=RUN_B"    # from runs, and keeps their figures
    python benchmarks/training_table.py --suite "rank 4, lr 1e-3=.assets/suite-bank"        # the offline suite's page

Each RUN is a folder of adapters (`benchmarks/train_bank.sh` makes one). The shipped bank goes on from the
first. Validation rows choose between runs; test rows are shown for the first run alone, so that no choice is made on them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PAGE, FIGURES = Path("docs/results/training.md"), Path("docs/results/training.json")
SUITE, SUITE_FIGURES = Path("docs/results/suite-training.md"), Path("docs/results/suite-training.json")


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """What the page needs of each adapter's metrics.json."""
    found = {}
    for path in sorted(folder.glob("*/metrics.json")):
        m = json.loads(path.read_text(encoding="utf-8"))
        training = {k: m["training"][k] for k in ("hyperparameters", "rows", "steps", "seconds", "device")}
        form = {"name": m["base_format"]["name"]}
        scores = {split: m[split] for split in ("validation", "test")}
        found[path.parent.name] = {"training": training, "base_format": form, **scores}
    return found


def table(runs: dict[str, dict[str, dict[str, Any]]], shipped: dict[str, dict[str, Any]]) -> list[str]:
    names = list(runs)
    first = runs[names[0]]
    lines = [
        "| task | majority | base, own prompt | base, best prompt | adapter (95 % interval) | rows | s | **shipped** |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for task, m in first.items():
        test = m["test"]
        a = test["adapter"]
        lines.append(
            f"| {task} | {test['majority']['share']:.3f} | {test['base']['accuracy']:.3f} | "
            f"{test['base_best_format']['accuracy']:.3f} (`{m['base_format']['name']}`) | "
            f"{a['accuracy']:.3f} ({a['low']:.3f} to {a['high']:.3f}) | {m['training']['rows']} | "
            f"{m['training']['seconds']:.0f} | "
            + (f"**{shipped[task]['test']['adapter']['accuracy']:.3f}** |" if task in shipped else "|")
        )
    lines += ["", "Which settings: accuracy of the adapters on the 150 validation rows of each task.", ""]
    lines.append("| task | " + " | ".join(names) + " |")
    lines.append("|---|" + "---:|" * len(names))
    for task in first:
        cells = (f"{runs[n][task]['validation']['adapter']['accuracy']:.3f}" if task in runs[n] else "" for n in names)
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    common = [t for t in first if all(t in runs[n] for n in names)]
    means = [sum(runs[n][t]["validation"]["adapter"]["accuracy"] for t in common) / len(common) for n in names]
    lines.append(f"| **mean of {len(common)}** | " + " | ".join(f"**{m:.3f}**" for m in means) + " |")
    return lines


def suite_page(runs: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The offline suite's adapters: what each learned, and their means over tasks."""
    first = next(iter(runs.values()))
    hyper = next(iter(first.values()))["training"]["hyperparameters"]
    seconds = sum(m["training"]["seconds"] for m in first.values())
    columns = ("majority", "base", "base_best_format", "adapter")

    def of(m: dict[str, Any], column: str) -> float:
        return float(m["test"][column]["share" if column == "majority" else "accuracy"])

    means = {c: sum(of(m, c) for m in first.values()) / len(first) for c in columns}
    lines = [
        "# What the offline suite's adapters learned", "",
        f"SmolLM2-135M-Instruct (Q4_1, dequantised to bf16), {len(first)} tasks, one adapter each, trained on one H100 by "
        "`loralloy train --bank examples/tasks examples/suite/tasks --jobs 18 --rank 4 --alpha 8 --lr 1e-3`, 18 at a time "
        f"({seconds:.0f} s in all, summed over processes; eight and a half minutes by the clock, evaluation included). "
        "This page: `benchmarks/training_table.py --suite`.", "",
        f"Settings: {json.dumps(hyper)}.", "",
        "The first 150 test rows of each task; answers scored by log-likelihood of their text, free text (cosmos_qa, disfl_qa, "
        "question_formation) by exact match. The base's best prompt was chosen on validation rows. Intervals: Wilson, 95 %. One "
        "seed. Adapters of tasks from BIG-bench are for evaluation only; none of these adapters is in the repository.", "",
        "| task | majority | base, own prompt | base, best prompt | adapter (95 % interval) | rows | s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for task, m in sorted(first.items()):
        a = m["test"]["adapter"]
        lines.append(
            f"| {task} | {of(m, 'majority'):.3f} | {of(m, 'base'):.3f} | {of(m, 'base_best_format'):.3f} "
            f"(`{m['base_format']['name']}`) | {a['accuracy']:.3f} ({a['low']:.3f} to {a['high']:.3f}) | "
            f"{m['training']['rows']} | {m['training']['seconds']:.0f} |"
        )
    lines.append("| **mean** | " + " | ".join(f"**{means[c]:.3f}**" for c in columns) + " | | |")
    floor = [max(of(m, "majority"), of(m, "base_best_format")) for m in first.values()]
    weak = [t for (t, m), mark in zip(first.items(), floor, strict=True) if m["test"]["adapter"]["low"] <= mark]
    lines += [
        "",
        "Adapters whose interval does not lie above the better of majority and the base's best prompt: "
        f"{', '.join(sorted(weak))}. There, nothing that composes adapters can show much.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="NAME=FOLDER", help="runs to read; else the figures kept before")
    parser.add_argument("--shipped", type=Path, default=Path("examples/bank"), help="the bank in the repository")
    parser.add_argument("--suite", action="store_true", help="write the offline suite's page instead")
    args = parser.parse_args()
    runs = {text.rpartition("=")[0]: read(Path(text.rpartition("=")[2])) for text in args.runs}
    if args.suite:
        if runs:
            SUITE_FIGURES.write_text(json.dumps(runs, indent=0) + "\n", encoding="utf-8")
        text = suite_page(json.loads(SUITE_FIGURES.read_text(encoding="utf-8")))
        print(text)
        SUITE.write_text(text, encoding="utf-8")
        return
    if runs:
        FIGURES.write_text(json.dumps(runs, indent=0) + "\n", encoding="utf-8")
    runs = json.loads(FIGURES.read_text(encoding="utf-8"))
    shipped = sorted(p.parent.name for p in args.shipped.glob("*/adapter_config.json"))
    first = next(iter(runs.values()))
    hyper = next(iter(first.values()))["training"]
    page = ["# What the adapters learned", ""]
    page += [
        "SmolLM2-135M-Instruct (Q4_1, dequantised to bf16), one adapter a task, trained on one H100, all tasks side by side "
        "(`benchmarks/train_bank.sh`); fp16 adapters on seven projections. This page: `benchmarks/training_table.py`.",
        "",
        f"Settings of the first run: {json.dumps(hyper['hyperparameters'])}.",
        "",
        "300 held-out test rows a task, answers scored by log-likelihood of their text. The base's best prompt was chosen on "
        "validation rows. Intervals: Wilson, 95 %. One seed: differences of a point or two between settings are noise.",
        "",
        *table(runs, read(args.shipped)),
        "",
        f"Shipped in `examples/bank`: {', '.join(shipped)} (the rest would pass its size budget).",
    ]
    page += [
        "",
        "The shipped adapters are the first run's after a second stage of 15 steps on a CPU (docs/training.md, going on from "
        "an adapter), which made them end their answers with the right token; `shipped`: their accuracy on the same test rows.",
    ]
    text = "\n".join(page) + "\n"
    print(text)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
