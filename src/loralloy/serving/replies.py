"""Answers in the shapes of OpenAI's API, whole or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import LoralloyError
from .engine import Stopping
from .guard import error_body
from .rows import Event
from .sampling import Choice
from .schemas import ChatRequest, CompletionRequest, Usage
from .service import Job, Service

MAX_ECHO = 1024  # characters of `model` in an event, but for a choice's first


class TooLate(LoralloyError):
    """A row did not end in time."""


class Failed(LoralloyError):
    """A row could not be decoded."""


@dataclass
class _Gathered:
    """One choice as it comes in."""

    text: str = ""
    choices: list[Choice] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish: str | None = None


class Reply:
    """One request's answer."""

    def __init__(self, service: Service, request: CompletionRequest | ChatRequest, job: Job) -> None:
        self.service, self.request, self.job = service, request, job
        self.chat = isinstance(request, ChatRequest)
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex
        self.made = int(time.time())
        self.tokens = 0
        self._offsets: dict[int, int] = {}

    async def whole(self) -> dict[str, Any]:
        """The answer at once. Raises TooLate and Failed."""
        got = [_Gathered() for _ in self.job.stream.rows]
        async for number, event in self._events():
            if event.error:
                raise self._wrong(event.error)
            mine = got[number]
            if event.choice:
                mine.choices.append(event.choice)
                mine.offsets.append(len(mine.text))
            mine.text, mine.finish = mine.text + event.text, event.finish or mine.finish
        choices = []
        for i, g in enumerate(got):
            said: dict[str, Any] = (
                {"message": {"role": "assistant", "content": g.text}} if self.chat else {"text": g.text}
            )
            choices.append(self._choice(i, said, g.choices, g.offsets, g.finish) | self._own(i))
        return self._frame(choices, "chat.completion" if self.chat else "text_completion") | {
            "usage": self._usage(),
            "loralloy": self.job.composed[0].model_dump(exclude_none=True),
        }

    def _wrong(self, why: str) -> LoralloyError:
        if why == "timeout":
            return TooLate("the answer took too long")
        return Failed(why) if self.service.engine.alive else Stopping(why)

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events; an error within ends it."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        begun: set[int] = set()
        options = self.request.stream_options
        counted = {"usage": None} if options and options.include_usage else {}
        async for number, event in self._events():
            if event.error:
                late = event.error == "timeout"
                why = "the answer took too long" if late else event.error
                yield _sse(error_body(why, "timeout_error" if late else "server_error"))
                return
            first = number not in begun
            begun.add(number)
            if not (event.text or event.finish or first or self._wants_logprobs):
                continue
            at = self._offsets.get(number, 0)
            self._offsets[number] = at + len(event.text)
            delta: dict[str, Any] = {"content": event.text}
            if first:
                delta = {"role": "assistant", **delta}
            said = {"delta": delta} if self.chat else {"text": event.text}
            choice = self._choice(number, said, [event.choice] if event.choice else [], [at], event.finish)
            frame = self._frame([choice], kind, first) | counted
            if first:
                frame["loralloy"] = self.job.composed[number // self.job.n].model_dump(exclude_none=True)
            yield _sse(frame)
        if counted:
            yield _sse(self._frame([], kind, False) | {"usage": self._usage()})
        yield "data: [DONE]\n\n"

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        metrics, first = self.service.metrics, True
        async for number, event in self.job.stream:
            if event.choice:
                self.tokens += 1
                metrics.tokens.inc()
                if first:
                    metrics.first.observe(time.perf_counter() - self.job.start)
                    first = False
            if event.last:
                metrics.rows.labels(event.finish or ("timeout" if event.error == "timeout" else "error")).inc()
            yield number, event

    @property
    def _wants_logprobs(self) -> bool:
        return bool(self.request.logprobs) if self.chat else self.request.logprobs is not None

    def _own(self, i: int) -> dict[str, Any]:
        """With several prompts, each choice tells its own composition."""
        composed = self.job.composed
        return {"loralloy": composed[i // self.job.n].model_dump(exclude_none=True)} if len(composed) > 1 else {}

    def _frame(self, choices: list[dict[str, Any]], kind: str, first: bool = True) -> dict[str, Any]:
        model = self.request.model
        if not first and len(model) > MAX_ECHO:  # once a choice, and not with every token
            model = model[: MAX_ECHO - 3] + "..."
        return {"id": self.id, "object": kind, "created": self.made, "model": model, "choices": choices}

    def _choice(
        self, i: int, said: dict[str, Any], tokens: list[Choice], offsets: list[int], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._wants_logprobs:
            logprobs = self._chat_logprobs(tokens) if self.chat else self._logprobs(tokens, offsets)
        return {"index": i, **said, "logprobs": logprobs, "finish_reason": finish}

    def _token(self, token: int) -> str:
        return str(self.service.tokenizer.decode([token]))

    def _chat_logprobs(self, tokens: list[Choice]) -> dict[str, Any]:
        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            text = self._token(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [entry(c.token, c.logprob) | {"top_logprobs": [entry(*t) for t in c.top]} for c in tokens]
        return {"content": content, "refusal": None}

    def _logprobs(self, tokens: list[Choice], offsets: list[int]) -> dict[str, Any]:
        return {
            "tokens": [self._token(c.token) for c in tokens],
            "token_logprobs": [c.logprob for c in tokens],
            "top_logprobs": [
                # tokens may share a text (halves of characters): the likeliest has the place
                {self._token(t): value for t, value in reversed(c.top)}
                for c in tokens
            ],
            "text_offset": offsets[: len(tokens)],
        }

    def _usage(self) -> dict[str, int]:
        prompts = sum(map(len, self.job.prompts))
        total = prompts + self.tokens
        return Usage(prompt_tokens=prompts, completion_tokens=self.tokens, total_tokens=total).model_dump()


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
