"""How strong a merge should be, found without labels: the level at which the model's answers tell the most about its inputs.

A merge that is too strong for its inputs need not say so: its answers can stay confident and become all alike. Over unlabelled
inputs x, with p(y | x) the model's probabilities of the k answers,

    information = H(mean_x p(y | x)) - mean_x H(p(y | x))        nats, 0 to log k

is high where each answer is sure and not all answers are the same one: the mutual information of input and answer as the model
has it (Bridle, Heading, MacKay, NIPS 1991; an objective of learning without labels in Krause et al., NIPS 2010, and Liang et
al., ICML 2020). To choose a merge's level by it is ours. It takes the classes to be about equally frequent among the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import LoralloyError
from ..weights import Weights
from .candidates import Candidates

if TYPE_CHECKING:
    from torch import nn

LEVELS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4)
Answers = Callable[[], Tensor]


@dataclass(frozen=True)
class Level:
    """What was chosen, and why.

    Attributes:
        level: the factor of all weights.
        weights: the given ones, times it.
        tried: (level, information in nats) of each that was tried, in order.
        most: the most that there can be: log k, or log of the number of inputs where they are fewer.
    """

    level: float
    weights: Weights
    tried: tuple[tuple[float, float], ...]
    most: float


def information(logp: Tensor) -> float:
    """H(mean p) - mean H(p), nats, of log-probabilities ``logp`` [inputs, answers]; nan where one is not a number.

    Raises LoralloyError for another shape, fewer than two inputs or answers.
    """
    if logp.ndim != 2 or min(logp.shape) < 2:
        raise LoralloyError(
            f"answers are of shape {list(logp.shape)}; give the log-probabilities of at least two answers to at least two inputs"
        )
    logp = logp.double()
    p = logp.exp()
    mean = p.mean(0)
    return float(_entropy(mean, mean.log()) - _entropy(p, logp).mean())


def _entropy(p: Tensor, logp: Tensor) -> Tensor:
    return -torch.where(p > 0, p * logp, p).sum(-1)  # p is 0 (or nan) where the second is taken


def choose_level(
    candidates: Candidates,
    weights: Weights,
    answers: Answers,
    levels: Sequence[float] = LEVELS,
    on_level: Callable[[], None] | None = None,
) -> Level:
    """The level at which the answers have the most information; of equals the smallest. Nothing is trained.

    Args:
        candidates: the bank in the model, under the rule, space and rank that the merge will have.
        weights: at level 1.
        answers: runs the model over the unlabelled inputs: log-probabilities [inputs, answers].
        levels: what is tried, positive.
        on_level: progress.

    Raises LoralloyError for no levels, one that is not a positive number, and answers that are numbers at none of them.
    """
    if not levels or not all(math.isfinite(level) and level > 0 for level in levels):
        raise LoralloyError(f"levels are {list(levels)}; give positive numbers, at least one")
    tried: list[tuple[float, float]] = []
    most = 0.0
    for level in sorted(levels):
        with candidates.at(scaled(weights, level)):
            logp = answers()
        tried.append((level, information(logp)))
        most = math.log(min(logp.shape))
        if on_level is not None:
            on_level()
    finite = [pair for pair in tried if math.isfinite(pair[1])]
    if not finite:
        raise LoralloyError(
            "the answers are not numbers at any level; load the model in float32, or check the adapters"
        )
    level = max(finite, key=lambda pair: pair[1])[0]
    return Level(level, scaled(weights, level), tuple(tried), most)


def scaled(weights: Weights, factor: float) -> Weights:
    """Every weight times a factor; where they come from stays."""
    made: dict[str, Any] = {
        name: {module: factor * w for module, w in of.items()} if isinstance(of, Mapping) else factor * of
        for name, of in weights.coefficients.items()
    }
    return replace(weights, coefficients=made, explain={**weights.explain, "level": factor})


def text_answers(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], options: Sequence[Sequence[str]], batch_size: int = 8
) -> Answers:
    """A causal language model's answers to prompts: the softmax of the options' log-likelihoods, as evaluation decides by them.

    options: of each prompt, as many for one as for another. Raises LoralloyError for other numbers of them, fewer than two
    prompts or options, a prompt that is longer than the model takes and, when it is run, as
    :func:`loralloy.live.scoring.score_options`.
    """
    from ..live.scoring import check_room, encode_answer, encode_prompt, score_options

    if len(options) != len(prompts) or len({len(some) for some in options}) > 1:
        raise LoralloyError(
            "give each prompt its options, as many for one as for another: their answers are compared by place"
        )
    if len(prompts) < 2 or len(options[0]) < 2:
        raise LoralloyError("answers are compared with each other: give at least two prompts and at least two options")
    known = {text: len(encode_answer(tokenizer, text)) for text in {text for row in options for text in row}}
    pairs = zip(prompts, options, strict=True)
    longest = max(len(encode_prompt(tokenizer, prompt)) + max(known[text] for text in row) for prompt, row in pairs)
    check_room(model, longest)  # now rather than after a probe

    def run() -> Tensor:
        scores = score_options(model, tokenizer, prompts, options, batch_size=batch_size)
        return torch.stack(scores).log_softmax(1)

    return run
