"""A run: what a method sees of one (query, scope, seed) of the suite."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import LoralloyError
from ...weighting.choose import FITS
from ...weights import Weights
from .answering import Answering
from .method import Query, Scope
from .workbench import Workbench

if TYPE_CHECKING:
    from pathlib import Path

    from ...adapter import Adapter
    from ...retrieval import Index
    from ...tasks import Example, Task


class Run(Answering):
    """One (query, scope, seed) of a suite; None where the method does not depend on it.

    Attributes:
        seconds: by phase: weigh (routing, embedding apart), compose (merging), answer (the model).
        hits, misses: rows whose merged adapter was in the cache, and rows that it was made for.
        reused: rows that this process had answered before under the same composition (for another method, say).
        bytes: of every merged adapter in use, as stored in the bank's dtype.
        routing: what the weigher was made with or has chosen, for the record.
        progress: called with the number of rows just answered.
    """

    def __init__(
        self,
        bench: Workbench,
        query: Query | None = None,
        scope: Scope | None = None,
        seed: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self.bench, self.query, self.scope, self.seed = bench, query, scope, seed
        self.progress = progress
        self.routing: dict[str, Any] | None = None

    # -- the parts (model, tokenizer, bank, live and batch_size are Answering's) ----------------------------------------

    @property
    def multitask(self) -> Adapter | None:
        return self.bench.multitask

    @property
    def tasks(self) -> dict[str, Task]:
        return self.bench.tasks

    @property
    def index(self) -> Index:
        """The index of this run's query template and seed."""
        assert self.query is not None and self.seed is not None, "the method's `depends` leaves out query or seed"
        return self.bench.index(self.query, self.seed)

    # -- protocol ------------------------------------------------------------------------------------------------------

    def left_out(self, example: Example) -> str | None:
        """The task that is withheld from an example: its own, in scope leave_own_out."""
        return example.task if self.scope == "leave_own_out" else None

    def allowed(self, example: Example) -> list[str]:
        """The adapters that an example may use. Raises LoralloyError when none is left."""
        names = [name for name in self.bank.names if name != self.left_out(example)]
        if not names:
            raise LoralloyError(f"{self.bench.suite.path}: a bank of one adapter has none left in scope leave_own_out")
        return names

    def text(self, example: Example) -> str:
        """What is embedded of an example: its query with the task's hint, or its raw text."""
        return example.raw if self.query == "raw" else example.query

    def vectors(self, examples: Sequence[Example]) -> np.ndarray:
        """Unit vectors [n, d] of the examples' query texts, each text embedded once for the whole suite."""
        return self.bench.embedder.encode([self.text(example) for example in examples])

    def task_means(self) -> tuple[list[str], np.ndarray]:
        """Tasks that have an adapter, and the mean of each one's index rows as unit vectors [n, d].

        LoraRetriever (arXiv 2402.09997, section 3.2) stands each adapter for by the mean embedding of samples of its data.
        """
        assert self.query is not None and self.seed is not None, "the method's `depends` leaves out query or seed"
        return self.bench.task_means(self.query, self.seed)

    def nearest_tasks(self, examples: Sequence[Example], k: int, vectors: np.ndarray | None = None) -> list[list[str]]:
        """The k tasks with the nearest mean embedding to each example's query (or to these vectors), nearest first.

        Raises LoralloyError when fewer than k adapters are allowed.
        """
        names, means = self.task_means()
        given = self.vectors(examples) if vectors is None else vectors
        start = time.perf_counter()
        scores = given @ means.T
        result = []
        for example, row in zip(examples, scores, strict=True):
            allowed = set(self.allowed(example))
            order = [names[i] for i in np.argsort(-row, kind="stable") if names[i] in allowed]
            if len(order) < k:
                raise LoralloyError(
                    f"{self.bench.suite.path}: {k} adapters are to be combined, but example {example.id} may use {len(order)}"
                )
            result.append(order[:k])
        self.seconds["weigh"] += time.perf_counter() - start
        return result

    def weigh(self, weigher: Mapping[str, Any], examples: Sequence[Example]) -> list[Weights]:
        """Routed weights of the examples, kept in the suite's cache: methods that differ in their rule share them.

        weigher: what `weighting.open_weigher` takes, with its `kind`. In scope leave_own_out each example's own task is
        withheld. The neighbours are not kept; `explain` has the "unlike" score where the weigher gives one.
        """
        bench = self.bench
        identity = [
            dict(weigher), self.query, self.scope, self.seed, self.index.manifest.template, bench.embedder.identity,
            {name: entry.content_hash for name, entry in self.index.tasks.items()}, self.bank.names,
            [e.id for e in examples], {e.task: bench.data_hash(e.task) for e in examples},
        ]  # fmt: skip
        if (fits := FITS[weigher.get("kind", "paper")]) > 1:
            identity.append(fits)
        held = json.loads(bench.once("weights", identity, lambda: self._weigh(weigher, examples)))
        self.seconds["weigh"] += held["seconds"]
        self.routing = held["routing"]
        return [
            Weights(w, "retrieved", {} if unlike is None else {"unlike": unlike})
            for w, unlike in zip(held["weights"], held["unlike"], strict=True)
        ]

    def _weigh(self, weigher: Mapping[str, Any], examples: Sequence[Example]) -> str:
        from ...weighting import open_weigher

        vectors = self.vectors(examples)
        settings = dict(weigher)
        start = time.perf_counter()
        made = open_weigher(self.index, settings.pop("kind", "paper"), only=self.bank.names, show=0, **settings)
        if self.scope == "in_domain" and hasattr(made, "prepare"):
            made.prepare()  # once for an index; where the own task is left out, fits are part of weighing
        fit, start = time.perf_counter() - start, time.perf_counter()
        found = made.weigh_vectors(vectors, exclude_each=[self.left_out(example) for example in examples])
        seconds = time.perf_counter() - start
        for example, given in zip(examples, found, strict=True):
            if extra := set(given.names) - set(self.allowed(example)):
                raise LoralloyError(f"the weigher gave {sorted(extra)[0]!r} to {example.id}, which may not use it")
        unlike = [w.explain.get("unlike") for w in found]
        weights = [dict(w.items()) for w in found]
        routing = {"settings": made.settings, "index_rows": len(self.index), "fit_seconds": round(fit, 4)}
        return json.dumps({"seconds": seconds, "weights": weights, "unlike": unlike, "routing": routing}, default=str)

    def base_format(self, task: str) -> str:
        """The name of the prompt format in which the base does best on the task's validation rows."""
        return self.bench.base_format(task)

    def train_examples(self, rows: int, seed: int = 0, exclude: Collection[str] = ()) -> dict[str, list[Example]]:
        """Training rows by task: `rows` a task, chosen as an index's rows are."""
        from ...retrieval.index import task_rows

        result = {}
        for name, task in self.tasks.items():
            if name not in exclude:
                chosen = set(task_rows(task, rows, seed, "hinted")[0])
                result[name] = [example for example in task.examples("train") if example.id in chosen]
        return result

    def once_path(self, what: str, identity: Any, suffix: str = ".safetensors") -> tuple[Path, Path]:
        """The file in the suite's cache for something that is made once, and the lock to hold while making it."""
        return self.bench.once_path(what, identity, suffix)
