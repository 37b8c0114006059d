"""The device that a benchmark's process works on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def device_name(model: torch.nn.Module) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cpu_name() -> str:
    """The processor's name and family where the system says them, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name, family = fields.get("model name"), fields.get("cpu family")
    return f"{name} (family {family})" if name and family else platform.machine()


def wait() -> None:
    """Until a GPU has done what it was given: for a clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def let_go() -> None:
    """Memory that torch holds and nothing uses: other processes of the GPU may need it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def quiet() -> None:
    """No progress bars of libraries, TF32 where there is a GPU."""
    from transformers.utils import logging

    from loralloy.console import console

    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    console.quiet = True
