"""routed: weights retrieved for each query, composed by any rule in any space; the paper's system and its variants."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ...errors import LoralloyError
from ...merging import get_rule
from ...recipe.schema import PartEntry
from ..suite.merges import How
from ..suite.method import Method, Row, Strict

if TYPE_CHECKING:
    from ...tasks import Example
    from ..suite.run import Run


class WeigherEntry(Strict):
    """Which router, and what it does not choose itself (see `weighting.open_weigher`)."""

    kind: Literal["paper", "kernel", "probe", "auto"] = "paper"
    k: int | None = None
    p: float | None = None
    temperature: float | None = None
    kernel: str | None = None


def _known(entry: PartEntry) -> PartEntry:
    """The rule is there and takes these parameters."""
    try:
        get_rule(entry.name)(**entry.parameters)
    except LoralloyError as error:
        raise ValueError(str(error)) from None
    return entry


def _rank(value: Any) -> Any:
    if value in (None, "max", "full") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"{value!r} is not a rank; give a positive whole number, max or full")


Weigher = Annotated[WeigherEntry, BeforeValidator(lambda v: {"kind": v} if isinstance(v, str) else v)]
Rule = Annotated[PartEntry, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v), AfterValidator(_known)]


class Composed(Method):
    """What every method that merges by a rule may set.

    rule: a name of `merging.RULES`, or a mapping of `name` and its parameters. space: None takes the rule's default. rank:
    of the result, a number, "max" (the largest parent's) or "full"; None takes the rule's default. step: weights are rounded
    to it before a merge (their sum kept), so that merges are shared; what is live needs none and is not rounded.
    """

    rule_: Rule = Field(PartEntry(name="linear"), alias="rule")
    space_: str | None = Field(None, alias="space")
    rank_: Annotated[int | str | None, BeforeValidator(_rank)] = Field(None, alias="rank")
    step: Annotated[float, Field(ge=0, le=1)] = 0.05

    @model_validator(mode="after")
    def _fits(self) -> Composed:
        try:
            self.how  # noqa: B018 - the rule must be defined in the space
        except LoralloyError as error:
            raise ValueError(str(error)) from None
        return self

    @cached_property
    def how(self) -> How:
        rule = get_rule(self.rule_.name)(**self.rule_.parameters)
        space = rule.check_space(self.space_ or rule.spaces[0])
        return How(rule, space, self.rank_)  # type: ignore[arg-type]

    @property
    def live(self) -> bool:
        """Whether nothing need be merged: the plain weighted sum of dW, whole."""
        how = self.how
        return how.rule.name == "linear" and how.space == "delta" and how.rank in (None, "full")

    @property
    def space(self) -> str:
        return self.how.space

    @property
    def rule(self) -> str:
        return str(self.how.rule)

    @property
    def rank(self) -> str:
        return "live" if self.live else str(self.how.rank or self.how.rule.default_rank)

    @property
    def cost(self) -> float:
        if self.live:
            return 1.5
        return 30.0 if self.how.space == "delta" and self.how.rule.acts_on == "entries" else 10.0

    def compose(self, run: Run, examples: Sequence[Example], weights: Sequence[dict[str, float]]) -> list[Row]:
        """Answers under these weights: live where that is the same, else merged. Empty weights are the base model."""
        if self.live:
            return run.composed(examples, weights)
        return run.merged(examples, weights, self.how, self.step)


class Routed(Composed):
    """Task-aware composition by similarity retrieval (arXiv 2602.21222): weights from the query's nearest examples.

    weigher: "paper" is its own (100 nearest, exp(-d), nucleus 0.9); "kernel", "probe" and "auto" are this project's
    (`weighting.open_weigher`). unlike: queries whose "unlike anything here" score exceeds this are left to the base model.
    """

    kind = "routed"
    source = "arXiv 2602.21222"

    weigher: Weigher = WeigherEntry()
    unlike: Annotated[float, Field(gt=0, le=1)] | None = None

    @property
    def cost(self) -> float:
        return super().cost + (0 if self.weigher.kind == "paper" else 20)  # fitted anew for each task left out

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        return self.compose(run, examples, self.weights(run, examples))

    def weights(self, run: Run, examples: Sequence[Example]) -> list[dict[str, float]]:
        """The routed weights of each example; none for one that is unlike everything."""
        weigher = self.weigher.model_dump(exclude_none=True)
        if self.unlike is not None and self.weigher.kind != "kernel":
            weigher["unlike"] = True  # the tuned kernel has the score anyway
        return [
            {} if self.unlike is not None and w.explain["unlike"] > self.unlike else dict(w.items())
            for w in run.weigh(weigher, examples)
        ]
