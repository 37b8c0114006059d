"""The steps of a training on images, whatever their loss: the order of the rows, the views, the rate, and the log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..console import console, progress
from ..errors import LoralloyError
from ..memory import reused
from .data import mix
from .image_config import ImageTrainConfig
from .loop import LOG_EVERY

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def image_steps(
    model: Any,
    trainable: Sequence[Tensor],
    config: ImageTrainConfig,
    seed: int,
    title: str,
    loss: Callable[[int], Tensor],
    device: torch.device,
    note: str = "",
) -> tuple[list[dict[str, Any]], float]:
    """Train in place: AdamW on what `loss` gives for a step's number. The log and the seconds of the steps.

    note: said after the title at the end. Raises LoralloyError where a loss is not finite.
    """
    import torch

    optimizer = torch.optim.AdamW(
        trainable, lr=config.lr, weight_decay=config.weight_decay, fused=device.type in ("cpu", "cuda")
    )
    losses = torch.zeros(config.steps, device=device)
    devices = [device] if device.type == "cuda" else []
    model.train(config.dropout > 0)  # the backbone has no other dropout that training wants
    began = time.perf_counter()
    with torch.random.fork_rng(devices=devices), reused(device), progress() as bar:
        torch.manual_seed(mix(seed, 2))
        task = bar.add_task(title, total=config.steps)
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * rate_at(step, config.steps)
            found = loss(step)
            found.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[step] = found.detach()
            if (step + 1) % LOG_EVERY == 0 or step + 1 == config.steps:
                bar.update(task, completed=step + 1)
    values = losses.tolist()  # the one wait for the device
    seconds = time.perf_counter() - began
    model.eval()
    if bad := [n for n, value in enumerate(values, 1) if not math.isfinite(value)]:
        raise LoralloyError(f"{title}: the loss is {values[bad[0] - 1]} at step {bad[0]}; lower lr")
    console.print(f"{title}{note}: {config.steps} steps in {seconds:.1f} s, loss {values[-1]:.3f}", soft_wrap=True)
    rates = [config.lr * rate_at(step, config.steps) for step in range(config.steps)]
    log = [{"step": n, "loss": v, "lr": r} for n, (v, r) in enumerate(zip(values, rates, strict=True), 1)]
    return log, seconds


def step_rows(n: int, config: ImageTrainConfig, seed: int) -> Tensor:
    """[steps, batch] row numbers: one shuffled epoch after another, cut into batches."""
    import torch

    wanted = config.steps * config.batch_size
    generator = torch.Generator().manual_seed(mix(seed, 3))
    epochs = [torch.randperm(n, generator=generator) for _ in range(math.ceil(wanted / n))]
    return torch.cat(epochs)[:wanted].reshape(config.steps, config.batch_size)


def step_views(config: ImageTrainConfig, seed: int, device: torch.device) -> Tensor | None:
    """[steps, batch, 2, 3] affine maps, one an image that is shown; None where images are not augmented."""
    from ..live.vision import affines

    if not config.augment:
        return None
    drawn = affines(config.steps * config.batch_size, mix(seed, 1))
    return drawn.reshape(config.steps, config.batch_size, 2, 3).to(device)


def rate_at(step: int, steps: int) -> float:
    """A linear rise over 5 % of the steps, then a cosine down to 0."""
    warm = max(1, round(0.05 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
