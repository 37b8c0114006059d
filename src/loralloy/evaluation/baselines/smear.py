"""smear: the adapters' parameters averaged by a trained router, one average for each example."""

from __future__ import annotations

from .gates import TrainedRouter


class Smear(TrainedRouter):
    """A' = sum_i w_i A_i, B' = sum_i w_i B_i with w = softmax(router(mean of the prompt's states)) (Muqeeth et al. 2023).

    One router a layer, read off the first pass over the prompt; the answer's tokens run under the same average. Trained as in
    :class:`~loralloy.evaluation.baselines.gates.TrainedRouter`. Adapters of smaller rank are padded with zeros.
    """

    kind = "smear"
    source = "SMEAR (arXiv 2306.03745), over frozen adapters; our training"
    router = "smear"

    @property
    def space(self) -> str:
        return "factors"

    @property
    def rule(self) -> str:
        return "parameter average"

    def title(self) -> str:
        return self.heading or "SMEAR"
