"""Rules as their own parameter schema: every rule and plug-in, whatever the command line or a recipe hands them."""

from __future__ import annotations

import inspect
import math
from typing import Annotated, Literal

import pytest
import torch
from torch import Tensor

from loralloy.errors import LoralloyError
from loralloy.merging import (
    PLUGINS,
    RULES,
    SPACES,
    DareTies,
    Linear,
    Param,
    Parameter,
    Part,
    Rule,
    Ties,
    get_plugin,
    get_rule,
)
from loralloy.merging.rule import schema

PARTS: dict[str, Part] = {**RULES, **PLUGINS}
EVERY = [(name, p) for name, part in PARTS.items() for p in part.parameters.values()]
ids = [f"{name}.{p.name}" for name, p in EVERY]
each_parameter = pytest.mark.parametrize(("part", "parameter"), EVERY, ids=ids)
each_part = pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)


def good_values(p: Parameter) -> list[object]:
    """The default, and values at the ends of what is allowed."""
    if p.choices:
        return list(p.choices)
    if p.kind is bool:
        return [True, False]
    ends = [x for x in (p.low, p.high) if math.isfinite(x) and not (p.open_low and x == p.low)]
    inner = [p.low + 1 if p.kind is int or math.isinf(p.high) else (p.low + p.high) / 2] if math.isfinite(p.low) else []
    return [p.default, *map(p.kind, [*ends, *inner])]


def text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- what is written down ----------------------------------------------------------------------------------------------


@each_part
def test_every_part_says_what_it_is_and_where_it_is_from(part):
    for said in (part.summary, part.use_when, part.source):
        assert said == said.strip() != "" and "\n" not in said and not said.endswith(".")
    assert len(part.formula.splitlines()) > 1 or "=" in part.formula
    assert part.given == {} and part.name == part.name.lower() == part.function.__name__
    if isinstance(part, Rule):
        assert part.spaces and set(part.spaces) <= set(SPACES) and set(part.sums) <= set(part.spaces)
        assert part.acts_on in ("entries", "stack") and part.default_rank in ("full", "max")
        assert get_rule(part.name) is part
    else:
        assert part.when in ("before", "after") and get_plugin(part.name) is part


@each_parameter
def test_every_parameter_is_documented_and_typed(part, parameter):
    p = parameter
    assert p.help.strip() and "\n" not in p.help and not p.help.endswith(".")
    assert p.kind in (int, float, bool, str)
    assert (p.kind is str) == (p.choices is not None)
    assert p.default is not inspect.Parameter.empty
    assert p.low < p.high and (p.choices is None or len(set(p.choices)) > 1)
    assert p.allowed
    if p.choices:
        assert all(choice in p.allowed for choice in p.choices)


@each_parameter
def test_defaults_and_ends_pass_check_and_round_trip(part, parameter):
    for value in good_values(parameter):
        checked = parameter.check(value, part)
        assert checked == value and type(checked) is parameter.kind
        assert parameter.check(checked, part) == checked
        parsed = parameter.parse(text(value), part)
        assert parsed == checked and type(parsed) is parameter.kind
        bound = PARTS[part](**{parameter.name: value})
        assert bound.values[parameter.name] == value and f"{parameter.name}={value}" in str(bound)


def test_one_name_means_one_thing():
    """A recipe or a shell history carries a parameter from one rule to another: same type, same choices, same range."""
    seen: dict[str, tuple[str, Parameter]] = {}
    for part, p in EVERY:
        first, other = seen.setdefault(p.name, (part, p))
        assert (p.kind, p.choices, p.low, p.high, p.open_low) == (
            other.kind, other.choices, other.low, other.high, other.open_low,
        ), f"{p.name} of {part} and of {first}"  # fmt: skip
    assert {"density", "majority", "seed"} <= set(seen)


# -- what is refused ---------------------------------------------------------------------------------------------------


def bad_values(p: Parameter) -> list[object]:
    if p.choices:
        return ["", "no such choice", p.choices[0].swapcase(), f"{p.choices[0]} ", 1, True, None, [p.choices[0]]]
    if p.kind is bool:
        return [0, 1, 1.0, "yes", "true", None]
    bad: list[object] = [True, False, "0.5", None, math.nan, math.inf, -math.inf, 10**400, -(10**400), [0.5], 1j]
    if math.isfinite(p.low):
        bad += [p.low - 1, p.low] if p.open_low else [p.low - 1]
    if math.isfinite(p.high):
        bad += [p.high * 2 + 1]
    if p.kind is int:
        bad += [p.low + 0.5 if math.isfinite(p.low) else 0.5]
    return bad


@each_parameter
def test_wrong_values_are_refused_with_what_is_allowed(part, parameter):
    for value in bad_values(parameter):
        with pytest.raises(LoralloyError) as refused:
            PARTS[part](**{parameter.name: value})
        said = str(refused.value)
        assert said == f"{parameter.name} {value!r} of {part} is not valid; give {parameter.allowed}"
    for word in ("", "no such choice", "nan", "1e999", "9" * 400, "0x1", "1,5", "None"):
        with pytest.raises(LoralloyError) as refused:
            parameter.parse(word, part)
        assert str(refused.value).startswith(f"{parameter.name} ")
        assert str(refused.value).endswith(f" of {part} is not valid; give {parameter.allowed}")


