"""What a merging rule is: a pure function over one module's factors, with the spaces it is defined in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..errors import LoralloyError
from ..factors import LoraFactors

Space: TypeAlias = Literal["delta", "factors"]
SPACES: tuple[Space, ...] = ("delta", "factors")
Apply: TypeAlias = Callable[[Sequence[LoraFactors], Sequence[float], Space], LoraFactors]


@dataclass(frozen=True)
class Rule:
    """A rule's name, function and defaults.

    apply(factors, weights, space) combines the factors of one module; ranks may differ unless the rule says otherwise.
    default_rank is "full" (whatever rank the result has) or "max" (cut to the largest parent rank). `sums` names the
    spaces in which the rule is the plain weighted sum of dW, so that its error is that of the cut alone.
    """

    name: str
    apply: Apply
    spaces: tuple[Space, ...]
    default_rank: Literal["full", "max"]
    summary: str
    use_when: str
    sums: tuple[Space, ...] = ()

    def check_space(self, space: str) -> Space:
        if space in self.spaces:
            return space  # type: ignore[return-value]
        if space in SPACES:
            raise LoralloyError(
                f"rule {self.name!r} is defined on {' and '.join(self.spaces)} only; pass --space {self.spaces[0]}"
            )
        raise LoralloyError(
            f"space {space!r} is not known; choose delta (acts on dW) or factors (PEFT: on A and B apart)"
        )
