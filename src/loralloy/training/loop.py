"""The training loop: peft's adapter, accelerate's device, clipping, trackers; transformers' schedule. Resumes exactly.

Not the HF Trainer, whose checkpoints are pickles.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..console import console
from ..errors import LoralloyError
from ..memory import reused
from . import checkpoint
from .config import TrainConfig
from .data import IGNORED, Encoded, collate, epoch_batches, mix
from .repeatable import repeatable

LOG_EVERY = 10  # steps between looks at the GPU: reading a loss waits for it
LOG_NAME = "training_log.jsonl"


def total_steps(rows: int, config: TrainConfig) -> int:
    """Optimizer steps of a run; a fractional epoch counts its share of steps, at least one."""
    per_epoch = math.ceil(math.ceil(rows / config.batch_size) / config.grad_accumulation)
    return max(1, round(per_epoch * config.epochs))


def _micro_batches(
    lengths: list[int], config: TrainConfig, start: int, total: int
) -> Iterator[tuple[int, list[list[int]]]]:
    """(step, its batches of indices) for steps start .. total - 1."""
    step, epoch = 0, 0
    while step < total:
        batches = epoch_batches(lengths, config.batch_size, config.seed, epoch)
        for at in range(0, len(batches), config.grad_accumulation):
            if start <= step < total:
                yield step, batches[at : at + config.grad_accumulation]
            step += 1
        epoch += 1


class _Log:
    """training_log.jsonl in the checkpoint folder; lines after a resumed step are dropped: they are made again."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if start and path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        path.write_text("".join(kept), encoding="utf-8")
        last = json.loads(kept[-1]) if kept else {}
        self.tokens, self.seconds = int(last.get("tokens", 0)), float(last.get("seconds", 0.0))

    def write(self, entries: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)


