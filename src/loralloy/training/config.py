"""What a training run is made of: its hyperparameters, checked once, and compared when a run is resumed."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

from ..errors import LoralloyError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LOSSES = ("answer", "full_text")
SCHEDULES = ("cosine", "linear", "constant")
SAVE_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
TRACKERS = ("none", "tensorboard", "wandb")


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of one adapter. docs/training.md says which defaults are a paper's and which are ours.

    rank, alpha: r and PEFT's lora_alpha (scaling = alpha / rank). dropout: on LoRA's input.
    target_modules: module names, or "all-linear" (PEFT's word: every linear layer but the output).
    lr: peak of AdamW's rate; schedule: "cosine", "linear" or "constant" after `warmup` (a share of all steps below 1, a
    number of steps from 1). batch_size x grad_accumulation examples make a step. max_length: tokens of prompt + answer.
    loss: "answer" (answer and end of text) or "full_text" (every token). limit: use the first n training rows only.
    init_adapter: an adapter folder to go on from, of the same rank, scaling and modules; None starts a fresh one.
    Raises LoralloyError naming the field that is out of range.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] | str = PROJECTIONS
    lr: float = 3e-4
    epochs: float = 3
    batch_size: int = 16
    grad_accumulation: int = 1
    warmup: float = 0.06
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 512
    loss: str = "answer"
    seed: int = 0
    gradient_checkpointing: bool = False
    limit: int | None = None
    init_adapter: str | None = None

    def __post_init__(self) -> None:
        targets = self.target_modules
        if isinstance(targets, str) and targets != "all-linear":
            targets = tuple(part.strip() for part in targets.split(",") if part.strip())
        object.__setattr__(self, "target_modules", targets if isinstance(targets, str) else tuple(targets))
        for name, least in (("rank", 1), ("batch_size", 1), ("grad_accumulation", 1), ("max_length", 8)):
            self._check(name, getattr(self, name) >= least, f"at least {least}")
        for name in ("alpha", "lr", "epochs", "max_grad_norm"):
            value = getattr(self, name)
            self._check(name, value > 0 and math.isfinite(value), "above 0")
        self._check("dropout", 0 <= self.dropout < 1, "from 0 to below 1")
        self._check("weight_decay", self.weight_decay >= 0, "at least 0")
        self._check("warmup", self.warmup >= 0, "a share of the steps (below 1) or a number of steps (from 1)")
        self._check("loss", self.loss in LOSSES, "one of " + ", ".join(LOSSES))
        self._check("schedule", self.schedule in SCHEDULES, "one of " + ", ".join(SCHEDULES))
        self._check("limit", self.limit is None or self.limit >= 1, "at least 1")
        self._check("target_modules", bool(self.target_modules), 'module names, or "all-linear"')

    def _check(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise LoralloyError(f"training option {name} is {getattr(self, name)!r}; it must be {wanted}")

    def warmup_steps(self, total: int) -> int:
        """Steps of warm-up in a run of `total` steps."""
        return min(total, round(self.warmup * total) if self.warmup < 1 else round(self.warmup))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dataclasses.asdict(self)
        if not isinstance(self.target_modules, str):
            values["target_modules"] = list(self.target_modules)
        return values

    @staticmethod
    def of(config: TrainConfig | None, changes: dict[str, Any]) -> TrainConfig:
        """`config` (or the defaults) with `changes`. Raises LoralloyError for a name that is no option."""
        names = [f.name for f in dataclasses.fields(TrainConfig)]
        for name in changes:
            if name not in names:
                raise LoralloyError(f"training has no option {name!r}; it has: {', '.join(names)}")
        return dataclasses.replace(config or TrainConfig(), **changes)


@dataclass(frozen=True)
class RunOptions:
    """How a run goes and what it writes beside the weights; nothing here changes what is learned, but `dtype`.

    The fields are the keywords of :func:`loralloy.training.train`, which says what they mean.
    Raises LoralloyError naming the flag that is out of range.
    """

    dtype: str = "auto"
    device: str = "auto"
    base_name: str | None = None
    save_dtype: str = "fp16"
    save_every: int = 100
    resume: bool = True
    overwrite: bool = False
    tracker: str = "none"
    evaluate: bool = True
    eval_limit: int | None = None
    eval_batch_size: int = 32
    licence: str = "apache-2.0"

    def __post_init__(self) -> None:
        if self.save_dtype not in SAVE_DTYPES:
            raise LoralloyError(f"--save-dtype {self.save_dtype!r} is unknown; use {', '.join(SAVE_DTYPES)}")
        if self.save_every < 1:
            raise LoralloyError(f"--save-every is {self.save_every}; it must be at least 1 step")
        if self.eval_limit is not None and self.eval_limit < 1:
            raise LoralloyError(
                f"--eval-limit is {self.eval_limit}; it must be at least 1 (--no-evaluate skips the evaluation)"
            )
        if self.eval_batch_size < 1:
            raise LoralloyError(f"--eval-batch-size is {self.eval_batch_size}; it must be at least 1")
        if self.tracker not in TRACKERS:
            raise LoralloyError(f"--tracker {self.tracker!r} is unknown; use none, tensorboard or wandb")
        if self.tracker != "none" and importlib.util.find_spec(self.tracker) is None:
            raise LoralloyError(
                f"--tracker {self.tracker} needs the package {self.tracker}: pip install 'loralloy[trackers]'"
            )


def flags(settings: TrainConfig | RunOptions) -> list[str]:
    """The words of `loralloy train` that make these settings: only what differs from the defaults is named."""
    words: list[str] = []
    for option in dataclasses.fields(settings):
        value = getattr(settings, option.name)
        if value == option.default:
            continue
        flag = "--" + option.name.replace("_", "-")
        if isinstance(value, bool):
            words += [flag] if value else [f"--no-{flag[2:]}"]
        else:
            # repr, not %g: the command must make the very number again
            number = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
            words += [flag, ",".join(value) if isinstance(value, tuple) else number]
    return words
