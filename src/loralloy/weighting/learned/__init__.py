"""Learned weights: coefficients fitted by gradients through the merge, on a memory buffer as small as one sample a class."""

from .coefficients import Coefficients
from .config import LearnConfig
from .fit import learn
from .objective import Objective, TextObjective
from .result import Learned

__all__ = ["Coefficients", "LearnConfig", "Learned", "Objective", "TextObjective", "learn"]
