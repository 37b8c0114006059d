"""Rows of different compositions decoded together, step by step; rows join when there is room and leave when they are done.

No threads and no clock of its own: :meth:`Scheduler.step` does one step and returns (see :mod:`.engine` for the loop).
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import LoralloyError
from ..live.scoring import pad_id, pad_rows
from .cache import RowCache, check_cache
from .rows import Event, Row
from .sampling import Choice, TextBuffer, choose

if TYPE_CHECKING:
    from torch import Tensor

    from ..live.paged import PagedModel


class Scheduler:
    """Decodes rows in one batch over a live model.

    Args:
        model, tokenizer: the base and its tokenizer; `live` holds the bank in it.
        max_rows: rows decoded together.
        cache_tokens: room of the KV cache, rows times columns: a row waits until it fits with the most it may use.
        prefill_tokens: tokens (with padding) of the prompts that one step takes in, so that running rows are not kept
            waiting; a longer prompt is taken in alone.
        on_step: called after each pass with "prefill" or "decode", its rows and its seconds.

    Raises LoralloyError for a model that cannot be served (see :func:`.cache.check_cache`).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        live: PagedModel,
        max_rows: int = 32,
        cache_tokens: int = 65536,
        prefill_tokens: int = 4096,
        on_step: Callable[[str, int, float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_cache(model)
        self.model, self.tokenizer, self.live = model, tokenizer, live
        self.max_rows, self.cache_tokens, self.prefill_tokens = max_rows, cache_tokens, prefill_tokens
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self._rows: RowCache | None = None
        self._on_step, self._clock = on_step or (lambda *_: None), clock
        self._set: list[Row] = []  # whose weights the model has
        self.jobs: deque[Callable[[], None]] = deque()
        """Done in the next step, when the rows that were cancelled before have left."""
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        own = ends if isinstance(ends, list | tuple) else [ends]
        self.ends = {int(i) for i in (tokenizer.eos_token_id, *own) if i is not None}
        self.device = model.get_input_embeddings().weight.device
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])

    @property
    def room(self) -> int:
        """The most tokens of prompt and answer together."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return min(self.cache_tokens, positions or self.cache_tokens)

    @property
    def cache_bytes(self) -> int:
        rows = self._rows
        return 0 if rows is None else rows.nbytes

    def check(self, row: Row) -> None:
        """Raise LoralloyError for a row that could never run."""
        if not row.prompt:
            raise LoralloyError("the prompt is empty, so there is nothing to answer")
        if row.length > self.room:
            raise LoralloyError(
                f"prompt and answer have up to {len(row.prompt)} + {row.sampling.max_tokens} tokens, the server takes "
                f"{self.room}; shorten the prompt, or ask for fewer tokens"
            )
        if max(row.prompt) >= self.vocabulary:
            raise LoralloyError(f"token {max(row.prompt)} is not in the vocabulary of {self.vocabulary}")

    def submit(self, row: Row) -> None:
        """Let a row wait for its turn. Raises LoralloyError as :meth:`check` does."""
        self.check(row)
        row.text = TextBuffer(self.tokenizer, row.sampling.stop)
        if row.sampling.seed is not None:
            row.source = random.Random(row.sampling.seed)
        self.waiting.append(row)

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self.jobs)

    def step(self) -> None:
        """Let go of cancelled and late rows, take new ones in, and give every running row its next token."""
        jobs = [self.jobs.popleft() for _ in range(len(self.jobs))]
        self._sweep()
        for job in jobs:
            job()
        joined = self._admitted()
        if joined:
            self._prefill(joined)
        if self.running:
            self._decode()

    def fail(self, why: str) -> None:
        """End every row."""
        for row in [*self.running, *self.waiting]:
            row.tell(Event(error=why))
        self.waiting.clear()
        self._drop()

    def _drop(self) -> None:
        self.running, self._rows, self._set = [], None, []

    def _sweep(self) -> None:
        now = self._clock()
        for _ in range(len(self.waiting)):
            row = self.waiting.popleft()
            if not row.cancelled and now <= row.deadline:
                self.waiting.append(row)
            elif not row.cancelled:
                row.tell(Event(error="timeout"))
        kept = []
        for i, row in enumerate(self.running):
            if row.cancelled:
                continue
            if now > row.deadline:
                row.tell(Event(text=row.text.finish() if row.text else "", error="timeout"))
                continue
            kept.append(i)
        self._keep(kept)

    def _keep(self, kept: list[int]) -> None:
        if len(kept) == len(self.running):
            return
        if not kept:
            return self._drop()
        assert self._rows is not None
        self._rows.keep(kept)
        self.running = [self.running[i] for i in kept]

    def _admitted(self) -> list[Row]:
        """The rows that can join now, in their order: one that does not fit holds up those behind it."""
        joined: list[Row] = []
        columns = max((row.length for row in self.running), default=0)
        width = 0
        while self.waiting and len(self.running) + len(joined) < self.max_rows:
            row = self.waiting[0]
            columns, width = max(columns, row.length), max(width, len(row.prompt))
            if (len(self.running) + len(joined) + 1) * columns > self.cache_tokens:
                break
            if joined and (len(joined) + 1) * width > self.prefill_tokens:
                break
            joined.append(self.waiting.popleft())
        return joined

    def _prefill(self, rows: list[Row]) -> None:
        start = time.perf_counter()
        try:
            ids, mask = pad_rows([row.prompt for row in rows], pad_id(self.tokenizer), self.device, left=True)
            own = RowCache(mask)
            logits = self._forward(rows, own, ids, (mask.cumsum(1) - 1).clamp(min=0))
        except Exception as error:
            if len(rows) == 1:
                return rows[0].tell(Event(error=_said(error)))
            for row in rows:  # one row's adapter, or the memory that they need together
                self._prefill([row])
            return None
        self._on_step("prefill", len(rows), time.perf_counter() - start)
        kept = self._take(rows, logits)
        if not kept:
            return None
        if len(kept) < len(rows):
            own.keep(kept)
        try:
            if self._rows is None:
                self._rows = own
            else:
                self._rows.join(own)
        except Exception as error:  # out of memory, half way
            self.running += [rows[i] for i in kept]
            self._fail_running(error)
            return None
        self.running = [*self.running, *(rows[i] for i in kept)]
        return None

    def _decode(self) -> None:
        start, rows = time.perf_counter(), self.running
        assert self._rows is not None
        try:
            ids = torch.tensor([[row.last] for row in rows], device=self.device)
            at = torch.tensor([[len(row.prompt) + row.written - 1] for row in rows], device=self.device)
            self._rows.grow()
            logits = self._forward(rows, self._rows, ids, at)
            kept = self._take(rows, logits)
            self._keep(kept)
        except Exception as error:  # the batch is lost, not the server
            return self._fail_running(error)
        self._on_step("decode", len(rows), time.perf_counter() - start)
        return None

    def _fail_running(self, error: Exception) -> None:
        for row in self.running:
            row.tell(Event(error=_said(error)))
        self._drop()

    @torch.no_grad()
    def _forward(self, rows: Sequence[Row], cache: RowCache, ids: Tensor, positions: Tensor) -> Tensor:
        """The rows' last logits [b, vocabulary], each under its own composition."""
        if len(rows) != len(self._set) or any(a is not b for a, b in zip(rows, self._set, strict=True)):
            self._set = []
            self.live.set([row.weights for row in rows], beside=[row.weights for row in self.running])
            self._set = list(rows)
        output = self.model(
            input_ids=ids,
            attention_mask=cache.mask,
            position_ids=positions,
            past_key_values=cache.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _take(self, rows: list[Row], logits: Tensor) -> list[int]:
        """Give each row its next token; the positions of those that go on."""
        choices = choose(logits, [row.sampling for row in rows], [row.source for row in rows])
        return [i for i, (row, choice) in enumerate(zip(rows, choices, strict=True)) if self._next(row, choice)]

    def _next(self, row: Row, choice: Choice | None) -> bool:
        assert row.text is not None
        if choice is None:
            row.tell(Event(error="the model's scores are not numbers; load it in float32, or check the adapters"))
            return False
        if choice.token in self.ends:
            row.tell(Event(row.text.finish(), finish="stop"))
            return False
        row.last, row.written = choice.token, row.written + 1
        piece = row.text.push(choice.token)
        if row.text.stopped:
            row.tell(Event(piece, choice, "stop"))
        elif row.written >= row.sampling.max_tokens:
            row.tell(Event(piece + row.text.finish(), choice, "stop" if row.text.stopped else "length"))
        else:
            row.tell(Event(piece, choice))
            return True
        return False


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
