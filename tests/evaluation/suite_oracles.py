"""What tests of methods measure with: one example scored alone, and scores compared."""

from __future__ import annotations

import torch

from loralloy.evaluation.suite.method import find_kind
from loralloy.live.scoring import score_options

CLOSE = 2e-4  # of log-likelihoods in nats, float32, batched against alone


def make(kind, **fields):
    return find_kind(kind).model_validate({"name": kind} | fields)


def alone(bench, example, weights):
    """One example's option scores, by itself, under `weights` in a LiveModel."""
    with bench.live.compose(weights):
        return score_options(bench.model, bench.tokenizer, [example.prompt], [example.options])[0]


def same_scores(rows, want):
    for row, scores in zip(rows, want, strict=True):
        assert torch.allclose(torch.tensor(row.scores), torch.as_tensor(scores), atol=CLOSE), (row.scores, scores)
