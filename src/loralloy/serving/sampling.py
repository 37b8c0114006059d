"""The next token of every row of a batch, each by its own settings; and a row's text as its tokens come."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_HEAD = 1024  # candidates looked at first for top_p: sorting a whole vocabulary costs more than the rest of a step

_LEAST = -9999.0  # in the place of -inf, which JSON does not have; OpenAI's number


@dataclass(frozen=True)
class Sampling:
    """How one row goes on. temperature 0: greedy. logprobs: None for none, else how many alternatives to give."""

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Choice:
    """A token, the log-probability (nats) that the model gave it at temperature 1, and the likeliest alternatives."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: Tensor, settings: Sequence[Sampling], sources: Sequence[random.Random]) -> list[Choice | None]:
    """The next token of each row of logits [b, vocabulary]; None for a row whose logits are not numbers.

    A sampled row takes one number from its own source, so what it draws does not depend on its neighbours. `top_p` keeps
    the fewest likeliest tokens that reach it, the crossing one included (Holtzman et al. 2020).
    """
    logits = logits.float()
    tokens = logits.argmax(-1)
    sampled = [i for i, s in enumerate(settings) if s.temperature > 0]
    if sampled:
        at = torch.tensor(sampled, device=logits.device)
        tokens[at] = _draw(logits[at], [settings[i] for i in sampled], [sources[i].random() for i in sampled])
    sound = torch.isfinite(logits.amax(-1))
    result = [Choice(t) if ok else None for t, ok in zip(tokens.tolist(), sound.tolist(), strict=True)]
    wanted = [i for i, s in enumerate(settings) if s.logprobs is not None and result[i] is not None]
    if wanted:
        at = torch.tensor(wanted, device=logits.device)
        logp = logits[at].log_softmax(-1).clamp(min=_LEAST)
        own = logp.gather(1, tokens[at, None])[:, 0].tolist()
        best = logp.topk(min(max(max(settings[i].logprobs or 0 for i in wanted), 1), logp.shape[1]), -1)
        for i, mine, ids, values in zip(wanted, own, best.indices.tolist(), best.values.tolist(), strict=True):
            count = settings[i].logprobs or 0
            result[i] = Choice(int(tokens[i]), mine, tuple(zip(ids[:count], values[:count], strict=True)))
    return result


def _draw(logits: Tensor, settings: Sequence[Sampling], numbers: Sequence[float]) -> Tensor:
    """One token a row [b] by inverting its distribution function at the number given (each in [0, 1))."""
    heat = torch.tensor([s.temperature for s in settings], device=logits.device)[:, None]
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / heat).softmax(-1).double()
    drawn = _invert(probabilities, torch.tensor(numbers, dtype=torch.float64, device=logits.device))
    cut = [i for i, s in enumerate(settings) if s.top_p < 1]
    if not cut:
        return drawn
    at = torch.tensor(cut, device=logits.device)
    p = torch.tensor([settings[i].top_p for i in cut], dtype=torch.float64, device=logits.device)
    kept, ids = probabilities[at].topk(min(_HEAD, logits.shape[-1]), -1)
    if bool((kept.sum(-1) < p).any()):
        kept, ids = probabilities[at].sort(dim=-1, descending=True, stable=True)
    before = kept.cumsum(-1) - kept
    kept = kept.masked_fill(before >= p[:, None], 0.0)
    u = torch.tensor([numbers[i] for i in cut], dtype=torch.float64, device=logits.device)
    drawn[at] = ids.gather(1, _invert(kept, u)[:, None])[:, 0]
    return drawn


def _invert(masses: Tensor, u: Tensor) -> Tensor:
    """The first index of each row of masses [b, n] whose cumulated share exceeds u [b]; never one without mass."""
    sums = masses.cumsum(-1)
    found = torch.searchsorted(sums, (u * sums[:, -1])[:, None], right=True)[:, 0]
    last = (masses > 0).long().cumsum(-1).argmax(-1)  # u * total may round up to the total
    return torch.minimum(found, last)


class TextBuffer:
    """A row's text as its tokens come: whole characters only, and nothing that might be the beginning of a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._from, self._read = 0, 0  # tokens before `_read` are in the text; from `_from` on they give it context
        self._shown = 0
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that can be shown now because of this token; sets `stopped` when a stop string is complete."""
        self._ids.append(token)
        before = self._decode(self._ids[self._from : self._read])
        after = self._decode(self._ids[self._from :])
        if not after.endswith("\ufffd"):  # else a character of several tokens may be half there
            self._from, self._read = self._read, len(self._ids)
            self._append(after[len(before) :])
        return self._show(len(self.text) - self._held())

    def finish(self) -> str:
        """What was held back."""
        if not self.stopped:
            before = self._decode(self._ids[self._from : self._read])
            self._append(self._decode(self._ids[self._from :])[len(before) :])
            self._from = self._read = len(self._ids)
        return self._show(len(self.text))

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _append(self, piece: str) -> None:
        start = max(0, len(self.text) - max((len(s) for s in self._stop), default=0))
        self.text += piece
        found = [at for s in self._stop if (at := self.text.find(s, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        if self.stopped:
            return 0
        most = max((len(s) for s in self._stop), default=1) - 1
        tails = (n for n in range(min(most, len(self.text)), 0, -1))
        return next((n for n in tails if any(s.startswith(self.text[-n:]) for s in self._stop)), 0)

    def _show(self, end: int) -> str:
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece
