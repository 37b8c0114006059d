"""AdaMerging: coefficients that make the model sure of its answers, from inputs without labels.

Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024 (arXiv 2310.02575), section 3.2: minimise the
mean entropy of the model's predictions over unlabeled inputs, one coefficient a task or (better, they find) a task and layer,
within [0, 1], from 0.3. Theirs are weights of full fine-tunings, clamped, and Adam takes 500 steps of 0.001; ours are of
adapters under any entrywise rule, with sigmoid(c) in place of the clamp and 60 steps whose rate falls from 0.08 along a cosine,
which can go as far (2.4 in c from 0.3 is 0.5 in alpha). Entropy falls, too, where a model is surely wrong: look at a few labels
before trusting it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import LoralloyError
from ..merging import Rule
from .learned import LearnConfig, Learned, Objective, learn

if TYPE_CHECKING:
    from ..bank import Bank
    from ..base_ref import BaseRef
    from ..live.learnable import Learnable

B_MAX, GRANULARITY = 1.0, "layer"
CONFIG = LearnConfig(lr=0.08, start=0.3, regularisation=0.0, hold_out=0.0, label_noise=0.0)


def adamerging(
    model: nn.Module,
    bank: Bank,
    objective: Objective,
    *,
    rule: Rule | str | None = None,
    space: str | None = None,
    form: Any = "sigmoid",
    b_max: float = B_MAX,
    granularity: Any = GRANULARITY,
    config: LearnConfig = CONFIG,
    learnable: Learnable | None = None,
    base: BaseRef | None = None,
    progress: bool = True,
) -> Learned:
    """:func:`loralloy.weighting.learned.learn` with AdaMerging's objective, range, granularity and start.

    objective: of kind "entropy"; no label is looked at. config: by default as above, nothing held out.
    Raises LoralloyError for an objective of another kind, and what `learn` raises.
    """
    kind = getattr(objective, "kind", None)
    if kind != "entropy":
        raise LoralloyError(
            f"AdaMerging minimises entropy, and the objective is of kind {kind!r}; make it with kind='entropy'"
        )
    return learn(
        model, bank, objective, rule=rule, space=space, form=form, b_max=b_max, granularity=granularity,
        config=config, learnable=learnable, base=base, progress=progress,
    )  # fmt: skip
