"""What is computed: benches (a stream file each), their training jobs and cells, in the order in which they are wanted.

A cell is one configuration of one seed: its result is one small JSON file under OUT/cells/BENCH/. Cells of one bank, rule and
space stand in one `Group`, whose terms are made once by the process that takes it. Everything is a function of this file
and the stream files: nothing is chosen by a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralloy.continual.experience import DomainStream

HERE = Path(__file__).resolve().parent
RULES = {"linear": {}, "ties": {"density": 0.2}, "dare_ties": {"density": 0.2}}
SPACES = ("factors", "delta")
GRID = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
B_MAX = (3.0, 1.0, 5.0)
SIZES = (1, 2, 5, 20)  # buffer rows a class and domain
GRAINS = ("adapter", "layer", "module")
CHOSEN = (("linear", "delta"), ("ties", "delta"))  # the merges that are looked at more closely
HEADS = ("random", "learned", "prototypes")

# part -> (place in the queue, what it is). Training stands before what needs it.
PARTS = {
    "own": (10, "train each domain's own adapter"),
    "joint": (15, "train jointly on all domains"),
    "alone": (16, "base, own adapters and joint training, evaluated"),
    "a": (20, "fixed weights and learned coefficients, one row a class, from the line search's start"),
    "c": (40, "buffers of up to 5 rows a class, coefficients by adapter, layer and module"),
    "large": (41, "buffers of 20 rows a class"),
    "e": (50, "the merge after every experience"),
    "lead": (60, "train with the head learned on the first domain"),
    "d": (61, "classifier heads"),
    "z": (70, "learned from the poster's start, c = 0"),
    "b": (80, "search, entropy and RegMean"),
    "seq": (90, "train one adapter on each domain in turn"),
    "seqs": (91, "sequential fine-tuning, evaluated after every domain"),
    "r": (100, "what the cut to a rank costs"),
    "p": (110, "the merge after every experience, with prototypes"),
    "f": (120, "growth with the number of domains (run it alone: it is timed)"),
}


@dataclass(frozen=True)
class Cell:
    """One configuration. how: fixed, learned, fresh, search, entropy, regmean, geometry; base, own, joint and seq merge nothing.

    "fresh" is learned on a buffer of rows that no adapter was trained on (its validation figures may hold those rows).

    domains: whose adapters are merged, in the bench's order. order: of "seq", and of the head learned on its first domain.
    """

    how: str
    seed: int
    domains: tuple[str, ...]
    rule: str = ""
    space: str = ""
    weight: float | None = None
    b_max: float | None = None
    per_class: int | None = None
    grain: str | None = None
    start: str | None = None
    head: str = "random"
    rank: int | str | None = None
    order: int = 0

    @property
    def name(self) -> str:
        """The file's name: every setting that it was made with."""
        words = [f"s{self.seed}", self.head] if self.head != "random" else [f"s{self.seed}"]
        words += [
            "+".join(self.domains) if len(self.domains) <= 7 else f"first{len(self.domains)}",
            self.rule,
            self.space,
        ]
        words += [self.how]
        words += [f"w{self.weight:g}"] if self.weight is not None else []
        words += [f"b{self.b_max:g}"] if self.b_max is not None else []
        words += [f"k{self.per_class}"] if self.per_class is not None else []
        words += [w for w in (self.grain, self.start) if w]
        words += [f"r{self.rank}"] if self.rank is not None else []
        words += [f"o{self.order}"] if self.how == "seq" or self.head == "learned" else []
        return "-".join(w for w in words if w)


