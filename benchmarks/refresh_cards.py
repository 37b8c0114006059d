"""Evaluates the adapters of a bank on their held-out rows and writes metrics.json and the cards anew.

    python benchmarks/refresh_cards.py examples/bank --first-stage FOLDER

For adapters that went on from a first stage (`loralloy train --init-adapter`) without an evaluation of their own: what does not
depend on the adapter (the base's accuracies and its best prompt format, the majority) is taken from the first stage's metrics.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from loralloy.adapter import Adapter
from loralloy.atomic import atomic_file
from loralloy.bank import Bank
from loralloy.cli.common import MODEL, load_model
from loralloy.live import LiveModel
from loralloy.live.scoring import correct, predict
from loralloy.stats import accuracy
from loralloy.tasks import load_tasks
from loralloy.training.card import model_card
from loralloy.weights import Weights


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bank", type=Path)
    parser.add_argument("--first-stage", type=Path, required=True)
    parser.add_argument("--tasks", default="examples/tasks")
    args = parser.parse_args()
    tasks = {task.name: task for task in load_tasks(args.tasks)}
    model, tokenizer, base = load_model(MODEL, "auto")
    for folder in sorted(p.parent for p in args.bank.glob("*/adapter_config.json")):
        adapter, task = Adapter.load(folder), tasks[folder.name]
        first = json.loads((args.first_stage / folder.name / "metrics.json").read_text(encoding="utf-8"))
        path = folder / "metrics.json"
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        live = LiveModel(model, Bank([adapter]), base)
        with live.compose(Weights({adapter.name: 1.0})):
            for split in ("validation", "test"):
                rows = task.examples(split)
                answers = predict(model, tokenizer, [e.prompt for e in rows], [e.options for e in rows], batch_size=32)
                found = accuracy(correct(answers, [e.answer for e in rows]))
                metrics[split] = first[split] | {"adapter": found.to_dict()}
        live.remove()
        metrics["base_format"] = first["base_format"]
        card = folder / "README.md"
        old = card.read_text(encoding="utf-8")
        command = re.search(r"## Made with\s+```\n(.*?)\n```", old, re.S)
        assert command is not None, f"{card} names no command"
        recorded = adapter.provenance
        text = model_card(
            task,
            recorded["base"],
            recorded["training"],
            metrics,
            command[1],
            adapter.licence or "apache-2.0",
            folder.name,
        )
        atomic_file(path, json.dumps(metrics, indent=2) + "\n")
        atomic_file(card, text)
        a, b = metrics["test"]["adapter"], first["test"]["adapter"]
        print(f"{folder.name:22} test {a['accuracy']:.3f} (first stage {b['accuracy']:.3f})", flush=True)


if __name__ == "__main__":
    main()
