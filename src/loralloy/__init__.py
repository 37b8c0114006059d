"""LoRAlloy composes LoRA adapters: which adapters (a bank), how much of each (weights), and how they combine (a rule).

`import loralloy` is light: it brings torch and nothing of transformers, peft, chromadb or matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adapter import Adapter as Adapter
    from .bank import Bank as Bank
    from .errors import LoralloyError as LoralloyError
    from .factors import LoraFactors as LoraFactors
    from .merging import merge as merge
    from .recipe import Recipe as Recipe
    from .weights import Weights as Weights

_HOMES = {
    "Adapter": ".adapter",
    "Bank": ".bank",
    "LoraFactors": ".factors",
    "LoralloyError": ".errors",
    "Recipe": ".recipe",
    "Weights": ".weights",
    "merge": ".merging",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    """Public names, imported when first used."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
