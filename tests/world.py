"""A whole small world on disk: a random base model, a bank of its adapters, task files and data, an index."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from helpers import PROJECTIONS, peft_folder
from loralloy.adapter import Adapter
from loralloy.base_ref import BaseRef
from loralloy.retrieval import HashEmbedder, Index
from loralloy.tasks import load_tasks

for room in ("training", "retrieval"):
    sys.path.insert(0, str(Path(__file__).parent / room))


@dataclass(frozen=True)
class World:
    root: Path
    model: Path
    bank: Path
    tasks: Path
    index: Path

    def flags(self, *names: str) -> list[str]:
        """`--model M --bank B --index I` (or those asked for), as a command takes them."""
        return [
            word for name in names or ("model", "bank", "index") for word in (f"--{name}", str(getattr(self, name)))
        ]


def make_world(root: Path) -> World:
    """Three tasks with an adapter each, of mixed rank; the adapters are PEFT's, with the base's fingerprint recorded."""
    import tiny
    from small_tasks import WORDS, write_task

    from loralloy.live.base import base_fingerprint, load_base

    model = tiny.save_model(root / "model")
    base, _ = load_base(str(model), "float32", "cpu")
    mark = BaseRef("tiny/llama", None, base_fingerprint(base))
    for seed, name in enumerate(WORDS):
        write_task(root / "tasks", name)
        folder = peft_folder(base, root / "peft" / name, seed + 1, r=2 + seed, target_modules=PROJECTIONS)
        made = Adapter.load(folder)
        Adapter(name, {m: made[m] for m in made}, made.config, mark, licence="apache-2.0").save(root / "bank" / name)
    build_index(root / "tasks", root / "index")
    return World(root, model, root / "bank", root / "tasks", root / "index")


def build_index(tasks: Path, folder: Path) -> Path:
    Index.build(folder, load_tasks(tasks), HashEmbedder(128), "exact").close()
    return folder
