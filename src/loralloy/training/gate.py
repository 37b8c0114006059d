"""Training a router over frozen adapters: the answers' loss on mixed rows of all tasks, the best of a few validations kept."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..console import progress as progress_bar
from ..errors import LoralloyError
from .data import IGNORED, Encoded, collate, encode_examples, epoch_batches

if TYPE_CHECKING:
    from torch import Tensor

    from ..live import LiveModel
    from ..live.gates import LinearRouter
    from ..tasks.task import Example


@dataclass(frozen=True)
class RouterConfig:
    """How a router is trained.

    kind, top_k: of :class:`~loralloy.live.gates.LinearRouter`; a top_k is trained with (for top_k = 1 the gradient goes
    straight through). steps of batch_size rows; AdamW at `lr`, a linear warm-up of `warmup` steps, then a cosine to 0.
    max_length: tokens of prompt + answer. check_every: steps between validations; the parameters with the least validation
    loss are kept.
    Raises LoralloyError naming the field that is out of range.
    """

    kind: str = "token"
    top_k: int | None = None
    steps: int = 300
    batch_size: int = 32
    lr: float = 3e-3
    warmup: int = 20
    max_length: int = 512
    max_grad_norm: float = 1.0
    check_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup", 0), ("max_length", 8), ("check_every", 1)):
            if getattr(self, name) < least:
                raise LoralloyError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("lr", "max_grad_norm"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise LoralloyError(f"{name} is {getattr(self, name)}; it must be above 0")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


def train_router(
    live: LiveModel,
    tokenizer: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    hints: Mapping[str, str],
    config: RouterConfig | None = None,
    *,
    title: str = "router",
    progress: bool = True,
) -> LinearRouter:
    """A router trained on the rows of all tasks, the base and the adapters frozen.

    A row's loss is the mean negative log-likelihood of its answer's tokens (and the end of text), nats; a batch's is the mean
    over its rows, so that long answers weigh no more than short ones. Rows are right padded; a router over rows ("smear") reads
    the prompt alone. The order of rows is a function of the seed, and nothing else is random.

    A router has seen rows of every task it is given: with a task's adapter withheld later, it is still one that was trained
    with that task, which training-free routing is not.

    Args:
        live: the model with the bank's adapters.
        train: training rows of all tasks, in any order.
        validation: rows that choose among the checks, never test rows.
        hints: task -> its hint, which is kept where a long prompt is cut.
        config: see :class:`RouterConfig`.
        title: of the progress bar; progress: show one.

    Returns the router in eval mode; its `config` holds the settings, the step kept and every validation loss.
    Raises LoralloyError without rows, or when the loss is not a number.
    """
    import torch

    from ..live.gates import LinearRouter

    config = config or RouterConfig()
    rows, checks = (_encode(tokenizer, part, hints, config.max_length) for part in (train, validation))
    router = LinearRouter.of(live, config.kind, config.top_k)
    optimizer = torch.optim.AdamW(router.parameters(), lr=config.lr, weight_decay=0.0)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    log: list[dict[str, float]] = []
    best, kept, began = math.inf, {}, time.perf_counter()
    losses: list[Tensor] = []
    with _frozen(live.model), progress_bar() as bar:
        shown = bar.add_task(title, total=config.steps, visible=progress)
        for step, batch in enumerate([None, *_batches(rows, config)]):
            if batch is not None:
                router.train()
                for group in optimizer.param_groups:
                    group["lr"] = config.rate(step - 1)
                loss = _loss(live, router, [rows[i] for i in batch], pad).mean()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(router.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
                bar.update(shown, completed=step)
            if step % config.check_every == 0 or step == config.steps:
                found = _validate(live, router, checks, config.batch_size, pad)
                mean = float(torch.stack(losses).mean()) if losses else math.nan
                if not math.isfinite(found) or (losses and not math.isfinite(mean)):
                    raise LoralloyError(f"the router's loss is not a number at step {step}; lower lr, or use float32")
                log.append({"step": step, "validation": found} | ({"train": mean} if losses else {}))
                losses.clear()
                if found < best:
                    best, kept = found, {k: v.detach().clone() for k, v in router.state_dict().items()}
    router.load_state_dict(kept)
    step_kept = min(log, key=lambda entry: entry["validation"])["step"]
    router.config = dataclasses.asdict(config) | {
        "rows": len(rows), "validation_rows": len(checks), "step_kept": step_kept, "log": log,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    return router.eval()


def _encode(tokenizer: Any, examples: Sequence[Example], hints: Mapping[str, str], max_length: int) -> list[Encoded]:
    if not examples:
        raise LoralloyError("a router needs training rows, and validation rows to choose by; give at least one of each")
    by_task: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_task[example.task].append(example)
    return [
        row
        for task, own in by_task.items()
        for row in encode_examples(tokenizer, own, hints.get(task, ""), max_length)[0]
    ]


def _batches(rows: Sequence[Encoded], config: RouterConfig) -> Iterator[list[int]]:
    """`steps` batches of indices, mixed over the tasks."""
    lengths = [len(row.ids) for row in rows]
    step, epoch = 0, 0
    while True:
        for batch in epoch_batches(lengths, config.batch_size, config.seed, epoch):
            if step == config.steps:
                return
            yield batch
            step += 1
        epoch += 1


def _loss(live: LiveModel, router: LinearRouter, rows: Sequence[Encoded], pad: int) -> Tensor:
    """The loss of each row [b], nats a token."""
    import torch
    from torch.nn.functional import cross_entropy

    inputs, labels, _ = collate(rows, pad, "answer", live.device)
    width = inputs["input_ids"].shape[1]
    prompts = torch.tensor([len(row.ids) - row.answer for row in rows], device=live.device)
    pooled = torch.arange(width, device=live.device)[None] < prompts[:, None]
    with live.gate(router, pooled=pooled) as model:
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    kept = labels != IGNORED
    # only where there is a label: the rest of a [rows, kept, vocabulary] float32 copy would be most of the memory
    by_token = cross_entropy(logits[kept].float(), labels[kept], reduction="none")
    total = by_token.new_zeros(len(rows)).index_add(0, kept.nonzero()[:, 0], by_token)
    return total / kept.sum(1)


def _validate(live: LiveModel, router: LinearRouter, rows: Sequence[Encoded], batch_size: int, pad: int) -> float:
    """The mean loss of a row."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    router.eval()
    with torch.no_grad():
        parts = [
            _loss(live, router, [rows[i] for i in order[start : start + batch_size]], pad)
            for start in range(0, len(order), batch_size)
        ]
    return float(torch.cat(parts).mean())


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No gradients for the base's parameters and no dropout; both are put back afterwards."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in wanted:
            parameter.requires_grad_(True)
