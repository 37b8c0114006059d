"""`loralloy rules`: how adapters can be combined, when to use which, and every parameter with what it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import LoralloyError
from .common import Json
from .parameters import said

if TYPE_CHECKING:
    from rich.console import Console

    from ..merging.rule import Part


def rules(
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="A rule, plug-in or space, to see it in full."),
    ] = None,
    json: Json = False,
) -> None:
    """List the rules, plug-ins and spaces, with when to use which; or show one with its formula, source and parameters.

    Example: loralloy rules ties
    """
    from ..console import out as stdout

    data = catalogue()
    if name is not None:
        found = [item for kind in data.values() for item in kind if item["name"] == name.replace("-", "_")]
        if not found:
            raise LoralloyError(_unknown(name, [item["name"] for kind in data.values() for item in kind]))
        if json:
            stdout.print_json(data=found[0])
        else:
            _one(found[0], stdout)
    elif json:
        stdout.print_json(data=data)
    else:
        _table(data, stdout)


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Rules, plug-ins and spaces as plain data, read from the rules themselves."""
    from ..merging import PLUGINS, RULES
    from ..merging.rule import SPACES

    return {
        "rules": [
            _part(rule) | {"kind": "rule", "spaces": list(rule.spaces), "default_rank": rule.default_rank}
            for rule in RULES.values()
        ],
        "plugins": [_part(p) | {"kind": "plug-in", "when": p.when} for p in PLUGINS.values()],
        "spaces": [
            {
                "name": name,
                "kind": "space",
                "meaning": meaning,
                "rules": [rule.name for rule in RULES.values() if name in rule.spaces],
            }
            for name, meaning in SPACES.items()
        ],
    }


def _part(part: Part) -> dict[str, Any]:
    return {
        "name": part.name,
        "summary": part.summary,
        "use_when": part.use_when,
        "source": part.source,
        "formula": part.formula,
        "parameters": [
            {"name": p.name, "default": p.default, "allowed": p.allowed, "help": p.help}
            for p in part.parameters.values()
        ],
    }


def _table(data: dict[str, list[dict[str, Any]]], stdout: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    for kind, third in (("rules", "spaces"), ("plugins", "runs")):
        if not data[kind]:
            continue
        table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
        table.add_column(kind.replace("plugins", "plug-ins").removesuffix("s"), no_wrap=True)
        table.add_column(third, max_width=16)
        table.add_column("parameters (defaults)", max_width=24)
        table.add_column("what it does; use it when", min_width=30)
        for item in data[kind]:
            values = "\n".join(f"{p['name']} = {said(p['default'])}" for p in item["parameters"])
            where = ", ".join(item["spaces"]) if kind == "rules" else f"{item['when']} the rule"
            what = Text.assemble(item["summary"], "\n", (item["use_when"], "dim"))
            table.add_row(Text(item["name"], style="bold"), where, values or "-", what)
        stdout.print(table)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("space", no_wrap=True)
    table.add_column("a rule acts there")
    for item in data["spaces"]:
        table.add_row(Text(item["name"], style="bold"), item["meaning"])
    stdout.print(table)
    stdout.print("\n`loralloy rules ties` shows one in full; a rule's first space is its default.", markup=False)


def _one(item: dict[str, Any], stdout: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    def line(text: str) -> None:
        stdout.print(text, markup=False)

    if item["kind"] == "space":
        stdout.print(Text.assemble((item["name"], "bold"), ", a space: ", item["meaning"]))
        line(f"rules that are defined there: {', '.join(item['rules'])}")
        return
    stdout.print(Text.assemble((item["name"], "bold"), f", a {item['kind']}: ", item["summary"]))
    line(f"use it when: {item['use_when']}")
    if item["kind"] == "rule":
        default = {"full": "the rank that the result has", "max": "the largest parent's"}[item["default_rank"]]
        line(f"spaces: {', '.join(item['spaces'])} (default {item['spaces'][0]}); rank if not given: {default}")
    else:
        line(f"runs {item['when']} the rule, whichever it is: --{item['when']} {item['name']}")
    line(f"\n{item['formula']}\n")
    line(f"source: {item['source']}")
    if not item["parameters"]:
        line("parameters: none")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("parameter", "default", "takes", "meaning"):
        table.add_column(heading)
    for p in item["parameters"]:
        table.add_row(Text(p["name"], style="bold"), said(p["default"]), p["allowed"], p["help"])
    stdout.print(table)


def _unknown(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"there is no rule, plug-in or space {name!r}{hint}; there are {', '.join(known)}"
