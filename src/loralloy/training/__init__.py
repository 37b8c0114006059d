"""Training one adapter from a task file: ``train(task, model, output, rank=8, ...)``."""

from __future__ import annotations

from .config import TrainConfig
from .run import train

__all__ = ["TrainConfig", "train"]
