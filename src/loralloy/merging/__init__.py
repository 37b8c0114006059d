"""How adapters combine: rules, one a file, in named spaces, and `merge()`, which streams modules through one.

Needs torch alone, and no base model.
"""

from __future__ import annotations

import difflib
from typing import TypeVar

from ..errors import LoralloyError
from . import cat, dare_linear, dare_ties, iso_c, iso_cts, linear, magnitude_prune, pico, svc, svd, tada, ties, tsv_m
from .engine import Merged, merge, merge_factors, run
from .measure import MEASURES, Measure, MergeReport, ModuleError
from .plan import Plan, make_plan
from .rule import SPACES, Param, Parameter, Part, Plugin, Rule, Space

_FILES = (linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune, tsv_m, iso_c, iso_cts, tada)
_PLUGINS = (pico.PLUGIN, svc.PLUGIN)

RULES: dict[str, Rule] = {file.RULE.name: file.RULE for file in _FILES}
PLUGINS: dict[str, Plugin] = {plugin.name: plugin for plugin in _PLUGINS}

# Rules to bind parameters with, as `merge(..., rule=Ties(density=0.2))` does.
Linear, Cat, Svd, Ties = linear.RULE, cat.RULE, svd.RULE, ties.RULE
DareLinear, DareTies, MagnitudePrune = dare_linear.RULE, dare_ties.RULE, magnitude_prune.RULE
TsvM, IsoC, IsoCts, Tada = tsv_m.RULE, iso_c.RULE, iso_cts.RULE, tada.RULE
Pico, Svc = pico.PLUGIN, svc.PLUGIN

__all__ = [
    "MEASURES",
    "PLUGINS",
    "RULES",
    "SPACES",
    "Cat",
    "DareLinear",
    "DareTies",
    "IsoC",
    "IsoCts",
    "Linear",
    "MagnitudePrune",
    "Measure",
    "MergeReport",
    "Merged",
    "ModuleError",
    "Param",
    "Parameter",
    "Part",
    "Pico",
    "Plan",
    "Plugin",
    "Rule",
    "Space",
    "Svc",
    "Svd",
    "Tada",
    "Ties",
    "TsvM",
    "get_plugin",
    "get_rule",
    "make_plan",
    "merge",
    "merge_factors",
    "run",
]

_P = TypeVar("_P", bound=Part)


def get_rule(name: str) -> Rule:
    """The rule of this name. Raises LoralloyError listing the rules there are."""
    return _get(name, RULES, "rule")


def get_plugin(name: str) -> Plugin:
    """The plug-in of this name. Raises LoralloyError listing the plug-ins there are."""
    return _get(name, PLUGINS, "plug-in")


def _get(name: str, known: dict[str, _P], what: str) -> _P:
    if name in known:
        return known[name]
    if name in SPACES and what == "rule":
        raise LoralloyError(f"{name!r} is a space, not a rule; pass --space {name} with a rule such as ties")
    near = difflib.get_close_matches(name, known, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise LoralloyError(f"{what} {name!r} is not known{hint}; choose one of {', '.join(known)}")
