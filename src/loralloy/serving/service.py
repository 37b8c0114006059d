"""From a request to rows of the decoder: composition, prompt, sampling; and what the answer says of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..answer import scaffold
from ..errors import LoralloyError
from ..live.scoring import encode_prompt
from ..merging import RULES
from ..weights import Weights
from .compositions import Compositions, Ready
from .engine import Engine, Stream
from .layers import LayerNorms
from .metrics import Metrics
from .routing import Routing
from .sampling import Sampling
from .schemas import ChatRequest, CompletionRequest, Composed, Neighbour, Route, ServerReport

if TYPE_CHECKING:
    from ..bank import Bank

MAX_REPEATED = 1 << 22  # characters: a request's composition, times its answers


@dataclass
class Limits:
    """What one request may ask for, and what the server holds at a time."""

    max_tokens: int = 1024
    max_open: int = 512
    max_body: int = 2 << 20
    max_depth: int = 32
    seconds: float = 300.0
    stopping_seconds: float = 20.0


@dataclass
class Job:
    """A request under way: its rows, `n` a prompt, and each prompt's composition."""

    stream: Stream
    composed: list[Composed]
    prompts: list[list[int]]
    n: int
    start: float = field(default_factory=time.perf_counter)


class Service:
    """All that answers requests; see :func:`loralloy.serving.app.create_app`.

    Args:
        engine: the decoder, not started.
        compositions: of the bank.
        routing: for `auto`; None without an index.
    """

    def __init__(
        self,
        engine: Engine,
        compositions: Compositions,
        routing: Routing | None,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.engine, self.compositions, self.routing = engine, compositions, routing
        self.limits, self.metrics = limits or Limits(), metrics or Metrics()
        self.metrics.watch(engine, compositions)
        self.tokenizer = engine.scheduler.tokenizer
        self.layers = LayerNorms(compositions, self.limits.seconds)
        self.born = int(time.time())

    @property
    def bank(self) -> Bank:
        return self.compositions.bank

    def close(self) -> None:
        """Let the rows end, as long as `stopping_seconds` allow, and stop."""
        self.engine.stop(self.limits.stopping_seconds)
        self.compositions.close()
        self.layers.close()
        if self.routing:
            self.routing.close()

    def report(self) -> ServerReport:
        """What clients can ask for."""
        tasks = list(self.routing.weigher.index.tasks) if self.routing else []
        return ServerReport(
            version=__version__,
            base=self.bank.base.name,
            adapters=len(self.bank),
            auto=self.routing is not None,
            templates=["auto", "none", *tasks] if self.routing else ["none"],
            chat=bool(getattr(self.tokenizer, "chat_template", None)),
            rules=list(RULES),
            max_tokens=self.limits.max_tokens,
        )

    # -- routing -------------------------------------------------------------------------------------------------------

    async def route(self, texts: Sequence[str]) -> list[Weights]:
        """Weights for each text. Raises LoralloyError without an index."""
        if self.routing is None:
            raise LoralloyError("this server has no index to route with (`loralloy serve --index`); name adapters")
        return await self.routing.weigh(texts)

    @staticmethod
    def said(weights: Weights, neighbours: int) -> Route:
        """Routed weights as they are told."""
        explain = weights.explain
        near = [Neighbour(**n) for n in explain.get("neighbours", [])[:neighbours]]
        shown = explain.get("routed") or dict(weights.items())
        return Route(weights=shown, fallback="fallback" in explain, unlike=explain.get("unlike"), neighbours=near)

    @staticmethod
    def described(ready: Ready, route: Route | None = None, template: str | None = None) -> Composed:
        c = ready.composition
        return Composed(
            composition=str(c),
            weights={name: ready.given.of(name) for name, _ in c.terms},
            by_module={name: weight.spec for name, weight in c.by_module.items()} or None,
            rule=str(c.bound),
            space=ready.space,
            rank=ready.rank,
            cache=ready.cache,
            error=ready.error,
            key=ready.key,
            route=route,
            template=template,
        )

    # -- rows ----------------------------------------------------------------------------------------------------------

    async def begin(self, request: CompletionRequest | ChatRequest, stack: AsyncExitStack) -> Job:
        """Compose, and queue the rows; `stack` lets go of the composition and of rows that are not done.

        Raises what the grammar, the bank, the merge and the queue raise, and LoralloyError for a prompt that cannot run.
        """
        start, n = time.perf_counter(), request.n or 1
        texts = [request.question] if isinstance(request, ChatRequest) else self._texts(request)
        self.engine.check(n * len(texts))  # before any work is done
        if len(request.model) * n * len(texts) > MAX_REPEATED:
            raise LoralloyError(
                f"a composition of {len(request.model)} characters is said with each answer, so one request has at most "
                f"{MAX_REPEATED // len(request.model)} of them; send fewer prompts, or a smaller n"
            )
        composition = await self.compositions.asked(request.model)
        routed: list[Weights | None] = [None] * len(texts)
        if composition.auto:
            routed = list(await self.route(texts))
        # one for all prompts, unless each has its own
        own = routed if composition.auto else routed[:1]
        readies = [await stack.enter_async_context(self.compositions.use(composition, w)) for w in own]
        readies *= len(texts) // len(own)
        prompts: list[list[int]] = []
        composed: list[Composed] = []
        for i, (ready, weights) in enumerate(zip(readies, routed, strict=True)):
            text, template = self._prompt(request, i, ready, texts[i])
            ids = text if isinstance(text, list) else await asyncio.to_thread(encode_prompt, self.tokenizer, text)
            route = self.said(weights, request.loralloy.neighbours) if weights else None
            prompts.append(ids)
            same = i and ready is readies[i - 1] and template == composed[-1].template
            composed.append(composed[-1] if same else self.described(ready, route, template))
            self.metrics.compositions.labels(ready.cache).inc()
        sampling = [self._sampling(request, ids, k) for ids in prompts for k in range(n)]
        each = [(ids, ready.weights) for ids, ready in zip(prompts, readies, strict=True) for _ in range(n)]
        stream = self.engine.stream([ids for ids, _ in each], [w for _, w in each], sampling)
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return Job(stack.enter_context(stream), composed, prompts, n, start)

    def _texts(self, request: CompletionRequest) -> list[str]:
        size = self.engine.scheduler.vocabulary
        if any(i >= size for p in request.prompt if isinstance(p, list) for i in p):
            raise LoralloyError(f"the prompt has token ids beyond the vocabulary of {size}")
        return [p if isinstance(p, str) else str(self.tokenizer.decode(p)) for p in request.prompt]

    def _prompt(
        self, request: CompletionRequest | ChatRequest, i: int, ready: Ready, text: str
    ) -> tuple[str | list[int], str | None]:
        """What the model reads, and the name of the form it was put in."""
        wanted = request.loralloy.template
        if wanted is None and isinstance(request, ChatRequest):
            return self._chat(request)
        if wanted in (None, "none"):
            return (text if isinstance(request, ChatRequest) else request.prompt[i]), None
        if self.routing is None:
            raise LoralloyError(
                f"template {wanted!r} is looked up in an index, which this server does not have; leave it out"
            )
        tasks = self.routing.weigher.index.tasks
        terms = [name for name, _ in ready.composition.terms]
        name = max(terms, key=ready.given.of, default=None) if wanted == "auto" else wanted
        if name not in tasks:
            if wanted == "auto":
                return text, None
            raise LoralloyError(
                f"template {wanted!r} is not a task of the index; it has auto, none, {', '.join(tasks)}"
            )
        return scaffold(tasks[name], text), name

    def _chat(self, request: ChatRequest) -> tuple[str, str]:
        """The messages in the tokenizer's chat form; without one, one text after the other."""
        if not getattr(self.tokenizer, "chat_template", None):
            return "\n".join(m.text for m in request.messages), "plain"
        from jinja2 import TemplateError

        said = [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in request.messages]
        try:
            text = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise LoralloyError(f"the messages do not fit the model's chat form: {error}") from None
        return str(text), "chat"

    def _sampling(self, request: CompletionRequest | ChatRequest, prompt: list[int], choice: int) -> Sampling:
        asked, most = request.max_tokens, self.limits.max_tokens
        if isinstance(request, ChatRequest):
            asked = request.max_completion_tokens or asked
            logprobs = (request.top_logprobs or 0) if request.logprobs else None
            default = max(1, min(most, self.engine.scheduler.room - len(prompt)))
        else:
            logprobs, default = request.logprobs, 16
        if asked is not None and asked > most:
            raise LoralloyError(f"max_tokens is {asked}; this server gives at most {most}")
        return Sampling(
            max_tokens=asked or default,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=None if request.seed is None else request.seed + choice,
            stop=tuple(request.stop or ()),
            logprobs=logprobs,
        )


def build(model: Any, tokenizer: Any, bank: Bank, weigher: Any = None, base: Any = None, **options: Any) -> Service:
    """A service over a loaded model; `options`: `threshold`, `resident`, `max_rows`, `cache_tokens`, `max_waiting`,
    `max_bytes`, `limits` (see :class:`Routing`, :class:`~loralloy.live.paged.PagedModel`, :class:`Scheduler`,
    :class:`Engine`, :class:`Compositions` and :class:`Limits`)."""
    from ..live.paged import PagedModel
    from .scheduler import Scheduler

    limits, metrics = options.get("limits") or Limits(), Metrics()
    live = PagedModel(model, bank, base, resident=options.get("resident", 32))
    rows, room = options.get("max_rows", 32), options.get("cache_tokens", 65536)
    scheduler = Scheduler(model, tokenizer, live, rows, room, on_step=metrics.step)
    engine = Engine(scheduler, options.get("max_waiting", 256), limits.seconds)
    compositions = Compositions(
        bank,
        live,
        options.get("max_bytes", 2 << 30),
        on_merge=metrics.merge_seconds.observe,
        remove=lambda name: engine.later(lambda: live.remove(name)),
    )
    threshold = options.get("threshold", 1.0)
    routing = Routing(weigher, threshold, on_batch=metrics.route) if weigher is not None else None
    return Service(engine, compositions, routing, limits, metrics)
