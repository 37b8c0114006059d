"""What is computed: benches, a stream file each, and the queue of their work.

Everything is a function of this file, `cells`, `parts` and the stream files: nothing is chosen by a result.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cells import B_MAX, GRAINS, RULES, SIZES, SPACES
from parts import PARTS, rank

from loralloy.continual.experience import DomainStream
from sites import Group

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Bench:
    """parts: which of PARTS, for how many of the seeds. share: the folder of adapters (benches may share them).

    validation: rows a domain that choices are made on (None: all; 0: none). sizes: numbers of domains of a growth stream.
    buffers: rows a class that are tried. grains: of the coefficients. follow: rows a
    class on the way. best: the configurations that validation rows chose when all domains had come, followed over the experiences
    after that. zero: b_max from c = 0. rows_at_once: of one forward while learning, which bounds memory.
    heavy: processes that may hold a buffer of 20 rows a class at once. toy_steps: gradient steps of a toy run.
    """

    name: str
    parts: dict[str, int]
    share: str
    validation: int | None = None
    sizes: tuple[int, ...] = ()
    buffers: tuple[int, ...] = SIZES
    grains: tuple[str, ...] = GRAINS
    follow: tuple[int, ...] = (1, 20)
    best: tuple[dict[str, Any], ...] = ()
    zero: tuple[float, ...] = B_MAX
    rows_at_once: int = 128
    heavy: int = 3
    toy_steps: int | None = None
    merges: tuple[tuple[str, str], ...] = field(default=tuple((r, s) for s in SPACES for r in RULES))

    def stream(self) -> DomainStream:
        return DomainStream.load(HERE / f"{self.name}.yaml")


_SUM: dict[str, Any] = {"rule": "linear", "space": "delta", "b_max": 3.0, "per_class": 20}
_IMAGES = {
    part: {"r": 3, "few": 3, "layers": 3, "best": 3, "long": 3, "more": 3}.get(part, 5) for part in PARTS if part != "f"
}
_TEXT = {
    "own": 5, "a": 5, "draws": 5, "joint": 5, "alone": 5, "c": 3, "large": 5, "e": 3, "z": 3, "b": 3, "few": 3, "seq": 3,
    "seqs": 3, "layers": 3, "best": 3, "even": 3, "r": 2, "long": 3,
}  # fmt: skip
_OF_TEXT: dict[str, Any] = {"validation": 100, "rows_at_once": 32, "heavy": 12, "zero": (3.0,)}
BENCHES = {
    b.name: b
    for b in (
        Bench(
            "emoji4", _IMAGES, "emoji", best=(_SUM | {"grain": "module"}, _SUM | {"grain": "layer", "head": "learned"})
        ),
        Bench(
            "sentiment4",
            _TEXT | {"near": 5, "noise": 5, "noisy": 5, "more": 3, "v": 5},
            "sentiment4",
            follow=(1, 5),
            best=(_SUM | {"grain": "adapter"},),
            **_OF_TEXT,
        ),
        Bench(
            "multiemo4",
            _TEXT,
            "multiemo4",
            buffers=(1, 5, 20),
            follow=(1,),
            best=(_SUM | {"grain": "module"},),
            **_OF_TEXT,
        ),
        Bench("emoji7", {"own": 1, "f": 1}, "emoji", validation=0, sizes=(1, 2, 3, 4, 5, 6, 7)),
        Bench("text20", {"own": 1, "f": 1}, "text20", validation=0, sizes=(2, 5, 10, 15, 20), rows_at_once=64),
    )
}


def groups(bench: Bench, stream: DomainStream) -> list[Group]:
    """All work of a bench, in the queue's order."""
    found: list[Group] = []
    for part, count in bench.parts.items():
        for seed in stream.fields.seeds[:count]:
            found += PARTS[part].groups(bench, stream, part, seed)
    known: set[str] = set()
    result = []
    for group in sorted(found, key=rank):
        new = tuple(c for c in group.cells if c.name not in known)
        known |= {c.name for c in new}
        if new or group.jobs:
            result.append(dataclasses.replace(group, cells=new))
    return result


def toy(bench: Bench, stream: DomainStream) -> tuple[Bench, DomainStream]:
    """A few steps and rows, one seed: whether everything runs."""
    fields = stream.fields
    few = (
        {"steps": 3, "batch_size": 4}
        if fields.images is not None
        else {"limit": 16, "batch_size": 4, "epochs": 1, "max_length": 64}
    )
    evaluate = fields.evaluate.model_copy(update={"limit": 6})
    changed = fields.model_copy(update={"train": fields.train | few, "evaluate": evaluate, "seeds": fields.seeds[:1]})
    names = bench.sizes and tuple(s for s in bench.sizes if s <= 3)
    small = dataclasses.replace(
        bench, sizes=names, toy_steps=2, validation=4 if bench.validation is None else bench.validation and 4
    )
    return small, dataclasses.replace(stream, fields=changed)
