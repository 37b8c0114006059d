"""shuffled: every query under another query's routed weights (a control)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from .routed import Routed

if TYPE_CHECKING:
    from ...tasks import Example
    from ..suite.run import Run


class Shuffled(Routed):
    """Does it matter whose weights they are? Weights handed on in a ring through the examples in a seeded order.

    among: "all" examples (the routing as such is broken), or those of one "task" (only what is per query is). In scope
    leave_own_out an own adapter in the weights received is dropped, and the rest scaled up; with nothing left, the next
    example's weights are taken.
    """

    kind = "shuffled"
    source = "a control"

    among: Literal["all", "task"] = "all"

    def weights(self, run: Run, examples: Sequence[Example]) -> list[dict[str, float]]:
        found = super().weights(run, examples)
        groups: dict[str, list[int]] = {}
        for i, e in enumerate(examples):
            groups.setdefault(e.task if self.among == "task" else "", []).append(i)
        result: list[dict[str, float]] = [{}] * len(examples)
        for members in groups.values():
            ring = sorted(members, key=lambda i: hashlib.sha256(f"{run.seed}|{examples[i].id}".encode()).digest())
            for place, i in enumerate(ring):
                own = run.left_out(examples[i])
                for step in range(1, len(ring) + 1):
                    handed = found[ring[(place + step) % len(ring)]]
                    given = dict(handed)
                    if given.pop(own or "", 0.0):
                        total = sum(given.values())
                        given = {n: w / total for n, w in given.items()} if total > 0 else {}
                    if given or not handed:  # no weights at all are the base's, and are handed on too
                        result[i] = given
                        break
        return result
