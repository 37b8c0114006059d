"""moe: a mixture of experts over the adapters, routed token by token by a trained linear router."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .gates import TrainedRouter


class Moe(TrainedRouter):
    """y = W0 x + sum_i c_i(x) s_i B_i A_i x with c = softmax(router(x)), soft or over the top k (LoraRetriever's MoE baselines).

    LoraRetriever does not publish its routers' training; this one is ours: one router a layer, the answers' loss, see
    :class:`~loralloy.evaluation.baselines.gates.TrainedRouter`. A top_k is trained with, not put on afterwards (top 1: the
    gradient goes straight through).
    """

    kind = "moe"
    source = "LoraRetriever's MoE baseline (arXiv 2402.09997); our training"
    router = "token"

    top_k: Annotated[int, Field(ge=1)] | None = None

    @property
    def rule(self) -> str:
        return "gate by token"

    @property
    def experts(self) -> int | None:
        return self.top_k

    def title(self) -> str:
        return self.heading or ("MoE soft" if self.top_k is None else f"MoE top {self.top_k}")
