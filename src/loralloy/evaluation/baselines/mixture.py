"""mixture: the mean of the outputs of the three nearest adapters (LoraRetriever's Mixture)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..suite.method import LiveMethod, Row

if TYPE_CHECKING:
    from ...tasks import Example
    from ..suite.run import Run


class Mixture(LiveMethod):
    """y = W0 x + 1/k sum_p s_p B_p A_p x over the top k (Zhao et al., arXiv 2402.09997, section 3.3), exact and live.

    Retrieved as in :class:`~loralloy.evaluation.baselines.selection.Selection`. The same dW as linear in delta space with
    weight 1/k each.
    """

    kind = "mixture"
    source = "LoraRetriever (arXiv 2402.09997)"

    k: Annotated[int, Field(ge=1)] = 3

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        nearest = run.nearest_tasks(examples, self.k)
        return run.composed(examples, [dict.fromkeys(names, 1 / self.k) for names in nearest])