@dataclass(frozen=True)
class Job:
    """One adapter to train. domains: one, or several for joint training. after: the domains before it in a sequence."""

    seed: int
    domains: tuple[str, ...]
    after: tuple[str, ...] = ()
    head: str = "random"
    order: int = 0

    @property
    def name(self) -> str:
        own = "+".join(self.domains) if len(self.domains) == 1 else "joint"
        lead = f"lead{self.order}-" if self.head == "learned" else ""
        return f"s{self.seed}/{lead}{'-then-'.join((*self.after, own))}"

    @property
    def before(self) -> Job | None:
        """The adapter that it goes on from."""
        return Job(self.seed, self.after[-1:], self.after[:-1], self.head, self.order) if self.after else None


@dataclass(frozen=True)
class Group:
    """Work that one process does at a stretch: training jobs, or cells of one bank, rule and space."""

    bench: str
    part: str
    seed: int
    jobs: tuple[Job, ...] = ()
    cells: tuple[Cell, ...] = ()
    needs: tuple[Job, ...] = ()

    @property
    def rank(self) -> tuple[int, int]:
        return PARTS[self.part][0], self.seed

    @property
    def name(self) -> str:
        first = self.jobs[0].name.replace("/", "-") if self.jobs else self.cells[0].name
        return f"{self.bench}-{self.part}-{first}"


@dataclass(frozen=True)
class Bench:
    """parts: which of PARTS, for how many of the seeds. share: the folder of adapters (benches may share them).

    validation: rows a domain that choices are made on (None: all; 0: none). sizes: numbers of domains of a growth stream.
    buffers: rows a class that are tried. grains: of the coefficients. follow: rows a
    class on the way. zero: b_max from c = 0. rows_at_once: of one forward while learning, which bounds memory.
    few: gradient steps of a toy run.
    """

    name: str
    parts: dict[str, int]
    share: str
    validation: int | None = None
    sizes: tuple[int, ...] = ()
    buffers: tuple[int, ...] = SIZES
    grains: tuple[str, ...] = GRAINS
    follow: tuple[int, ...] = (1, 20)
    zero: tuple[float, ...] = B_MAX
    rows_at_once: int = 128
    few: int | None = None
    merges: tuple[tuple[str, str], ...] = field(default=tuple((r, s) for s in SPACES for r in RULES))

    def stream(self) -> DomainStream:
        return DomainStream.load(HERE / f"{self.name}.yaml")


_IMAGES = {part: 3 if part == "r" else 5 for part in PARTS if part != "f"}
_TEXT = {
    "own": 5, "a": 5, "joint": 5, "alone": 5, "c": 3, "large": 5, "e": 3, "z": 3, "b": 3, "seq": 2, "seqs": 2, "r": 2,
}  # fmt: skip
_OF_TEXT: dict[str, Any] = {"validation": 100, "rows_at_once": 64, "zero": (3.0,)}
BENCHES = {
    b.name: b
    for b in (
        Bench("emoji4", _IMAGES, "emoji"),
        Bench("sentiment4", _TEXT, "sentiment4", follow=(1, 5), **_OF_TEXT),
        Bench(
            "multiemo4", {k: min(v, 3) for k, v in _TEXT.items() if k != "r"}, "multiemo4", buffers=(1, 20), grains=GRAINS[:2],
            follow=(1,), **_OF_TEXT,
        ),
        Bench("emoji7", {"own": 1, "f": 1}, "emoji", validation=0, sizes=(1, 2, 3, 4, 5, 6, 7)),
        Bench("text20", {"own": 1, "f": 1}, "text20", validation=0, sizes=(2, 5, 10, 15, 20), rows_at_once=64),
    )
}  # fmt: skip


def groups(bench: Bench, stream: DomainStream) -> list[Group]:
    """All work of a bench, in the queue's order."""
    found: list[Group] = []
    for part, count in bench.parts.items():
        for seed in stream.fields.seeds[:count]:
            found += _PLANS[part](bench, stream, part, seed)
    known: set[str] = set()
    result = []
    for group in sorted(found, key=lambda g: g.rank):
        new = tuple(c for c in group.cells if c.name not in known)
        known |= {c.name for c in new}
        if new or group.jobs:
            result.append(Group(group.bench, group.part, group.seed, group.jobs, new, group.needs))
    return result