class _Display:
    """A live bar with loss, rate and speed on a terminal; plain lines elsewhere."""

    def __init__(self, title: str, start: int, total: int) -> None:
        self.title, self.total, self.bar, self.printed = title, total, None, start
        if console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  lr {task.fields[lr]}  {task.fields[rate]} examples/s"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task(title, total=total, completed=start, loss="-", lr="-", rate="-")

    def __enter__(self) -> _Display:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step)

    def report(self, step: int, loss: float, lr: float, rate: float) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step, loss=f"{loss:.4f}", lr=f"{lr:.1e}", rate=f"{rate:.1f}")
        elif step == self.total or step - self.printed >= max(LOG_EVERY, self.total // 20):
            self.printed = step
            console.print(
                f"{self.title} step {step}/{self.total} loss {loss:.4f} lr {lr:.1e} {rate:.1f} examples/s",
                soft_wrap=True,
            )


@contextmanager
def _accelerator(device: Any, tracker: str, runs: Path, settings: dict[str, Any]) -> Iterator[Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",  # the base has its dtype already, the factors are float32
        log_with=None if tracker == "none" else tracker,
        project_dir=str(runs) if tracker == "tensorboard" else None,
    )
    if tracker != "none":
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
        accelerator.init_trackers("loralloy", config=plain)
    try:
        yield accelerator
    finally:
        if tracker != "none":
            accelerator.end_training()
        accelerator.free_memory()


def _checkpointing(model: Any, on: bool) -> None:
    """Gradient checkpointing by the names that every supported transformers has (5.23 warns that they will change)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()


def fit(
    model: Any,
    encoded: list[Encoded],
    config: TrainConfig,
    *,
    folder: Path,
    identity: dict[str, Any],
    pad: int,
    title: str = "train",
    save_every: int = 100,
    resume: bool = True,
    tracker: str = "none",
    runs: Path = Path("runs"),
) -> list[dict[str, Any]]:
    """Train the adapter on `model` (a PeftModel, in place) and return the log, one entry a step.

    Checkpoints go to `folder` every `save_every` steps; a run that finds one of its own `identity` goes on from it and
    makes the same losses as one that was never stopped. Loss is the mean over all of a step's tokens, in nats.
    Raises LoralloyError when a checkpoint belongs to another run or the loss is not finite.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import (
        get_constant_schedule_with_warmup,
        get_cosine_schedule_with_warmup,
        get_linear_schedule_with_warmup,
    )

    if not resume:
        checkpoint.remove(folder)
    state = checkpoint.load(folder, identity) if folder.is_dir() else None
    start, total = (int(state["step"]) if state else 0), total_steps(len(encoded), config)
    device = model.get_input_embeddings().weight.device
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=config.lr, weight_decay=config.weight_decay, fused=device.type in ("cpu", "cuda")
    )
    warmup = config.warmup_steps(total)
    if config.schedule == "cosine":
        scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    elif config.schedule == "linear":
        scheduler = get_linear_schedule_with_warmup(optimizer, warmup, total)
    else:
        scheduler = get_constant_schedule_with_warmup(optimizer, warmup)
    rate_at = scheduler.lr_lambdas[0]  # a function of the step, so a resumed run needs no scheduler state
    if state:
        checkpoint.restore(state, model, optimizer)
        console.print(f"{title}: going on from step {start} of {total} ({folder})", soft_wrap=True)
    log = _Log(folder / LOG_NAME, start)
    if config.gradient_checkpointing:
        _checkpointing(model, True)
    lengths = [len(row.ids) for row in encoded]
    per_epoch = total_steps(len(encoded), TrainConfig.of(config, {"epochs": 1}))
    pending: list[tuple[dict[str, Any], Any]] = []  # entries whose loss is still on the device
    began, examples, tokens, before = time.perf_counter(), 0, log.tokens, log.seconds
    devices = [device] if device.type == "cuda" else []
    model.train()
    with (
        _accelerator(device, tracker, runs, config.to_dict()) as accelerator,
        torch.random.fork_rng(devices=devices),
        repeatable(device),
        reused(device),
        _Display(title, start, total) as display,
    ):
        ready, optimizer = accelerator.prepare(model, optimizer)
        for step, batches in _micro_batches(lengths, config, start, total):
            parts = [collate([encoded[i] for i in batch], pad, config.loss, device) for batch in batches]
            count = sum(n for _, _, n in parts)
            rate = config.lr * rate_at(step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(mix(config.seed, step))  # dropout of a step does not depend on the steps before it
            loss_sum: Any = 0.0
            for inputs, labels, _ in parts:
                logits = ready(**inputs, use_cache=False).logits[:, :-1].float()
                # the sum over the step's tokens, so that accumulation weighs tokens as one large batch would
                loss = cross_entropy(
                    logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum", ignore_index=IGNORED
                )
                loss = loss / count
                accelerator.backward(loss)
                loss_sum = loss_sum + loss.detach()
            accelerator.clip_grad_norm_(trainable, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            examples += sum(map(len, batches))
            tokens += sum(lengths[i] for batch in batches for i in batch)
            entry = {"step": done, "epoch": round(done / per_epoch, 4), "loss": None, "lr": rate, "tokens": tokens}
            pending.append((entry, loss_sum))
            display.step(done)
            saving = done % save_every == 0 or done == total  # the last: a kill while evaluating costs no training
            if done % LOG_EVERY == 0 or done == total or saving:
                elapsed = time.perf_counter() - began
                _flush(log, pending, before + elapsed, accelerator if tracker != "none" else None)
                display.report(done, pending[-1][0]["loss"], rate, examples / elapsed)
                pending.clear()
            if saving:
                checkpoint.save(folder, done, identity, model, optimizer.optimizer, {"epoch": entry["epoch"]})
    if config.gradient_checkpointing:
        _checkpointing(model, False)
    model.eval()
    return [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]


def _flush(log: _Log, pending: list[tuple[dict[str, Any], Any]], seconds: float, accelerator: Any) -> None:
    """Fetch the waiting losses in one transfer, check and write them."""
    import torch

    for (entry, _), value in zip(pending, torch.stack([loss for _, loss in pending]).tolist(), strict=True):
        entry["loss"], entry["seconds"] = value, round(seconds, 3)
        if not math.isfinite(value):
            raise LoralloyError(f"the loss is {value} at step {entry['step']}; lower --lr, or use --dtype float32")
    log.write([entry for entry, _ in pending])
    if accelerator:
        for entry, _ in pending:
            accelerator.log({k: entry[k] for k in ("loss", "lr", "epoch", "tokens")}, step=entry["step"])
