"""What there is to compute: a cell (one configuration of one seed), and a job (one adapter to train).

A cell's result is one small JSON file under OUT/cells/BENCH/. Cells of one bank, rule and space stand in one `sites.Group`,
whose terms are made once by the process that takes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RULES = {"linear": {}, "ties": {"density": 0.2}, "dare_ties": {"density": 0.2}}
SPACES = ("factors", "delta")
GRID = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
B_MAX = (3.0, 1.0, 5.0)
SIZES = (1, 2, 5, 20)  # buffer rows a class and domain
DRAWS = (1, 2)  # of the buffer's rows, beside draw 0
GRAINS = ("adapter", "layer", "module")
CHOSEN = (("linear", "delta"), ("ties", "delta"))  # the merges that are looked at more closely
FEW = (5, 20)  # buffers' rows a class and domain: an adapter is trained on as many alone
EVEN = "even_"
HEADS = ("random", "learned", "prototypes")
# where else the learner might begin: `strategies.begun` says what they are
STARTS = ("match", "match_pull", "near", "near_pull", "scale_pull", "match_still", "near_still")
NOISY = "near_noise"
LONG = "scale_long"  # the library's start from 4 rows a class on, four times as many steps
NOISY_MORE = "scale_noise"  # the same, and label noise


@dataclass(frozen=True)
class Cell:
    """One configuration. how: fixed, learned, fresh, search, entropy, regmean, geometry; base, own, joint, few and seq merge
    nothing.
    few: one adapter trained from the base on as many rows as a buffer of `per_class` holds, the first of each domain.
    even_learned and even_joint are those with their answers evened out over the buffer's inputs.

    "fresh" is learned on a buffer of rows that no adapter was trained on (its validation figures may hold those rows).

    domains: whose adapters are merged, in the bench's order. order: of "seq", and of the head learned on its first domain.
    start: where the learner begins (`strategies.begun`). draw: which draw of the buffer's rows.
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
    draw: int = 0

    @property
    def plain(self) -> str:
        """How its coefficients, or its one adapter, are made."""
        return self.how.removeprefix(EVEN)

    @property
    def even(self) -> bool:
        return self.how.startswith(EVEN)

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
        words += [f"d{self.draw}"] if self.draw else []  # what was made before there were draws is draw 0
        return "-".join(w for w in words if w)


def cell_name(settings: Mapping[str, Any]) -> str:
    """The name of the cell that a result's settings are of."""
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return Cell(**plain).name


@dataclass(frozen=True)
class Job:
    """One adapter to train. domains: one, or several for joint training. after: the domains before it in a sequence.

    few: rows a class and domain that it is trained on; 0 for the stream's.
    """

    seed: int
    domains: tuple[str, ...]
    after: tuple[str, ...] = ()
    head: str = "random"
    order: int = 0
    few: int = 0

    @property
    def name(self) -> str:
        if self.few:
            return f"s{self.seed}/few{self.few}"
        own = "+".join(self.domains) if len(self.domains) == 1 else "joint"
        lead = f"lead{self.order}-" if self.head == "learned" else ""
        return f"s{self.seed}/{lead}{'-then-'.join((*self.after, own))}"

    @property
    def before(self) -> Job | None:
        """The adapter that it goes on from."""
        return Job(self.seed, self.after[-1:], self.after[:-1], self.head, self.order) if self.after else None


def needs(cell: Cell, orders: Sequence[Sequence[str]]) -> tuple[Job, ...]:
    """The adapters that a cell merges or evaluates."""
    if cell.how == "base":
        return ()
    lead = "learned" if cell.head == "learned" else "random"
    if cell.plain == "joint":
        return (Job(cell.seed, cell.domains, (), lead, cell.order if lead == "learned" else 0),)
    if cell.how == "few":
        return (Job(cell.seed, cell.domains, few=cell.per_class or 0),)
    if cell.how == "seq":
        order = tuple(orders[cell.order])
        return tuple(Job(cell.seed, order[t : t + 1], order[:t], lead) for t in range(len(order)))
    return tuple(own(cell.seed, d, lead, cell.order) for d in cell.domains)


def own(seed: int, domain: str, head: str = "random", order: int = 0) -> Job:
    return Job(seed, (domain,), (), head, order if head == "learned" else 0)


def learned(seed: int, domains: Sequence[str], rule: str, space: str, b_max: float = 3.0, per_class: int = 1,
            grain: str = "adapter", start: str = "scale", **more: object) -> Cell:  # fmt: skip
    return Cell("learned", seed, tuple(domains), rule, space, None, b_max, per_class, grain, start, **more)  # type: ignore[arg-type]


def fresh(seed: int, domains: Sequence[str], rule: str, space: str, per_class: int = 1, grain: str = "adapter",
          draw: int = 0) -> Cell:  # fmt: skip
    return Cell("fresh", seed, tuple(domains), rule, space, None, 3.0, per_class, grain, "scale", draw=draw)
