"""Training that is meant to give the same adapter when it is run again on the same kind of GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
VALUES = (":4096:8", ":16:8")  # for deterministic matrix products; to be set before the process starts


@contextmanager
def repeatable(device: Any) -> Iterator[bool]:
    """torch's deterministic algorithms, where `device` is a GPU and the environment asks for them; whether it does.

    Without them the backward of attention adds up in any order: losses agree to about five digits. With them an adapter has been
    the same bit for bit in two trials of three (docs/training.md). An operation that has no
    deterministic form raises torch's RuntimeError, which names it. What was set before is set again afterwards.
    """
    import torch

    if device.type != "cuda" or os.environ.get(VARIABLE) not in VALUES:
        yield False
        return
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # with warn_only attention's backward would stay as it is
    memory.fill_uninitialized_memory = False  # nothing here reads memory that it has not written
    try:
        yield True
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        memory.fill_uninitialized_memory = fills
