"""The ways to answer in a run: a plain forward, compositions live by row, merges by row. Nothing is answered twice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeAlias

from ...errors import LoralloyError
from ...weights import Weights
from .merges import Coefficients, How, coefficients, size_of, unique
from .method import Row

if TYPE_CHECKING:
    from ...bank import Bank
    from ...live import LiveModel
    from ...live.scoring import RowsHook
    from ...tasks import Example
    from .workbench import Workbench

_FREE = 4  # rows of free text a batch, as a multiple of the batch size
Composition: TypeAlias = "tuple[str, Coefficients]"
"""How (its key, "live" for the exact sum) and the weights: with an example's id, all that its answer depends on."""


class Answering:
    """Part of :class:`~loralloy.evaluation.suite.run.Run`; its attributes are documented there."""

    bench: Workbench
    progress: Callable[[int], None] | None

    def __init__(self) -> None:
        self.seconds = {"weigh": 0.0, "compose": 0.0, "answer": 0.0}
        self.hits = self.misses = self.reused = 0
        self.bytes: dict[Coefficients, int] = {}

    @property
    def model(self) -> Any:
        return self.bench.model

    @property
    def tokenizer(self) -> Any:
        return self.bench.tokenizer

    @property
    def bank(self) -> Bank:
        return self.bench.bank

    @property
    def live(self) -> LiveModel:
        return self.bench.live

    @property
    def batch_size(self) -> int:
        return self.bench.batch_size

    def left_out(self, example: Example) -> str | None:
        raise NotImplementedError

    def predict(
        self,
        prompts: Sequence[str],
        options: Sequence[Sequence[str]],
        rows_hook: RowsHook | None = None,
        weights: Sequence[Mapping[str, float] | None] | None = None,
    ) -> list[Row]:
        """One row a prompt: the likeliest of its options, or greedy text where it has none; `weights` are noted in it."""
        from ...live.scoring import generate, score_options

        start, composed = time.perf_counter(), self.seconds["compose"]
        closed = [i for i, row in enumerate(options) if row]
        free = [i for i, row in enumerate(options) if not row]
        noted = list(weights) if weights is not None else [None] * len(prompts)
        rows: list[Row | None] = [None] * len(prompts)

        def among(chosen: list[int]) -> RowsHook | None:
            return (lambda indices: rows_hook([chosen[i] for i in indices])) if rows_hook else None

        def note(i: int, answer: str, scores: list[float] | None) -> None:
            w = noted[i]
            rows[i] = Row(answer, dict(w) if w is not None else None, scores)

        common: dict[str, Any] = {"batch_size": self.batch_size, "progress": self.progress}
        if closed:
            found = score_options(
                self.model, self.tokenizer, [prompts[i] for i in closed], [options[i] for i in closed],
                rows_hook=among(closed), **common,
            )  # fmt: skip
            for i, scores in zip(closed, found, strict=True):
                note(i, options[i][int(scores.argmax())], scores.tolist())
        if free:
            limit = self.bench.suite.fields.max_new_tokens
            # a step of generation is small: more rows at once keep the device as busy
            common["batch_size"] = _FREE * self.batch_size
            texts = generate(
                self.model, self.tokenizer, [prompts[i] for i in free], limit, rows_hook=among(free), **common
            )
            for i, text in zip(free, texts, strict=True):
                note(i, text, None)
        spent = time.perf_counter() - start - (self.seconds["compose"] - composed)
        self.seconds["answer"] += spent
        return [row for row in rows if row is not None]

    def composed(self, examples: Sequence[Example], weights: Sequence[Mapping[str, float]]) -> list[Row]:
        """Every example under its own weights, live and exact: the weighted sum of dW. Empty weights are the base model."""
        self.check_weights(examples, weights)
        first = self.bank.names[0]
        # seven digits: float32 sees no more, and equal compositions have equal keys
        keys = [tuple((name, round(w, 7)) for name, w in coefficients(given)) for given in weights]
        rows = [Weights(dict(key) if key else {first: 0.0}) for key in keys]

        def answer(chosen: list[int]) -> list[Row]:
            def hook(indices: list[int]) -> AbstractContextManager[Any]:
                return self.live.compose([rows[chosen[i]] for i in indices])

            return self.predict([examples[i].prompt for i in chosen], [examples[i].options for i in chosen], hook)

        return self._each_once(examples, [("live", key) for key in keys], weights, answer)

    def merged(
        self, examples: Sequence[Example], weights: Sequence[Mapping[str, float]], how: How, step: float = 0.0
    ) -> list[Row]:
        """Every example under the merge of its weights, rounded to `step`; merges are cached. Empty weights are the base."""
        self.check_weights(examples, weights)
        keys = [coefficients(given, step) for given in weights]
        loaded: dict[Coefficients, int] = {}

        def answer(chosen: list[int]) -> list[Row]:
            seen: set[int] = set()

            @contextlib.contextmanager
            def hook(indices: list[int]) -> Iterator[Any]:
                mine = [keys[chosen[i]] for i in indices]
                start = self._now()
                self._count([keys[chosen[i]] for i in dict.fromkeys(indices) if i not in seen], how)
                seen.update(indices)
                if any(key and key not in loaded for key in mine):
                    wanted = unique([key for key in mine if key])
                    self.bench.merged_rows.load([self.bench.merges.get(how, key) for key in wanted])
                    loaded.clear()
                    loaded.update((key, n) for n, key in enumerate(wanted))
                self.seconds["compose"] += self._now() - start
                with self.live.compose(None), self.bench.merged_rows.rows([loaded.get(key, -1) for key in mine]):
                    yield

            try:
                return self.predict([examples[i].prompt for i in chosen], [examples[i].options for i in chosen], hook)
            finally:
                self.bench.merged_rows.load([])

        rows = self._each_once(examples, [(how.key, key) for key in keys], [dict(key) for key in keys], answer)
        for key in filter(None, keys):
            self.bytes[key] = self.bench.sizes[how.key, key]
        return rows

    def _count(self, keys: Sequence[Coefficients], how: How) -> None:
        """Hits and misses of rows that are answered for the first time, and the size of what is made for them."""
        merges, stored = self.bench.merges, next(iter(self.bank.values())).dtype.itemsize
        for key in filter(None, keys):
            held = (how, key) in merges
            self.hits += held
            self.misses += not held
            if (how.key, key) not in self.bench.sizes:
                self.bench.sizes[how.key, key] = size_of(merges.get(how, key), stored)
            elif not held:
                merges.get(how, key)

    def _each_once(
        self,
        examples: Sequence[Example],
        compositions: Sequence[Composition],
        weights: Sequence[Mapping[str, float]],
        answer: Callable[[list[int]], list[Row]],
    ) -> list[Row]:
        """Rows by `answer`, but for examples that this process has answered under the same composition before.

        Methods often agree: a hinted query's whole weight is on its own adapter under any router.
        """
        known = self.bench.answers
        keys = [(example.id, *composition) for example, composition in zip(examples, compositions, strict=True)]
        fresh = [i for i, key in enumerate(keys) if key not in known]
        if old := len(keys) - len(fresh):
            self.reused += old
            fresh_set = set(fresh)
            self.hits += sum(how != "live" and bool(key) and i not in fresh_set
                             for i, (how, key) in enumerate(compositions))  # fmt: skip
            if self.progress:
                self.progress(old)
        if fresh:
            known.update(zip([keys[i] for i in fresh], answer(fresh), strict=True))
        return [known[key]._replace(weights=dict(given)) for key, given in zip(keys, weights, strict=True)]

    def check_weights(self, examples: Sequence[Example], weights: Sequence[Mapping[str, float]]) -> None:
        """Raises LoralloyError where an adapter that an example may not use has a weight."""
        for example, given in zip(examples, weights, strict=True):
            own = self.left_out(example)
            if own is not None and given.get(own, 0.0) != 0.0:
                raise LoralloyError(
                    f"example {example.id} was given its own adapter {own!r} in scope leave_own_out; its method is wrong"
                )

    def _now(self) -> float:
        """The time once the device is done."""
        if self.bench.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.bench.device)
        return time.perf_counter()