def needs(cell: Cell, orders: Sequence[Sequence[str]]) -> tuple[Job, ...]:
    """The adapters that a cell merges or evaluates."""
    if cell.how == "base":
        return ()
    lead = "learned" if cell.head == "learned" else "random"
    if cell.how == "joint":
        return (Job(cell.seed, cell.domains, (), lead, cell.order if lead == "learned" else 0),)
    if cell.how == "seq":
        order = tuple(orders[cell.order])
        return tuple(Job(cell.seed, order[t : t + 1], order[:t], lead) for t in range(len(order)))
    return tuple(own(cell.seed, d, lead, cell.order) for d in cell.domains)


def own(seed: int, domain: str, head: str = "random", order: int = 0) -> Job:
    return Job(seed, (domain,), (), head, order if head == "learned" else 0)


# -- parts -------------------------------------------------------------------------------------------------------------


def learned(seed: int, domains: Sequence[str], rule: str, space: str, b_max: float = 3.0, per_class: int = 1,
            grain: str = "adapter", start: str = "scale", **more: object) -> Cell:  # fmt: skip
    return Cell("learned", seed, tuple(domains), rule, space, None, b_max, per_class, grain, start, **more)  # type: ignore[arg-type]


def fresh(seed: int, domains: Sequence[str], rule: str, space: str, per_class: int = 1, grain: str = "adapter") -> Cell:
    return Cell("fresh", seed, tuple(domains), rule, space, None, 3.0, per_class, grain, "scale")


def _merged(bench: Bench, stream: DomainStream, part: str, cells: Iterable[Cell]) -> Iterator[Group]:
    """Cells by bank, rule and space."""
    by: dict[tuple[object, ...], list[Cell]] = {}
    for c in cells:
        by.setdefault((c.seed, c.head, c.order, c.domains, c.rule, c.space), []).append(c)
    for some in by.values():
        yield Group(bench.name, part, some[0].seed, (), tuple(some), needs(some[0], stream.orders))


