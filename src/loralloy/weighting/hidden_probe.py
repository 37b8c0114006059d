"""A probe with one hidden layer on stored vectors, for indexes with rows enough to teach it. Our design."""

from __future__ import annotations

import numpy as np

from .leave_one_out import Rows
from .linear_probe import Layer, whitening

DESIGNS = ((128, 0.3), (512, 0.3))  # hidden units and their dropout, the plainer first
INPUT_DROPOUT = 0.2
SMOOTHING = 0.05  # of the labels: less certain where it is wrong, at some cost in log-loss
EPOCHS = 15
BATCH = 1024  # at most; a fiftieth of the vectors, so that few rows still make several hundred steps
RATE = 4e-3  # the peak of one cycle
DECAY = 0.01


def train(rows: Rows, positions: np.ndarray, units: int, dropout: float, seed: int = 0) -> tuple[Layer, Layer]:
    """The layers ``[units, d]`` and ``[tasks, units]``, a ReLU between them, trained on the vectors at `positions`.

    AdamW under one cycle of the learning rate, on vectors whitened as for the linear probe (folded into the first layer);
    every task counts the same, however many rows it has. All that is random comes from `seed`.
    """
    import torch
    from torch.nn import functional

    rng, count = np.random.default_rng(seed), len(positions)
    centre, whiten = whitening(rows, positions)
    x = torch.from_numpy((rows.vectors[positions] - centre) @ whiten)
    own = torch.from_numpy(rows.labels[positions].astype(np.int64))
    share = torch.from_numpy((rows.shares(positions) * count).astype(np.float32))

    def start(*shape: int) -> torch.Tensor:
        drawn = rng.uniform(-1, 1, shape) / np.sqrt(shape[-1])
        return torch.from_numpy(drawn.astype(np.float32)).requires_grad_()

    def drop(values: torch.Tensor, rate: float) -> torch.Tensor:
        kept = rng.random(values.shape, dtype=np.float32) >= rate
        return values * torch.from_numpy(kept) / (1 - rate)

    w1, b1 = start(units, x.shape[1]), torch.zeros(units, requires_grad=True)
    w2, b2 = start(len(rows.tasks), units), torch.zeros(len(rows.tasks), requires_grad=True)
    batch = min(BATCH, max(32, count // 50))
    steps = EPOCHS * -(-count // batch)
    optimiser = torch.optim.AdamW([w1, b1, w2, b2], lr=RATE, weight_decay=DECAY)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    with torch.enable_grad():  # a server weighs its queries, and so may fit, where gradients are off
        for _ in range(EPOCHS):
            for part in torch.from_numpy(rng.permutation(count)).split(batch):
                hidden = torch.relu(functional.linear(drop(x[part], INPUT_DROPOUT), w1, b1))
                logits = functional.linear(drop(hidden, dropout), w2, b2)
                loss = functional.cross_entropy(logits, own[part], reduction="none", label_smoothing=SMOOTHING)
                optimiser.zero_grad(set_to_none=True)
                (loss * share[part]).mean().backward()
                optimiser.step()
                cycle.step()
    inner, bias, weight2, bias2 = (tensor.detach().numpy() for tensor in (w1, b1, w2, b2))
    weight = inner.astype(np.float64) @ whiten.T
    return (weight.astype(np.float32), (bias - weight @ centre).astype(np.float32)), (weight2, bias2)
