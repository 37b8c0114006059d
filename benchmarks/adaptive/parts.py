"""The parts of the work, in the order in which they are wanted, and the groups of cells or training jobs that each has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cells import (
    B_MAX,
    CHOSEN,
    DRAWS,
    FEW,
    GRAINS,
    GRID,
    LONG,
    NOISY,
    NOISY_MORE,
    RULES,
    SIZES,
    STARTS,
    Cell,
    Job,
    fresh,
    learned,
    needs,
    own,
)  # fmt: skip

from loralloy.continual.experience import DomainStream
from sites import Group

if TYPE_CHECKING:
    from plan import Bench


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


def _draws(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    """The learned cells of the table on other rows: with one row a class, what is learned depends on which they are."""
    cells = []
    for rule, space in bench.merges:
        for draw in DRAWS:
            cells += [learned(seed, stream.names, rule, space, b, draw=draw) for b in B_MAX]
            cells += [fresh(seed, stream.names, rule, space, draw=draw)]
    return _merged(bench, stream, part, cells)


def _near(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    """The table's learned cells, all draws, from the search close to an adapter's length, without and with label noise."""
    start = "near" if part == "near" else NOISY
    cells = [
        learned(seed, stream.names, rule, space, b, start=start, draw=draw)
        for rule, space in bench.merges
        for draw in (0, *DRAWS)
        for b in B_MAX
    ]
    return _merged(bench, stream, part, cells)


def _noisy(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    """What else is learned from one or two rows a class and stands on a page, under label noise."""
    cells = []
    for other in ("a", "c", "d", "e", "even", "r", "draws"):
        if seed in stream.fields.seeds[: bench.parts.get(other, 0)]:
            found = (cell for group in PARTS[other].groups(bench, stream, other, seed) for cell in group.cells)
            cells += [
                dataclasses.replace(c, start=NOISY) for c in found if c.start == "scale" and (c.per_class or 0) < 4
            ]
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


def _few(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    cells = [Cell("few", seed, tuple(stream.names), per_class=k) for k in FEW]
    for cell in cells:
        yield Group(bench.name, part, seed, needs(cell, stream.orders))
    for cell in cells:
        yield Group(bench.name, part, seed, (), (cell,), needs(cell, stream.orders))


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


def _path_by_layer(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    states = prefixes(stream.names, stream.orders)
    cells = [learned(seed, domains, *CHOSEN[0], per_class=SIZES[-1], grain="layer") for domains in states]
    return _merged(bench, stream, part, cells)


def _path_of_best(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    """With the head learned on the first domain, along the first order alone: its adapters are that order's."""
    cells: list[Cell] = []
    for settings in bench.best:
        orders = stream.orders[:1] if settings.get("head") == "learned" else stream.orders
        cells += [learned(seed, domains, **settings) for domains in prefixes(stream.names, orders)]
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
    """Cut to an adapter's rank, and to the sum of them, which holds a linear merge whole."""
    one = stream.fields.train["rank"]
    ranks = (one, one * len(stream.names))
    cells = [learned(seed, stream.names, rule, "delta", rank=rank) for rule in RULES for rank in ranks]
    return _merged(bench, stream, part, cells)


def _even(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    """Learned merges of the rank that their adapters' ranks sum to, and joint training, with their answers evened out."""
    names = tuple(stream.names)
    rank = stream.fields.train["rank"] * len(names)
    wanted = [(1, "adapter"), (1, "layer"), (20, "adapter"), (20, "layer"), (20, "module")]
    cells = [
        dataclasses.replace(learned(seed, names, rule, space, per_class=k, grain=grain), how="even_learned", rank=rank)
        for rule, space in CHOSEN
        for k, grain in wanted
        if k in bench.buffers and grain in bench.grains
    ]
    yield from _merged(bench, stream, part, cells)
    for k in (1, 20):
        joint = Cell("even_joint", seed, names, per_class=k)
        yield Group(bench.name, part, seed, (), (joint,), needs(joint, stream.orders))


def _long(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    cells = [learned(seed, stream.names, r, s, 3.0, SIZES[-1], g, LONG) for r, s in CHOSEN for g in GRAINS[1:]]
    return _merged(bench, stream, part, cells)


def _noisy_more(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    """Where the library takes none: with 5 and 20 rows a class."""
    cells = [
        learned(seed, stream.names, rule, space, 3.0, k, grain, NOISY_MORE)
        for rule, space in CHOSEN
        for k, grains in ((5, GRAINS[:2]), (SIZES[-1], GRAINS))
        for grain in grains
    ]
    return _merged(bench, stream, part, cells)


def _starts(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    cells = [learned(seed, stream.names, r, s, start=start) for r, s in bench.merges for start in STARTS]
    return _merged(bench, stream, part, cells)


def _growth(bench: Bench, stream: DomainStream, part: str, seed: int) -> Iterator[Group]:
    cells = []
    for size in bench.sizes:
        for rule, space in CHOSEN:
            names = tuple(stream.names[:size])
            cells += [learned(seed, names, rule, space, start=NOISY), Cell("fixed", seed, names, rule, space, 1.0)]
            cells += [Cell("fixed", seed, names, rule, space, round(1 / size, 4))] if size > 1 else []
    return _merged(bench, stream, part, cells)


class Part(NamedTuple):
    """what: what it computes. groups: (bench, stream, the part's name, seed) -> its work."""

    what: str
    groups: Callable[[Bench, DomainStream, str, int], Iterator[Group]]


# in the order of the queue; training stands before what needs it
PARTS = {
    "own": Part("train each domain's own adapter", _own),
    "joint": Part("train jointly on all domains", _joint),
    "alone": Part("base, own adapters and joint training, evaluated", _alone),
    "a": Part("fixed weights and learned coefficients, one row a class, from the line search's start", _table),
    "c": Part("buffers of up to 5 rows a class, coefficients by adapter, layer and module", _buffers),
    "large": Part("buffers of 20 rows a class", _buffers),
    "b": Part("search, entropy and RegMean", _controls),
    "few": Part("one adapter trained on as many rows as a buffer holds", _few),
    "seq": Part("train one adapter on each domain in turn", _sequences),
    "seqs": Part("sequential fine-tuning, evaluated after every domain", _sequential),
    "lead": Part("train with the head learned on the first domain", _lead),
    "d": Part("classifier heads", _heads),
    "e": Part("the merge after every experience", _path),
    "layers": Part("the merge after every experience, by layer, buffers of 20 rows a class", _path_by_layer),
    "best": Part("the merge after every experience, of the configurations that validation rows chose", _path_of_best),
    "z": Part("learned from the poster's start, c = 0", _zero),
    "even": Part("answers evened out over the buffer's inputs", _even),
    "r": Part("what the cut to a rank costs", _ranks),
    "p": Part("the merge after every experience, with prototypes", _path_of_prototypes),
    "long": Part("four times as many steps, finer coefficients, buffers of 20 rows a class", _long),
    "draws": Part("the same learned coefficients on two more draws of the buffer's rows", _draws),
    "near": Part("learned from the search close to an adapter's length, all draws of the buffer's rows", _near),
    "noise": Part("the table's learned coefficients under a likelihood of answers by chance", _near),
    "noisy": Part("what else is learned from one or two rows a class, under that likelihood", _noisy),
    "more": Part("buffers of 5 and 20 rows a class under that likelihood", _noisy_more),
    "v": Part("other starts of the learner, on validation rows", _starts),
    "f": Part("growth with the number of domains (run it alone: it is timed)", _growth),
}


def rank(group: Group) -> tuple[int, int]:
    """Its place in the queue."""
    return list(PARTS).index(group.part), group.seed
