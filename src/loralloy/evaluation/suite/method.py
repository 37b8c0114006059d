"""What a method of the suite is: one way to answer examples. Each lives in its own file of `evaluation/baselines/`.

A method is a strict pydantic model: its fields are what a suite file may set, its class facts are what tables say of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from ...errors import LoralloyError

if TYPE_CHECKING:
    from ...tasks import Example
    from .run import Run

Query: TypeAlias = Literal["hinted", "raw"]
Scope: TypeAlias = Literal["in_domain", "leave_own_out"]
QUERIES: tuple[Query, ...] = ("hinted", "raw")
SCOPES: tuple[Scope, ...] = ("in_domain", "leave_own_out")

# kind -> its file in evaluation/baselines; imported when a suite asks for it
KINDS: dict[str, str] = {
    "majority": "majority", "base": "base", "perfect": "perfect", "routed": "routed", "uniform": "uniform",
    "selection": "selection", "fusion": "fusion", "mixture": "mixture", "adapter_soup": "adapter_soup",
    "multitask": "multitask", "task_average": "task_average", "shuffled": "shuffled",
    "moe": "moe", "smear": "smear", "arrow": "arrow", "logo": "logo",
}  # fmt: skip


class Row(NamedTuple):
    """What a method says of one example.

    weights: adapter -> coefficient, None where there are none (or they change by token). scores: each option's
    log-likelihood in nats, in the options' order; None for free text.
    """

    answer: str
    weights: dict[str, float] | None = None
    scores: list[float] | None = None


class Strict(BaseModel):
    """Unknown fields and silent conversions are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Method(Strict):
    """One way to answer examples.

    Class facts:
        kind: what a suite file calls it.
        source: the paper, or "this project".
        depends: which of "query", "scope" and "seed" its answers depend on; it is run once for each combination of these.
        only_scopes: the scopes in which it makes sense.
        uses: what it needs beside the tasks, of "model", "bank", "index", "multitask"; it is in the cell's fingerprint.

    Fields every method has: `name` (in cells and tables), `heading` (a table's words for it; made from the fields where it is
    empty), and, to save time, which `queries`, `scopes` and `seeds` it is run on (None: all of the suite's).
    """

    kind: ClassVar[str] = ""
    source: ClassVar[str] = ""
    depends: ClassVar[frozenset[str]] = frozenset({"query", "scope", "seed"})
    only_scopes: ClassVar[tuple[Scope, ...]] = SCOPES
    uses: ClassVar[frozenset[str]] = frozenset({"model", "bank", "index"})

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=60)]
    heading: str = ""
    queries: tuple[Query, ...] | None = None
    scopes: tuple[Scope, ...] | None = None
    seeds: tuple[int, ...] | None = None

    @property
    def space(self) -> str:
        """The space that adapters are combined in: "delta", "factors", another of `merging.SPACES`, or "-"."""
        return "-"

    @property
    def rule(self) -> str:
        """The merging rule with its parameters, or "-"."""
        return "-"

    @property
    def rank(self) -> str:
        """Of what is composed: "live" where nothing is merged, else the cut; "-" where no adapters are combined."""
        return "-"

    @property
    def cost(self) -> float:
        """Roughly, seconds a row against the base model's 1: longer cells are started first."""
        return 1.0

    @property
    def validation_queries(self) -> int:
        """Validation rows a task whose queries it embeds beside the test rows' (they are embedded once, beforehand)."""
        return 0

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its answers: every field of its own."""
        common = set(Method.model_fields)
        return {"kind": self.kind} | self.model_dump(mode="json", exclude=common, by_alias=True)

    def title(self) -> str:
        """What tables call it."""
        return self.heading or self.name.replace("_", " ")

    def check(self, run: Run) -> None:
        """Raises LoralloyError when the method cannot run here (an adapter is missing, say); called before any work."""

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        """One row an example, in order."""
        raise NotImplementedError


class LiveMethod(Method):
    """Adapters summed in the running model, each input under weights of its own: exact, nothing is merged."""

    @property
    def space(self) -> str:
        return "delta"

    @property
    def rule(self) -> str:
        return "linear"

    @property
    def rank(self) -> str:
        return "live"


def find_kind(kind: str) -> type[Method]:
    """The class of a kind of method. Raises LoralloyError listing the kinds there are."""
    if kind not in KINDS:
        raise LoralloyError(f"method kind {kind!r} is not known; choose from {', '.join(KINDS)}")
    module = importlib.import_module(f"..baselines.{KINDS[kind]}", __package__)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Method) and value.kind == kind:
            return value
    raise LoralloyError(f"method kind {kind!r} has no class in {module.__name__}")
