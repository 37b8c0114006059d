"""Hyperparameters of an adapter of a vision transformer, and which of its modules they mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import LoralloyError

if TYPE_CHECKING:
    from torch import nn

# What each target is called: transformers from 5.2x on, older releases and the hub's checkpoints, other ViTs.
TARGETS = {
    "q": ("attention.q_proj", "attention.attention.query"),
    "k": ("attention.k_proj", "attention.attention.key"),
    "v": ("attention.v_proj", "attention.attention.value"),
    "o": ("attention.o_proj", "attention.output.dense"),
    "fc1": ("mlp.fc1", "mlp.weights_in", "intermediate.dense"),
    "fc2": ("mlp.fc2", "mlp.weights_out", "output.dense"),
}


@dataclass(frozen=True)
class ImageTrainConfig:
    """Hyperparameters. rank, alpha and the targets are the authors' (their script: rank 8, alpha 32, qkv, fc1, fc2).

    targets: of :data:`TARGETS`, or module names. dropout: on LoRA's input. lr: peak of AdamW's rate, after 5 % of warm-up,
    down a cosine. batch_size: images a step. augment: see :func:`loralloy.live.vision.affines`. limit: the first n training
    rows of each domain. Raises LoralloyError naming the field that is out of range.
    """

    rank: int = 8
    alpha: float = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = tuple(TARGETS)
    lr: float = 5e-4
    steps: int = 200
    batch_size: int = 32
    weight_decay: float = 0.0
    augment: bool = True
    limit: int | None = None

    def __post_init__(self) -> None:
        targets = self.targets.split(",") if isinstance(self.targets, str) else self.targets
        object.__setattr__(self, "targets", tuple(t.strip() for t in targets))
        for name in ("rank", "steps", "batch_size", "limit"):
            value = getattr(self, name)
            if not (value is None and name == "limit") and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise LoralloyError(f"training option {name} is {value!r}; it must be a whole number of at least 1")
        for name, good, wanted in (
            ("alpha", 0 < self.alpha < math.inf, "above 0"),
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("dropout", 0 <= self.dropout < 1, "from 0 to below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("targets", all(self.targets) and len(self.targets) > 0, "names of targets"),
        ):
            if not good:
                raise LoralloyError(f"training option {name} is {getattr(self, name)!r}; it must be {wanted}")

    @staticmethod
    def of(changes: dict[str, Any]) -> ImageTrainConfig:
        """The defaults with `changes`. Raises LoralloyError for a name that is no option."""
        names = list(ImageTrainConfig.__dataclass_fields__)
        for name in changes:
            if name not in names:
                raise LoralloyError(f"training of images has no option {name!r}; it has: {', '.join(names)}")
        return ImageTrainConfig(**changes)


def find_targets(backbone: nn.Module, targets: Sequence[str]) -> list[str]:
    """The endings of module names that `targets` mean in this model, e.g. ``attention.q_proj``.

    Raises LoralloyError for a target that it does not have.
    """
    import torch

    linear = [name for name, module in backbone.named_modules() if isinstance(module, torch.nn.Linear)]
    found = []
    for target in targets:
        names = [t for t in TARGETS.get(target, (target,)) if any(n == t or n.endswith(f".{t}") for n in linear)]
        if not names:
            have = sorted({n.rsplit(".", 1)[-1] for n in linear})
            raise LoralloyError(
                f"target {target!r} is not in this model; give some of {', '.join(TARGETS)}, or names of its linear layers "
                f"({', '.join(have)})"
            )
        found.append(names[0])
    return found
