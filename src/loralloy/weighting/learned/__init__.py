"""Learned weights: coefficients fitted by gradients through the merge, on a memory buffer as small as one sample a class."""

from .coefficients import Coefficients
from .fit import LearnConfig, Learned, learn
from .objective import Objective, TextObjective

__all__ = ["Coefficients", "LearnConfig", "Learned", "Objective", "TextObjective", "learn"]
