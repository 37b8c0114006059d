"""What a stream file may name: merges (a rule in a space) and strategies (where the coefficients come from).

Strict pydantic models: their fields are what a stream file may set, and all that decides a result is in `settings`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..errors import LoralloyError
from .fields import BufferEntry, Count, Name, Selection, Strict, Text, When

if TYPE_CHECKING:
    from ..merging.rule import Rule, Space
    from ..weighting.learned import LearnConfig

Start = Literal["scale", "zero"] | float
Form = Literal["sigmoid", "signed", "softmax"]
Granularity = Literal["adapter", "layer", "module"]
Positive = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
LabelNoise = Literal["auto"] | Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Merge:
    """A rule with its parameters, in a space, cut to a rank (None: the rule's default)."""

    name: str
    rule: Rule
    space: Space
    rank: int | str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what it makes of adapters and weights."""
        return {"rule": str(self.rule), "space": self.space, "rank": self.rank}


class MergeEntry(Strict):
    """rule: a name, or a mapping with `name` and parameters. space: one, or a list to try each. rank: of the merged adapter."""

    rule: Any = "linear"
    space: Text | Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    rank: Count | Literal["max", "full"] | None = None
    name: Name | None = None


class Strategy(Strict):
    """Where the coefficients come from.

    Class facts:
        kind: what a stream file calls it. source: the paper, or "this project".
        merges_adapters: whether a rule merges the adapters (else there is one adapter as it is, or one a domain).
        uses_buffer: whether its coefficients depend on the memory buffer.

    Fields every strategy has: `name` (made from the fields where it is not given), `only` (the merges it is run with, by
    name or rule; all by default), `per_class`, `total`, `selection` (its own buffer) and `after`, where they differ from
    the stream's; and `balance`: whether the shift of the merge's answers over the buffer's inputs is taken out of it (ours;
    :mod:`loralloy.weighting.balance`).
    """

    kind: ClassVar[str] = ""
    source: ClassVar[str] = "this project"
    merges_adapters: ClassVar[bool] = True
    uses_buffer: ClassVar[bool] = False

    name: Annotated[str, Field(min_length=1, max_length=120)]
    only: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    per_class: Count | None = None
    total: Count | None = None
    selection: Selection | None = None
    after: When | None = None
    balance: bool = False

    @model_validator(mode="after")
    def _balances_a_merge(self) -> Strategy:
        if self.balance and not self.merges_adapters:
            raise ValueError(f"`balance` evens out a merge, and {self.kind} merges nothing: leave it out")
        return self

    @property
    def needs_buffer(self) -> bool:
        """Whether its result depends on the memory buffer."""
        return self.uses_buffer or self.balance

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its result: every field of its own."""
        own = {"kind": self.kind} | self.model_dump(mode="json", exclude=set(Strategy.model_fields))
        return own | ({"balance": True} if self.balance else {})

    def buffer(self, stream: BufferEntry) -> BufferEntry:
        """The stream's buffer settings with its own."""
        own = {k: getattr(self, k) for k in ("per_class", "total", "selection") if getattr(self, k) is not None}
        return stream.model_copy(update=own)


class Fixed(Strategy):
    """One weight W for every adapter (the poster's fixed columns)."""

    kind = "fixed"
    source = "Coleman et al. 2024"
    weight: float = 1.0


class Uniform(Strategy):
    """1/N for each of N adapters."""

    kind = "uniform"


class Gradient(Strategy):
    """What learns by gradients: the options of :class:`loralloy.weighting.learned.LearnConfig` that a stream sets.

    None is the library's default.
    """

    b_max: Positive = 3.0
    form: Form = "sigmoid"
    granularity: Granularity | Literal["auto"] = "adapter"
    start: Start | None = None
    steps: Annotated[int, Field(ge=0)] | None = None
    lr: Positive | None = None
    batch_size: Count | None = None
    regularisation: AtLeast0 | None = None
    hold_out: Literal["auto"] | Annotated[float, Field(ge=0, lt=1)] | None = None
    patience: Count | None = None
    scales: Literal["auto", "near", "wide"] | Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None

    def config(self) -> dict[str, Any]:
        """The given ones."""
        names = (
            "start", "steps", "lr", "batch_size", "regularisation", "hold_out", "patience", "scales", "label_noise",
        )  # fmt: skip
        return {name: value for name in names if (value := getattr(self, name, None)) is not None}

    def learner(self) -> LearnConfig:
        """All that decides how it learns, the library's defaults too; but for the seed."""
        from ..weighting.learned import LearnConfig

        return LearnConfig(**self.config())

    def defaults(self) -> dict[str, Any]:
        """What decides its result beside its own settings: the library's, and what stands for "auto" there."""
        from ..weighting.learned import config
        from ..weighting.learned.coefficients import NEAR, WIDE

        auto = [config.ENOUGH, config.FINE, config.NOISE, NEAR, WIDE]
        return dataclasses.asdict(self.learner()) | {"auto": auto}


