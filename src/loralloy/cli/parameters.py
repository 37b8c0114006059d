"""Options made from the rules' own schemas: one for each parameter name that a rule or a plug-in has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperCommand

from ..errors import LoralloyError

if TYPE_CHECKING:
    from ..merging.rule import Part

_META = "loralloy.parameters"


def parts() -> dict[str, Part]:
    """Every rule and plug-in, by name."""
    from ..merging import PLUGINS, RULES

    return {**RULES, **PLUGINS}


def said(value: Any) -> str:
    """A parameter's value as the command line and YAML write it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@cache
def options() -> tuple[Any, ...]:
    """One option a parameter name; its help says what it means, what is allowed, and which rules take it.

    They are made when `loralloy merge` is parsed, not when it is imported: the rules import torch.
    """
    by_name: dict[str, dict[str, dict[str, list[str]]]] = {}  # name -> what is said -> default -> rules
    for part in parts().values():
        for name, p in part.parameters.items():
            takers = by_name.setdefault(name, {}).setdefault(f"{p.help}: {p.allowed}", {})
            takers.setdefault(said(p.default), []).append(part.name)
    signature = []
    for name, meanings in by_name.items():
        text = "; or ".join(f"{meaning}. {_takers(takers)}" for meaning, takers in meanings.items())
        option = typer.Option(flag(name), help=text, rich_help_panel="Parameters of rules and plug-ins")
        hint = Annotated[Optional[str], option]  # noqa: UP045 - typer evaluates this at run time on Python 3.10
        signature.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))

    def taker(**_: str | None) -> None: ...

    taker.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    taker.__annotations__ = {p.name: p.annotation for p in signature}
    app = typer.Typer(add_completion=False)
    app.command()(taker)
    return tuple(p for p in typer.main.get_command(app).params if p.name in by_name)


def _takers(by_default: Mapping[str, list[str]]) -> str:
    """For ties (0.2 if not given) and dare_linear, dare_ties (0.5)."""
    parts = [
        f"{', '.join(names)} ({default}{'' if n else ' if not given'})"
        for n, (default, names) in enumerate(by_default.items())
    ]
    return "For " + " and ".join(parts) + "."


class ParameterCommand(TyperCommand):
    """A command that takes the rules' parameters as options beside its own; :func:`given` has those that were used."""

    def get_params(self, ctx: Any) -> list[Any]:
        return [*super().get_params(ctx), *options()]

    def invoke(self, ctx: Any) -> Any:
        texts = {p.name: ctx.params.pop(p.name, None) for p in options()}
        ctx.meta[_META] = {name: text for name, text in texts.items() if text is not None}
        return super().invoke(ctx)


def given(context: typer.Context) -> dict[str, str]:
    """The parameters that the command line gave, as text."""
    return context.meta.get(_META, {})


def assign(texts: Mapping[str, str], chosen: Mapping[str, Part]) -> dict[str, dict[str, Any]]:
    """field -> {parameter: value}: each to the rule or plug-in (by field: rule, before, after) that has it.

    Raises LoralloyError for one that none of them has, saying what they have and which rules have it, and for a value that
    is out of range.
    """
    result: dict[str, dict[str, Any]] = {field: {} for field in chosen}
    for name, text in texts.items():
        homes = [field for field, part in chosen.items() if name in part.parameters]
        if not homes:
            has = "; ".join(
                f"{part.name} has {', '.join(map(flag, part.parameters)) or 'no parameters'}"
                for part in chosen.values()
            )
            takers = ", ".join(part.name for part in parts().values() if name in part.parameters)
            raise LoralloyError(f"{flag(name)} is not for this merge: {has}. It is for {takers}")
        if len(homes) > 1:
            both = " and ".join(chosen[field].name for field in homes)
            raise LoralloyError(f"{flag(name)} could be for {both}; say which in a recipe (loralloy merge recipe.yaml)")
        part = chosen[homes[0]]
        try:
            result[homes[0]][name] = part.parameters[name].parse(text, part.name)
        except LoralloyError as error:
            raise error.within(flag(name)) from None
    return result
