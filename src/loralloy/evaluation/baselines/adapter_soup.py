"""adapter_soup: for each domain, the average of the adapters that are most similar to it (AdapterSoup)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from ...errors import LoralloyError
from ..suite.method import Row
from .fusion import Averaged

if TYPE_CHECKING:
    from ...tasks import Example
    from ..suite.run import Run


class AdapterSoup(Averaged):
    """The uniform parameter average of the top k adapters, chosen once for a whole test domain (Chronopoulou et al.,
    "AdapterSoup", Findings of EACL 2023, section 2.3: sentence similarity of 100 sentences of the new domain).

    What we take: a domain is a task; it is described by the mean embedding of its first `samples` validation rows, held out
    from training and from the test (the paper: samples of the test domain); training domains by the mean of their index rows.
    k = 5 as there. Averaged in factors space, A and B apart, as Fusion is.
    """

    kind = "adapter_soup"
    source = "AdapterSoup (Chronopoulou et al. 2023)"

    k: Annotated[int, Field(ge=1)] = 5
    samples: Annotated[int, Field(ge=1)] = 100

    @property
    def validation_queries(self) -> int:
        return self.samples

    def answer(self, run: Run, examples: Sequence[Example]) -> list[Row]:
        soups: dict[str, list[str]] = {}
        for example in examples:
            if example.task not in soups:
                rows = run.tasks[example.task].examples("validation", self.samples)
                if not rows:
                    raise LoralloyError(
                        f"method {self.name!r}: task {example.task!r} has no validation rows to tell its domain by; raise "
                        "splits.validation in the task"
                    )
                mean = run.vectors(rows).mean(0)
                mean = mean / max(float(np.linalg.norm(mean)), 1e-12)
                soups[example.task] = run.nearest_tasks([example], self.k, mean[None])[0]
        return self.average(run, examples, [soups[e.task] for e in examples])