def _own(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    for domain in stream.names:
        yield Group(bench.name, part, seed, (own(seed, domain),))


def _joint(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    yield Group(bench.name, part, seed, (Job(seed, tuple(stream.names)),))


def _alone(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    for how in ("base", "own", "joint"):
        cell = Cell(how, seed, tuple(stream.names))
        yield Group(bench.name, part, seed, (), (cell,), needs(cell, stream.orders))


def _table(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    cells = []
    for rule, space in bench.merges:
        names = tuple(stream.names)
        cells += [learned(seed, names, rule, space, b) for b in B_MAX]
        cells += [Cell("fixed", seed, names, rule, space, w) for w in GRID]
        cells += [Cell("geometry", seed, names, rule, space)]
        cells += [fresh(seed, names, rule, space)]
        cells += [fresh(seed, names, rule, space, 5, grain) for grain in GRAINS[:2] if (rule, space) in CHOSEN]
    return _merged(bench, stream, part, cells)


def _zero(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    cells = [learned(seed, stream.names, r, s, b, start="zero") for r, s in bench.merges for b in bench.zero]
    return _merged(bench, stream, part, cells)


def _controls(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    names, cells = tuple(stream.names), []
    for rule, space in (*CHOSEN, ("linear", "factors")):
        cells += [Cell("search", seed, names, rule, space, per_class=k) for k in (1, 5)]
    cells += [Cell("entropy", seed, names, rule, space, None, 1.0, 20, "layer") for rule, space in CHOSEN]
    cells += [Cell("regmean", seed, names, "linear", "delta", per_class=20, grain=g) for g in ("module", "adapter")]
    return _merged(bench, stream, part, cells)


def _buffers(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    sizes = [k for k in bench.buffers if (k == SIZES[-1]) == (part == "large")]
    grains = {k: bench.grains if k in (1, SIZES[-1]) else GRAINS[:2] for k in sizes}
    cells = [learned(seed, stream.names, r, s, 3.0, k, g) for r, s in CHOSEN for k in sizes for g in grains[k]]
    return _merged(bench, stream, part, cells)


def _sequences(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    for o in range(len(stream.orders)):
        jobs = needs(Cell("seq", seed, tuple(stream.names), order=o), stream.orders)
        yield Group(bench.name, part, seed, jobs[1:], (), jobs[:1])


def _sequential(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    for o in range(len(stream.orders)):
        cell = Cell("seq", seed, tuple(stream.names), order=o)
        yield Group(bench.name, part, seed, (), (cell,), needs(cell, stream.orders))


def prefixes(names: Sequence[str], orders: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The sets of domains that have come after some experience of some order, as a bench orders them; the smallest first."""
    some = {tuple(n for n in names if n in order[:t]) for order in orders for t in range(1, len(order) + 1)}
    return sorted(some, key=lambda d: (len(d), d))


def _path(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    """A state is the same for every order that comes to it: it is computed once."""
    cells = []
    for domains in prefixes(stream.names, stream.orders):
        for rule, space in CHOSEN:
            cells += [learned(seed, domains, rule, space, per_class=k) for k in bench.follow]
            cells += [Cell("fixed", seed, domains, rule, space, 1.0)]
    return _merged(bench, stream, part, cells)


def _path_of_prototypes(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    states = prefixes(stream.names, stream.orders[:1])
    cells = [learned(seed, d, r, s, per_class=5, head="prototypes") for d in states for r, s in CHOSEN]
    return _merged(bench, stream, part, cells)


def _lead(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    first, *others = stream.orders[0]
    lead = own(seed, first, "learned")
    yield Group(bench.name, part, seed, (lead, *(own(seed, d, "learned") for d in others)))
    yield Group(bench.name, part, seed, (Job(seed, tuple(stream.names), (), "learned"),))


def head_cells(seed: int, names: Sequence[str], head: str) -> list[Cell]:
    sizes = (1, 5, 20) if head == "prototypes" else (1, 20)
    cells = [learned(seed, names, r, s, per_class=k, head=head) for r, s in CHOSEN for k in sizes]
    cells += [learned(seed, names, r, s, per_class=20, grain="layer", head=head) for r, s in CHOSEN]
    alone = ("base", "own", "joint") if head == "prototypes" else ("own", "joint")
    return cells + [
        Cell(how, seed, tuple(names), per_class=20 if head == "prototypes" else None, head=head) for how in alone
    ]


def _heads(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    for head in ("prototypes", "learned"):
        for cell in head_cells(seed, stream.names, head):
            if not cell.rule:
                yield Group(bench.name, part, seed, (), (cell,), needs(cell, stream.orders))
        yield from _merged(bench, stream, part, [c for c in head_cells(seed, stream.names, head) if c.rule])


def _ranks(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    cells = [learned(seed, stream.names, rule, "delta", rank=rank) for rule in RULES for rank in (8, "max")]
    return _merged(bench, stream, part, cells)


def _growth(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    cells = []
    for size in bench.sizes:
        for rule, space in CHOSEN:
            names = tuple(stream.names[:size])
            cells += [learned(seed, names, rule, space), Cell("fixed", seed, names, rule, space, 1.0)]
            cells += [Cell("fixed", seed, names, rule, space, round(1 / size, 4))] if size > 1 else []
    return _merged(bench, stream, part, cells)


_PLANS = {
    "own": _own, "a": _table, "joint": _joint, "alone": _alone, "z": _zero, "b": _controls, "c": _buffers, "large": _buffers,
    "seq": _sequences, "seqs": _sequential, "e": _path, "lead": _lead, "d": _heads, "r": _ranks,
    "p": _path_of_prototypes, "f": _growth,
}  # fmt: skip