class Learned(Gradient):
    """alpha_i = sigmoid(c_i) b learned on the buffer by gradients."""

    kind = "learned"
    source = "Coleman et al. 2024"
    uses_buffer = True
    label_noise: LabelNoise | None = None


class Entropy(Gradient):
    """Entropy minimisation without labels (AdaMerging).

    Unset fields are those of :func:`loralloy.weighting.adamerging.adamerging`. unlabelled: training rows of each domain
    seen, their labels not looked at; None takes the buffer's rows.
    """

    kind = "entropy"
    source = "AdaMerging, Yang et al. 2024"
    uses_buffer = True
    b_max: Positive = 1.0
    granularity: Granularity = "layer"
    unlabelled: Count | None = None

    def learner(self) -> LearnConfig:
        from ..weighting.adamerging import CONFIG

        return dataclasses.replace(CONFIG, **self.config())


class Search(Strategy):
    """Black-box search of whole-adapter weights on the buffer (LoraHub's objective)."""

    kind = "search"
    source = "LoraHub, Huang et al. 2023"
    uses_buffer = True
    budget: Count | None = None


class RegMean(Strategy):
    """Closed-form coefficients from Gram matrices of unlabelled inputs. unlabelled: as in `entropy`."""

    kind = "regmean"
    source = "after RegMean, Jin et al. 2023"
    uses_buffer = True
    granularity: Granularity = "module"
    ridge: AtLeast0 | None = None
    unlabelled: Count | None = None


class Grouped(Gradient):
    """At most `groups` group adapters: a new adapter joins the group most like it, or opens one; coefficients of the groups
    are learned on the buffer (see :mod:`.grouping`: our reading of HAM, not its code)."""

    kind = "grouped"
    source = "our reading of HAM, Coleman et al. 2025"
    uses_buffer = True
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.1
    groups: Count = 4
    density: Annotated[float, Field(gt=0, le=1)] = 0.5
    label_noise: LabelNoise | None = None


class Sequential(Strategy):
    """One adapter, trained on each domain in turn: the lower bound."""

    kind = "sequential"
    merges_adapters = False


class Joint(Strategy):
    """One adapter trained on all domains seen, from the base: the upper bound (it keeps all data)."""

    kind = "joint"
    merges_adapters = False


class Oracle(Strategy):
    """Each domain answered by its own adapter: it is told the domain at test time."""

    kind = "oracle"
    merges_adapters = False


KINDS: dict[str, type[Strategy]] = {
    k.kind: k for k in (Fixed, Uniform, Learned, Entropy, Search, RegMean, Grouped, Sequential, Joint, Oracle)
}
_UNSAID = ("kind", "name", "only", "after")  # in a title
_LISTS = frozenset({"only"})  # fields that are lists themselves


def expand(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One mapping for each combination of the fields that are given as lists: ``{weight: [1, 3]}`` is two."""
    several = [key for key, value in entry.items() if isinstance(value, list) and key not in _LISTS]
    found = []
    for values in itertools.product(*(entry[key] for key in several)):
        found.append({**entry, **dict(zip(several, values, strict=True))})
    return found


def title(kind: str, given: Mapping[str, Any]) -> str:
    """``learned b_max=3 per_class=5``: the kind and the fields that a stream file sets."""
    said = " ".join(f"{key}={shown(value)}" for key, value in given.items() if key not in _UNSAID)
    return f"{kind} {said}".strip()


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def accepts_list(model: type[Strict], field: str) -> bool:
    """Whether a field is a tuple by itself, so that a list is its value and no grid."""
    hint = typing.get_type_hints(model, include_extras=False).get(field)
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return any(typing.get_origin(option) is tuple for option in options)


def merge_of(entry: MergeEntry, rank: int | str | None) -> list[Merge]:
    """The merges of one entry, one a space. Raises LoralloyError for an unknown rule, parameter or space."""
    from ..merging import get_rule
    from ..merging.plan import check_rule

    given = {"name": entry.rule} if isinstance(entry.rule, str) else entry.rule
    given = dict(given) if isinstance(given, dict) else {}
    if not isinstance(given.get("name"), str):
        raise LoralloyError("`rule` needs a name: a rule such as ties, or {name: ties, density: 0.2}")
    rule = get_rule(given.pop("name"))
    if given:
        rule = rule(**given)
    spaces = entry.space if isinstance(entry.space, tuple) else (entry.space,)
    found = []
    for space in spaces:
        bound, chosen = check_rule(rule, space)  # type: ignore[arg-type]
        said = " ".join([bound.name, *(f"{k}={shown(v)}" for k, v in bound.given.items())])
        name = entry.name or said
        if not entry.name or len(spaces) > 1:
            name = f"{name} {chosen}"
        if entry.rank is not None and not entry.name:
            name += f" rank={entry.rank}"
        found.append(Merge(name, bound, chosen, entry.rank if entry.rank is not None else rank))
    return found


def digest(data: Any) -> str:
    """The first 16 hex digits of the sha256 of plain JSON data."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def twice(names: Sequence[str]) -> str | None:
    """The first name that stands there twice."""
    return next((name for n, name in enumerate(names) if name in names[:n]), None)
