"""The vLLM server that this process is, as far as its objects show it (checked with vLLM 0.32).

A resolver is given a base model's path and a name, and no more. Three things decide what it may do: the rank and dtype that
vLLM was started with, which names it keeps (``OpenAIServingModels.lora_requests``: for them it never asks a resolver again,
and loads from their folders whenever a worker has dropped them), and which requests are under way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

_FRAMES = 8


class Running:
    """A server's ``OpenAIServingModels``, seen from outside; `None` and empty answers where this vLLM shows none."""

    def __init__(self, models: Any) -> None:
        self._models = models

    @staticmethod
    def find() -> Running | None:
        """The server that awaits this call, some frames up; None if there is none (or vLLM has changed).

        The registry holds resolvers and knows no server, and vLLM freezes the collector's heap, so that objects cannot be
        listed either: what is left is who is asking.
        """
        frame = sys._getframe(1)
        for _ in range(_FRAMES):
            if frame.f_code.co_name == "resolve_lora" and isinstance(
                getattr(frame.f_locals.get("self"), "lora_requests", None), dict
            ):
                return Running(frame.f_locals["self"])
            if frame.f_back is None:
                break
            frame = frame.f_back
        return None

    @property
    def max_rank(self) -> int | None:
        """--max-lora-rank."""
        return getattr(self._lora_config, "max_lora_rank", None)

    @property
    def dtype(self) -> Any | None:
        """The torch.dtype of vLLM's copies of adapters (--lora-dtype, or the model's)."""
        import torch

        dtype = getattr(self._lora_config, "lora_dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else None

    @property
    def restricted(self) -> list[str] | None:
        """--lora-target-modules: vLLM leaves an adapter's other modules out, without a word."""
        return getattr(self._lora_config, "target_modules", None)

    @property
    def can_forget(self) -> bool:
        """Whether all that :meth:`forget` and :attr:`under_way` need is there."""
        return isinstance(getattr(self._models, "lora_requests", None), dict) and self._states is not None

    def forget(self, names: Iterable[str]) -> None:
        """Let vLLM ask the resolver again for these names, as its own unload_lora_adapter does."""
        for name in names:
            self._models.lora_requests.pop(name, None)

    @property
    def under_way(self) -> set[str]:
        """The adapters' names of all requests that wait or run."""
        states = self._states
        return {name for state in list((states or {}).values()) if (name := getattr(state, "lora_name", None))}

    @property
    def _lora_config(self) -> Any:
        return getattr(getattr(getattr(self._models, "engine_client", None), "vllm_config", None), "lora_config", None)

    @property
    def _states(self) -> dict[str, Any] | None:
        processor = getattr(getattr(self._models, "engine_client", None), "output_processor", None)
        states = getattr(processor, "request_states", None)
        return states if isinstance(states, dict) else None
