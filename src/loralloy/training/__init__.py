"""Training adapters from task files: ``train(task, model, output, rank=8, ...)``, ``train_bank(tasks, model, folder)``."""

from __future__ import annotations

from .bank import train_bank
from .config import RunOptions, TrainConfig
from .run import train

__all__ = ["RunOptions", "TrainConfig", "train", "train_bank"]
