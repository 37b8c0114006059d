"""Small tasks on disk about made-up matters; what tests of the index are fed with."""

from __future__ import annotations

import json
import random
from pathlib import Path

from loralloy.tasks.task import Task

WORDS = {
    "spam": "prize winner claim free cash call now urgent offer ringtone",
    "weather": "rain sun cloud storm wind snow fog forecast degrees sky",
    "cooking": "boil bake salt onion oven recipe butter flour knead soup",
}


def write_task(folder: Path, name: str, rows: int = 60, answers: str = "ab", hint: str | None = None, **fields) -> Task:
    """A task of `rows` rows about its own words; 8 test rows, 4 validation rows."""
    rng = random.Random(name)
    words = WORDS.get(name, f"{name}zero {name}one {name}two {name}three").split()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("w") as file:
        for n in range(rows):
            text = " ".join(rng.choices(words, k=5)) + f" {n}"
            file.write(json.dumps({"text": text, "label": answers[n % len(answers)]}) + "\n")
    data = {
        "version": 1,
        "name": name,
        "hint": f"Which kind of {name} is this?" if hint is None else hint,
        "columns": [{"name": "text", "prefix": "Text: "}],
        "answer": "label",
        "labels": ["a", "b"],
        "source": {"path": f"{name}.jsonl"},
        "splits": {"test": 8, "validation": 4, "train": None, "seed": 0},
    } | fields
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(data))  # JSON is YAML
    return Task.load(path)
