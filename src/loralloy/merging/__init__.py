"""How adapters combine: rules, one a file, and `merge()`, which streams modules through one. Needs torch alone."""

from __future__ import annotations

from ..errors import LoralloyError
from . import cat, linear, svd
from .engine import Merged, MergeReport, merge
from .rule import Rule, Space

RULES: dict[str, Rule] = {rule.name: rule for rule in (linear.RULE, cat.RULE, svd.RULE)}

__all__ = ["RULES", "MergeReport", "Merged", "Rule", "Space", "get_rule", "merge"]


def get_rule(name: str) -> Rule:
    """The rule of this name. Raises LoralloyError listing the rules there are."""
    if name not in RULES:
        raise LoralloyError(f"rule {name!r} is not known; choose one of {', '.join(RULES)}")
    return RULES[name]
