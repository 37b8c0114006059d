"""One query's way: text -> weights -> composition -> answer, with the reason kept beside the answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .bank import Bank
from .base_ref import BaseRef
from .errors import LoralloyError
from .weights import Weights

if TYPE_CHECKING:
    from .merging import Rule, Space
    from .merging.engine import Rank
    from .retrieval.manifest import IndexedTask
    from .weighting import Weigher


@dataclass(frozen=True)
class Answer:
    """An answer and why: the prompt that was sent, the weights (with their neighbours), the rule and its error.

    scores holds each option's log-likelihood in nats, when options were given. `error` is the composition's relative
    error ||dW - dW_exact|| / ||dW_exact||; 0.0 for the live composition, which merges nothing. `fallback`: the question was
    too unlike the index, and the base model answered alone.
    """

    question: str
    text: str
    prompt: str
    weights: Weights
    rule: str
    space: str
    error: float
    template: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    fallback: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": 1,
            "question": self.question,
            "answer": self.text,
            "prompt": self.prompt,
            "template": self.template,
            "weights": dict(self.weights.items()),
            "explain": self.weights.explain,
            "rule": self.rule,
            "space": self.space,
            "error": self.error,
            "fallback": self.fallback,
            "scores": self.scores,
            "seconds": self.seconds,
        }


def scaffold(task: IndexedTask, text: str) -> str:
    """A user's text as a prompt of `task`: its hint in front unless it is there already, its cue behind."""
    if len(task.columns) == 1:
        return task.scaffold(text)
    parts = [text.strip()]
    if task.hint and not parts[0].casefold().startswith(task.hint.strip().casefold()):
        parts.insert(0, task.hint)
    return task.separator.join([*parts, task.cue]).rstrip() if task.cue else task.separator.join(parts)


class Answerer:
    """Answers questions with a base model, a bank and a router.

    Args:
        model, tokenizer: the loaded base (see :func:`loralloy.live.base.load_base`).
        bank: its adapters. Index tasks without an adapter are left out of the routing.
        router: how much of each; None if weights are always given.
        base: what the model is, checked against the bank.
    """

    def __init__(
        self, model: Any, tokenizer: Any, bank: Bank, router: Weigher | None = None, base: BaseRef | None = None
    ) -> None:
        from .live import LiveModel

        self.model, self.tokenizer, self.bank, self.router = model, tokenizer, bank, router
        self.live = LiveModel(model, bank, base)

    @contextlib.contextmanager
    def composed(
        self, weights: Weights, rule: str | Rule = "linear", space: Space = "delta", rank: Rank | None = None
    ) -> Iterator[float]:
        """The model under one composition inside the block; yields the composition's relative error.

        `linear` and `cat` in delta space without a cut run live, in r-space, and are exact; any other rule is merged once
        and takes the place of the bank.
        """
        from .live import LiveModel
        from .merging import merge

        name = rule if isinstance(rule, str) else rule.name
        if name in ("linear", "cat") and space == "delta" and rank in (None, "full"):
            with self.live.compose(weights):
                yield 0.0
            return
        merged = merge(self.bank, weights, rule, space, rank)
        with self.live.compose(None):
            single = LiveModel(self.model, Bank([merged.adapter]), assume_same_base=True)
            try:
                with single.compose(Weights({merged.adapter.name: 1.0})):
                    yield merged.report.error
            finally:
                single.remove()

    def ask(
        self,
        text: str,
        options: Sequence[str] = (),
        weights: Weights | None = None,
        rule: str = "linear",
        space: Space = "delta",
        rank: Rank | None = None,
        template: str = "auto",
        max_new_tokens: int = 32,
        unlike: float = 1.0,
    ) -> Answer:
        """Route `text`, compose, and answer it.

        Args:
            text: the question; with or without a task's hint.
            options: answers to choose from by log-likelihood; empty for free text.
            weights: skip the routing and use these.
            rule, space, rank: the composition, as for `merge`.
            template: "auto" puts the text in the form of the task with the largest weight, a task's name in that one's,
                "none" sends it as it is.
            max_new_tokens: limit of free text.
            unlike: with a routed question whose ``explain["unlike"]`` exceeds this, the base model answers alone, to the
                text as it is; 1: never.

        Raises LoralloyError for an empty text, an unknown template, and what routing and merging raise.
        """
        from .live.scoring import generate, score_options
        from .weighting import fall_back

        if not text.strip():
            raise LoralloyError("the question is empty; give its text")
        start = time.perf_counter()
        if weights is None:
            if self.router is None:
                raise LoralloyError("there is no index to route with; pass --index, or --weights")
            weights = fall_back(self.router.weigh(text), unlike)
        routed = time.perf_counter()
        alone = "fallback" in weights.explain
        prompt, used = (text, None) if alone and template == "auto" else self._prompt(text, weights, template)
        scores: dict[str, float] = {}
        name = rule if isinstance(rule, str) else getattr(rule, "name", "")
        with self._base() if alone else self.composed(weights, rule, space, rank) as error:
            if options:
                values = score_options(self.model, self.tokenizer, [prompt], [list(options)])[0]
                scores = {o: float(v) for o, v in zip(options, values, strict=True)}
                answer = max(scores, key=lambda o: scores[o])
            else:
                answer = generate(self.model, self.tokenizer, [prompt], max_new_tokens)[0]
        seconds = {"route": routed - start, "answer": time.perf_counter() - routed}
        return Answer(text, answer, prompt, weights, name, space, error, used, scores, seconds, alone)

    @contextlib.contextmanager
    def _base(self) -> Iterator[float]:
        with self.live.compose(None):
            yield 0.0

    def _prompt(self, text: str, weights: Weights, template: str) -> tuple[str, str | None]:
        if template == "none" or (template == "auto" and self.router is None):
            return text, None
        if self.router is None:
            raise LoralloyError(f"--template {template!r} is looked up in an index; pass --index, or --template none")
        tasks = self.router.index.tasks
        name = max(weights.names, key=lambda n: weights.of(n)) if template == "auto" else template
        if name not in tasks:
            if template == "auto":
                return text, None
            raise LoralloyError(
                f"--template {template!r} is not a task of the index; choose auto, none, or one of {', '.join(tasks)}"
            )
        return scaffold(tasks[name], text), name