@each_part
def test_unknown_parameters_are_refused_with_what_there_is(part):
    with pytest.raises(LoralloyError, match=f"^{part.name} has no parameter 'colour'; its parameters: ") as refused:
        part(colour=1)
    assert all(name in str(refused.value) for name in part.parameters) and (
        part.parameters or str(refused.value).endswith("none")
    )


def test_messages_in_words():
    cases = [
        (lambda: Ties(density=1.5), "density 1.5 of ties is not valid; give a number from 0 to 1"),
        (lambda: Ties(density=True), "density True of ties is not valid; give a number from 0 to 1"),
        (lambda: Ties(density="0.3"), "density '0.3' of ties is not valid; give a number from 0 to 1"),
        (lambda: Ties(majority="most"), "majority 'most' of ties is not valid; give total or frequency"),
        (lambda: DareTies(seed=0.5), "seed 0.5 of dare_ties is not valid; give a whole number from 0 to 2147483648"),
        (lambda: Ties(densty=0.3), "ties has no parameter 'densty'; its parameters: density, majority, normaliser, vote, trim"),
        (lambda: Linear(density=0.3), "linear has no parameter 'density'; its parameters: none"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(LoralloyError) as refused:
            call()
        assert str(refused.value) == message


def test_names_and_spaces():
    with pytest.raises(
        LoralloyError, match="'knots' is a space, not a rule; pass --space knots with a rule such as ties"
    ):
        get_rule("knots")
    with pytest.raises(LoralloyError, match="plug-in 'svcc' is not known"):
        get_plugin("svcc")
    with pytest.raises(LoralloyError, match="rule 'cat' is defined on delta and factors only; pass --space delta"):
        get_rule("cat").check_space("core")
    with pytest.raises(
        LoralloyError, match=r"space 'weights' is not known; choose delta .*; factors .*; knots .*; core "
    ):
        Ties.check_space("weights")


# -- binding -----------------------------------------------------------------------------------------------------------


def test_binding_adds_up_and_leaves_the_rule_alone():
    bound = Ties(density=0.3)(majority="frequency")
    assert bound.values["density"] == 0.3 and bound.values["majority"] == "frequency"
    assert bound(density=0.4).values["density"] == 0.4 and bound.values["density"] == 0.3
    assert Ties.values["density"] == 0.2 and Ties.given == {} and RULES["ties"] is Ties
    assert Ties(density=1).values["density"] == 1.0 and type(Ties(density=1).values["density"]) is float
    assert type(DareTies(seed=3.0).values["seed"]) is int
    assert isinstance(bound, Rule) and (bound.spaces, bound.acts_on) == (Ties.spaces, Ties.acts_on)


@each_part
def test_its_text_is_the_whole_definition(part):
    said = str(part)
    assert said.startswith(part.name) and all(f"{name}={value}" in said for name, value in part.values.items())
    assert ("(" in said) == bool(part.parameters)


def test_a_schema_is_read_from_a_signature():
    def rule(
        entries: Tensor,
        *,
        share: Annotated[float, Param("a share", 0, 1, open_low=True)] = 0.5,
        steps: Annotated[int, Param("steps", 1)] = 3,
        shift: Annotated[float, Param("any number")] = -1.0,
        fast: Annotated[bool, Param("or not")] = False,
        mode: Annotated[Literal["a", "b", "c"], Param("which")] = "b",
    ) -> Tensor:
        return entries

    found = schema(rule)
    assert list(found) == ["share", "steps", "shift", "fast", "mode"]  # in order, without the positional one
    assert [p.kind for p in found.values()] == [float, int, float, bool, str]
    assert [p.allowed for p in found.values()] == [
        "a number above 0 to 1", "a whole number of at least 1", "a number", "true or false", "one of a, b, c",
    ]  # fmt: skip
    with pytest.raises(LoralloyError):
        found["share"].check(0, "rule")
    assert found["fast"].parse("TRUE", "rule") is True and found["steps"].parse("7", "rule") == 7
    with pytest.raises(LoralloyError):
        found["steps"].parse("7.0", "rule")
    made = Rule("rule", rule, "does", "never", "here")
    assert torch.equal(made.function(torch.ones(2), **made(mode="c").values), torch.ones(2))
    assert str(made) == "rule(share=0.5, steps=3, shift=-1.0, fast=False, mode=b)"


def test_only_our_own_entrywise_rules_may_be_fused():
    """The GPU's kernels know these; any other rule runs its own function everywhere."""
    assert {r.name for r in RULES.values() if r.fused} == {r.name for r in RULES.values() if r.acts_on == "entries"}
    assert not Rule("median", lambda entries: entries.values[0], "", "", "").fused
