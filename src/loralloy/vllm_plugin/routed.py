"""Routed weights as a composition that vLLM meets again: few adapters, in steps, so that its caches pay."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

from ..errors import LoralloyError
from ..serving.grammar import AUTO, BASE, MAX_LENGTH, Composition, canonical, parse, with_terms

_COLON = re.compile(r"\s*auto\s*:\s*(?P<rule>\S.*)?\Z", re.DOTALL)


def asks_router(model: object) -> Composition | None:
    """The composition with `auto` in it, if a request's `model` is one: ``auto``, ``auto @ ties(density=0.2)``, or with a
    colon for the ``@``, ``auto:ties``. None for any other name. Raises GrammarError for an auto that cannot be read."""
    if not isinstance(model, str) or not re.match(r"\s*auto\s*(?:\Z|[@:])", model):
        return None
    colon = _COLON.match(model)
    if colon is not None:
        model = f"{AUTO} @ {colon['rule'].lstrip('@ ')}" if colon["rule"] else AUTO
    return parse(model)


def rounded(weights: Mapping[str, float], step: float, top: int) -> dict[str, float]:
    """The `top` largest weights above 0 in whole multiples of `step`, with the sum that all had, to the nearest step.

    What is cut off goes to those that stay, in proportion; steps are dealt by largest remainder. Without a weight above
    0, none.
    """
    if not (0 < step <= 1 and top >= 1):
        raise LoralloyError(
            f"--step {step:g} with --top {top} is not valid; give a step above 0, at most 1, and at least one adapter"
        )
    kept = sorted(((n, w) for n, w in weights.items() if w > 0), key=lambda item: (-item[1], item[0]))[:top]
    if not kept:
        return {}
    total = sum(w for w in weights.values() if w > 0)
    steps = max(1, round(total / step))
    shares = {name: w / sum(w for _, w in kept) * steps for name, w in kept}
    dealt = {name: math.floor(share) for name, share in shares.items()}
    left = steps - sum(dealt.values())
    for name in sorted(shares, key=lambda n: dealt[n] - shares[n])[:left]:
        dealt[name] += 1
    return {name: round(n * step, 6) for name, n in dealt.items() if n}


def composed(asked: Composition, weights: Mapping[str, float]) -> Composition | None:
    """`asked` with the routed terms, in one order whatever their weights; None for the base model alone."""
    made = with_terms(asked, sorted(weights.items()))
    return made if made.terms else None


def one_name(model: str, adapters: Collection[str]) -> str:
    """The one name for all ways to write a composition of these adapters; any other name as it is.

    vLLM knows an adapter by the name it was asked for: under two names the same folder would take two of its slots.
    """
    if model in adapters:  # an exact name comes first, whatever it could also be read as
        return model
    try:
        made = parse(model)
    except LoralloyError:
        return model
    if not made.terms or any(name not in adapters for name, _ in made.terms):
        return model
    made = canonical(made)
    (name, weight), *more = made.terms
    if not more and weight == 1 and name not in (AUTO, BASE) and made == Composition(made.terms):
        return name
    text = str(made)
    return model if text in adapters or len(text) > MAX_LENGTH else text
