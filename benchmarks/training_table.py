"""One table of what adapters learned, from the metrics.json files that `loralloy train` leaves.

    python benchmarks/training_table.py                       # from docs/results/training.json
    python benchmarks/training_table.py "rank 4, lr 1e-3=RUN_A" "rank 4, lr 3e-4=RUN_B"    # from runs, and keeps their figures

Each RUN is a folder of adapters (`benchmarks/train_bank.sh` makes one). The shipped bank goes on from the
first. Validation rows choose between runs; test rows are shown for the first run alone, so that no choice is made on them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PAGE, FIGURES = Path("docs/results/training.md"), Path("docs/results/training.json")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="NAME=FOLDER", help="runs to read; else the figures kept before")
    parser.add_argument("--shipped", type=Path, default=Path("examples/bank"), help="the bank in the repository")
    args = parser.parse_args()
    runs = {text.rpartition("=")[0]: read(Path(text.rpartition("=")[2])) for text in args.runs}
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
