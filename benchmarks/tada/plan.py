"""What is computed: trainings and cells, in the order in which they are wanted; a function of pairs.yaml and designs.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from designs import (
    BALANCED,
    BASELINES,
    DESIGNS,
    LEARNED,
    METHODS,
    RANKS,
    TUNED_BESIDE,
    Method,
    ablations,
    of_half,
    sizes,
)

from loralloy.errors import LoralloyError
from sites import Group

HERE = Path(__file__).resolve().parent
HALVES = ("language", "vision")

# part -> (place in the queue, what it is)
PARTS = {
    "task": (10, "train the task adapters"),
    "domain": (11, "train the domain adapters, without labels"),
    "own": (20, "train adapters on the domains' own labels (seed 0, for the screen)"),
    "screen": (21, "base, task, domain and own adapter on validation rows of finals and reserves"),
    "develop": (30, "designs and some baselines on the development pairs"),
    "alone": (40, "base, task adapter (also balanced) and domain adapter on the final pairs"),
    "design": (41, "the designs of pairs.yaml on the final pairs, also at their best coefficients, and balanced"),
    "best": (
        42,
        "the baselines on the final pairs: at 0.5/0.5, at 1/1, by validation, and balanced",
    ),
    "parts": (50, "ablations of the first design"),
    "learned": (60, "learned coefficients (these train)"),
    "inputs": (70, "4 to 256 calibration inputs"),
    "ranks": (80, "adapters of rank 4 to 64: two pairs, seed 0, trained anew"),
    "free": (90, "designs and baselines on the final pairs at a level chosen without labels"),
    "tried": (91, "every design at weights of 1 on the development pairs of the first round"),
}
FIRST = ("task", "domain", "own", "screen", "develop")  # what is run before the design is written down
TUNING = ("develop", "tried")
LEARNED_ROWS = 5  # a class; of tasks whose rows have options of their own, 4 times as many in all


@dataclass(frozen=True)
class Job:
    """One adapter to train. kind: task, domain, or own (the domain's task with its labels)."""

    half: str
    kind: str
    of: str
    seed: int
    rank: int

    @property
    def name(self) -> str:
        kind = "task" if self.half == "vision" and self.kind == "own" else self.kind  # labels of a style are a style's
        return f"{self.half}/r{self.rank}/s{self.seed}/{kind}-{self.of}"


@dataclass(frozen=True)
class Cell:
    """One method on one pair and seed. at: "even" (0.5/0.5), "ones", "free" (a level of 1/1 chosen without
    labels), "best" (by validation rows), "balanced" (1/1 as one adapter, the shift of its answers then taken out without labels),
    "tuned" (as "best" chose, then balanced) or "" (nothing to choose)."""

    pair: str
    seed: int
    rank: int
    method: Method
    at: str = ""

    @property
    def name(self) -> str:
        words = [self.pair.replace(">", "-on-"), f"s{self.seed}", f"r{self.rank}", self.method.name, self.at]
        return "-".join(w for w in words if w)


@dataclass(frozen=True)
class Half:
    """One half of pairs.yaml. fields: its mapping. few: a toy's rows; None for a real run."""

    name: str
    fields: dict[str, Any]
    seeds: tuple[int, ...]
    development_seeds: tuple[int, ...]
    calibration: int
    designs: tuple[str, ...]
    few: int | None = None
    final: tuple[str, ...] = field(default=())

    @property
    def rank(self) -> int:
        return int(self.fields["rank"])

    @property
    def first(self) -> int:
        """How many of the development pairs were those of the first round."""
        return int(self.fields.get("first", len(self.fields["development"])))

    def pairs(self, which: str) -> tuple[str, ...]:
        return tuple(self.fields[which])


def load(half: str, file: Path | None = None) -> Half:
    """Raises LoralloyError for a pair whose task or domain is not named, and for fewer than two adapters' designs."""
    found = yaml.safe_load((file or HERE / "pairs.yaml").read_text(encoding="utf-8"))
    fields = found[half]
    for which in ("final", "reserves", "development"):
        for pair in fields[which]:
            task, domain = split(pair)
            if task not in fields["tasks"] or domain not in fields["domains"]:
                raise LoralloyError(f"pairs.yaml: {half}.{which}: {pair!r} names no task and domain of its lists")
    for name in found["designs"]:
        if name not in METHODS:
            raise LoralloyError(f"pairs.yaml: design {name!r} is not in designs.py")
    final, tuned = {split(p)[1] for p in fields["final"]}, {split(p)[1] for p in fields["development"]}
    if final & tuned:
        raise LoralloyError(
            f"pairs.yaml: {half}: {sorted(final & tuned)[0]!r} is both a final domain and one for tuning"
        )
    return Half(
        half,
        fields,
        tuple(found["seeds"]),
        tuple(found["development_seeds"]),
        found["calibration"],
        tuple(found["designs"]),
    )


def split(pair: str) -> tuple[str, str]:
    task, _, domain = pair.partition(">")
    return task, domain


def toy(half: Half) -> Half:
    """Two final pairs, one for development, one seed, few rows and steps: whether everything runs."""
    small = {"steps": 3, "batch_size": 4, "limit": 24, "max_length": 96}
    fields = half.fields | {k: v for k, v in small.items() if k in half.fields}
    fields |= {"final": half.fields["final"][:2], "development": half.fields["development"][:1], "reserves": []}
    return replace(half, fields=fields, seeds=half.seeds[:1], development_seeds=half.seeds[:1], calibration=4, few=8)


def adapters(half: Half, pair: str, seed: int, rank: int | None = None) -> tuple[Job, Job]:
    task, domain = split(pair)
    rank = rank or half.rank
    return Job(half.name, "task", task, seed, rank), Job(half.name, "domain", domain, seed, rank)


ALONE = tuple(
    Method(n, t) for n, t in (("base", "base"), ("task", "task adapter alone"), ("domain", "domain adapter alone"))
)
OWN = Method("own", "trained on the domain's labels")


def groups(half: Half) -> list[Group]:
    """All work of a half, in the queue's order."""
    found = list(_trainings(half))
    for part in PARTS:
        if part in ("task", "domain", "own"):
            continue
        which = "development" if part in TUNING else "final"
        pairs = half.pairs(which) + (half.pairs("reserves") if part == "screen" else ())
        seeds = (
            half.development_seeds if part in TUNING else half.seeds[:1] if part in ("screen", "ranks") else half.seeds
        )
        for seed in seeds:
            for pair in pairs[:2] if part == "ranks" else pairs[: half.first] if part == "tried" else pairs:
                found += _cells(half, part, pair, seed)
    known: set[tuple[str, str]] = set()
    result = []
    for group in sorted(found, key=lambda g: (PARTS[g.part][0], g.seed)):
        jobs = tuple(j for j in group.jobs if ("job", j.name) not in known)
        cells = tuple(c for c in group.cells if (_folder(group.part), c.name) not in known)
        known |= {("job", j.name) for j in jobs} | {(_folder(group.part), c.name) for c in cells}
        if jobs or cells:
            result.append(replace(group, jobs=jobs, cells=cells))
    return result


def _folder(part: str) -> str:
    return "develop" if part in TUNING else part if part == "screen" else "final"


def folder(half: str, part: str) -> str:
    """Of cells: what is tuned on, and what is told, are never mixed up."""
    return f"{half}-{_folder(part)}"


def _trainings(half: Half) -> Iterator[Group]:
    wanted: dict[tuple[str, Job], None] = {}
    for which, seeds in (("final", half.seeds), ("development", half.development_seeds), ("reserves", half.seeds[:1])):
        for seed in seeds:
            for pair in half.pairs(which):
                task, domain = adapters(half, pair, seed)
                wanted |= {("task", task): None, ("domain", domain): None}
                if seed == half.seeds[0] and which != "development":
                    wanted[("own", replace(domain, kind="own"))] = None
    for seed in half.seeds[:1]:
        for rank in RANKS if half.few is None else RANKS[:1]:
            for pair in half.pairs("final")[:2]:
                wanted |= {("ranks", job): None for job in adapters(half, pair, seed, rank)}
    for part, job in wanted:
        yield Group(half.name, part, job.seed, (job,))


def _cells(half: Half, part: str, pair: str, seed: int) -> Iterator[Group]:
    """A group is what shares a bank and one probe."""
    rank, first = half.rank, METHODS[half.designs[0]]
    both = adapters(half, pair, seed)
    own = replace(both[1], kind="own")
    alone = [*((m, "") for m in ALONE), (ALONE[1], "balanced")]

    def group(methods: Sequence[tuple[Method, str]], needs: Sequence[Job], at_rank: int = rank) -> Group:
        cells = tuple(Cell(pair, seed, at_rank, of_half(m, half.name), at) for m, at in methods)
        return Group(half.name, part, seed, (), cells, tuple(needs))

    if part == "screen":
        yield group([(m, "") for m in (*ALONE, OWN)], (*both, own))
    elif part == "develop":
        yield group(alone, both)
        yield group([(METHODS[n], at) for at in ("ones", "balanced") for n in BALANCED], both)
        yield group([(METHODS[n], at) for at in ("best", "balanced") for n in TUNED_BESIDE], both)
    elif part == "tried":
        yield group([(m, "ones") for m in DESIGNS], both)
    elif part == "alone":
        yield group(alone, both)
    elif part == "design":  # "tuned" reads what "best" has chosen
        yield group([(METHODS[n], at) for at in ("ones", "best", "balanced", "tuned") for n in half.designs], both)
    elif part == "best":
        for some in (BASELINES[:5], BASELINES[5:10], BASELINES[10:]):
            yield group([(m, at) for m in some for at in ("best", "even", "ones", "balanced", "tuned")], both)
    elif part == "free":
        for free in ([METHODS[n] for n in half.designs], BASELINES[:8], BASELINES[8:]):
            yield group([(m, "free") for m in free], both)
    elif part == "parts":
        yield group([(m, "ones") for m in ablations(first)], both)
    elif part == "learned":
        yield group([(m, "") for m in LEARNED], both)
    elif part == "inputs":
        yield group([(m, "ones") for m in sizes(first)], both)
    elif part == "ranks":
        for r in RANKS if half.few is None else RANKS[:1]:
            methods: list[tuple[Method, str]] = [(m, "") for m in ALONE[1:]]
            methods += [(METHODS[n], "ones") for n in (half.designs[0], "linear", "ties")]
            yield group([*methods, (METHODS["ties"], "best")], adapters(half, pair, seed, r), r)
