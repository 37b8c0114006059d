"""What a merging rule is: a pure function whose typed signature is its parameter schema, with the spaces it is defined in.

The command line's options, the recipe's fields, `loralloy rules` and the docs are all read from the signature: every
keyword-only parameter is `name: Annotated[type, Param(help, ...)] = default`.
"""

from __future__ import annotations

import inspect
import math
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

from ..errors import LoralloyError

Space: TypeAlias = Literal["delta", "factors", "knots", "core"]
SPACES: dict[Space, str] = {
    "delta": "on dW, as the rules' papers mean them",
    "factors": "on A and on B apart, as PEFT does",
    "knots": "on the adapters' parts of one common SVD (KnOTS, Stoica et al. 2025)",
    "core": "on small cores between common bases of A and of B (Core Space, Panariello et al. 2025; adapters balanced first)",
}


@dataclass(frozen=True)
class Param:
    """What a rule's parameter means and the values it takes; stands in the annotation."""

    help: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False


@dataclass(frozen=True)
class Parameter:
    """One parameter of a rule, as read from its signature. `choices` is None unless it is a Literal."""

    name: str
    kind: type
    default: Any
    help: str
    choices: tuple[str, ...] | None = None
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    @property
    def allowed(self) -> str:
        """The values it takes, in words."""
        if self.choices:
            return " or ".join(self.choices) if len(self.choices) < 3 else "one of " + ", ".join(self.choices)
        if self.kind is bool:
            return "true or false"
        noun = "a whole number" if self.kind is int else "a number"
        if math.isinf(self.low) and math.isinf(self.high):
            return noun
        if math.isinf(self.high):
            return f"{noun} {'above' if self.open_low else 'of at least'} {self.low:.10g}"
        return f"{noun} {'above' if self.open_low else 'from'} {self.low:.10g} to {self.high:.10g}"

    def check(self, value: Any, rule: str) -> Any:
        """`value` in the parameter's type. Raises LoralloyError naming the rule, the parameter and what is allowed."""
        good: Any = None
        if self.choices:
            good = value if isinstance(value, str) and value in self.choices else None
        elif self.kind is bool:
            good = value if isinstance(value, bool) else None
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            above = value > self.low if self.open_low else value >= self.low
            whole = self.kind is not int or float(value).is_integer()
            good = self.kind(value) if above and value <= self.high and whole else None
        if good is None:
            raise LoralloyError(f"{self.name} {value!r} of {rule} is not valid; give {self.allowed}")
        return good

    def parse(self, text: str, rule: str) -> Any:
        """A value from the command line."""
        if self.choices:
            return self.check(text, rule)
        if self.kind is bool:
            return self.check({"true": True, "false": False}.get(text.lower(), text), rule)
        try:
            return self.check(float(text) if self.kind is float else int(text), rule)
        except ValueError:
            raise LoralloyError(f"{self.name} {text!r} of {rule} is not valid; give {self.allowed}") from None


def schema(function: Callable[..., Any]) -> dict[str, Parameter]:
    """The keyword-only parameters of a function, by name."""
    hints = typing.get_type_hints(function, include_extras=True)
    found: dict[str, Parameter] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        kind, param = typing.get_args(hints[name])
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
        found[name] = Parameter(
            name,
            str if choices else kind,
            parameter.default,
            param.help,
            choices,
            param.low,
            param.high,
            param.open_low,
        )
    return found


@dataclass(frozen=True, eq=False)
class Part:
    """A rule or a plug-in: a named function with bound parameters. Calling it binds parameters: ``Ties(density=0.3)``."""

    name: str
    function: Callable[..., Any]
    summary: str
    use_when: str
    source: str
    given: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """Every parameter, by name, from the function's signature."""
        return schema(self.function)

    @property
    def values(self) -> dict[str, Any]:
        """Every parameter's value: as bound, else the default."""
        return {name: self.given.get(name, p.default) for name, p in self.parameters.items()}

    @property
    def formula(self) -> str:
        """The function's docstring: the formula and its source."""
        return inspect.getdoc(self.function) or ""

    def __call__(self, **given: Any) -> Any:
        """The same rule with these parameters. Raises LoralloyError for one that it does not have or a value out of range."""
        for name in given:
            if name not in self.parameters:
                has = ", ".join(self.parameters) or "none"
                raise LoralloyError(f"{self.name} has no parameter {name!r}; its parameters: {has}")
        checked = {name: self.parameters[name].check(value, self.name) for name, value in given.items()}
        return replace(self, given={**self.given, **checked})

    def __str__(self) -> str:
        """``ties(density=0.2, ...)``: the whole definition, defaults too."""
        said = ", ".join(f"{name}={value}" for name, value in self.values.items())
        return f"{self.name}({said})" if said else self.name


@dataclass(frozen=True, eq=False)
class Rule(Part):
    """How adapters combine.

    Attributes:
        function: with `acts_on="entries"`, Entries -> Tensor (see :mod:`.entries`): the same function in every space.
            With `acts_on="stack"`, Stack -> LowRank (see :mod:`.stack`): it works on dW through its factors.
        spaces: where it is defined; the first is the default.
        default_rank: "full" (whatever rank the result has) or "max" (cut to the largest parent rank).
        fused: whether a GPU may take :mod:`.kernels` for it; these know only the rules of this package.
        sums: the spaces in which the rule is the plain weighted sum of dW; the engine takes that from the factors, exactly.
        width: of a rule that acts on stacks, (ranks, (out, in), parameters' values as keywords) -> the rank of its result;
            None for the sum of ranks.
    """

    acts_on: Literal["entries", "stack"] = "entries"
    spaces: tuple[Space, ...] = ("delta", "factors")
    default_rank: Literal["full", "max"] = "max"
    sums: tuple[Space, ...] = ()
    fused: bool = False
    width: Callable[..., int] | None = None

    def check_space(self, space: str) -> Space:
        """`space` if the rule is defined there. Raises LoralloyError with the spaces there are."""
        if space in self.spaces:
            return space  # type: ignore[return-value]
        if space in SPACES:
            where = " and ".join(self.spaces)
            raise LoralloyError(f"rule {self.name!r} is defined on {where} only; pass --space {self.spaces[0]}")
        known = "; ".join(f"{name} ({how})" for name, how in SPACES.items())
        raise LoralloyError(f"space {space!r} is not known; choose {known}")


@dataclass(frozen=True, eq=False)
class Plugin(Part):
    """What runs before or after any rule.

    Attributes:
        when: "before", and the function is Stack -> Stack; or "after", and it is
            (result, original Stack, rank) -> result, `rank` being what the result will be cut to (None: no cut).
        finish: of a plug-in before the rule, (result, original Stack) -> result: what it still does to the rule's result,
            ahead of any plug-in after the rule. Both functions take the parameters' values as keywords.
    """

    when: Literal["before", "after"] = "before"
    finish: Callable[..., Any] | None = None
