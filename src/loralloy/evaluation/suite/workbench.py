"""What all cells of a suite share: model, bank, tasks, vectors and indices, each loaded when first asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...atomic import atomic_file
from ...errors import LoralloyError
from .locks import lock, once
from .merges import Coefficients, Merges
from .method import Method, Row
from .schema import Suite
from .vectors import CachedEmbedder

if TYPE_CHECKING:
    import torch

    from ...adapter import Adapter
    from ...bank import Bank
    from ...base_ref import BaseRef
    from ...live import LiveModel
    from ...live.merged_rows import MergedRows
    from ...retrieval import Index
    from ...retrieval.embed import TextEncoder
    from ...tasks import Example, Task

ENGINE = 1
"""Raised when a change of the code changes answers: cells, and what is cached for them, of another number are made again."""
CACHE_BYTES = 2 << 30  # of merged adapters a process, on the GPU


class Tokenizer:
    """A tokenizer that remembers: the same prompts and options come back in every cell."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[str, bool], dict[str, list[int]]] = {}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        key = text, add_special_tokens
        if key not in self._known:
            ids = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            self._known[key] = {"input_ids": list(ids)}
        return self._known[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._tokenizer, name)


class Workbench:
    """The parts of a suite, loaded lazily, and its folder of caches.

    Args:
        suite: what to evaluate.
        embedder: takes the place of the suite's.

    Raises LoralloyError, when a part is asked for, for everything that loading it can raise.
    """

    def __init__(self, suite: Suite, embedder: TextEncoder | None = None) -> None:
        self.suite, self._given = suite, embedder
        self.batch_size = suite.fields.batch_size
        """Rows a forward; halved where they do not fit into the GPU's memory."""
        self.cache = suite.out / "cache"
        self._indices: dict[tuple[str, int], Index] = {}
        self.answers: dict[tuple[str, str, Coefficients], Row] = {}
        """By example, way of composing and weights: what this process has answered."""
        self.sizes: dict[tuple[str, Coefficients], int] = {}
        """Bytes of merged adapters, as stored, by way of composing and weights."""
        self._means: dict[tuple[str, int], tuple[list[str], np.ndarray]] = {}
        self._formats: dict[str, str] = {}

    # -- tasks ---------------------------------------------------------------------------------------------------------

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The suite's tasks by name. Raises LoralloyError for one whose adapter is not in the bank."""
        from ...tasks import load_tasks

        tasks = {task.name: task for task in load_tasks(self.suite.fields.tasks)}
        if missing := [name for name in tasks if name not in self.bank]:
            raise LoralloyError(
                f"{self.suite.path}: task {missing[0]!r} has no adapter in the bank {self.suite.fields.bank} "
                f"({', '.join(self.bank.names)}); train it, or leave the task out of `tasks`"
            )
        return tasks

    def examples(self, rows: int) -> list[Example]:
        """The first `rows` test rows of every task (all, where a task has fewer)."""
        return [example for task in self.tasks.values() for example in task.examples("test", rows)]

    def data_hash(self, name: str) -> str:
        """sha256 over one task's rendered rows of all splits."""
        if name not in self._data:
            digest = hashlib.sha256(self.tasks[name].template_hash().encode())
            for split in ("test", "validation", "train"):
                for e in self.tasks[name].examples(split):
                    row = [e.id, e.prompt, e.query, e.raw, e.answer, e.options, e.references]
                    digest.update(json.dumps(row).encode())
            self._data[name] = digest.hexdigest()
        return self._data[name]

    @cached_property
    def _data(self) -> dict[str, str]:
        return {}

    # -- adapters and model --------------------------------------------------------------------------------------------

    @cached_property
    def bank(self) -> Bank:
        from ...bank import Bank

        return Bank.load(self.suite.fields.bank)

    @cached_property
    def multitask(self) -> Adapter | None:
        from ...adapter import Adapter

        return Adapter.load(self.suite.fields.multitask) if self.suite.fields.multitask else None

    @cached_property
    def _loaded(self) -> tuple[Any, Any, BaseRef]:
        from ...base_ref import BaseRef
        from ...hub import parse_ref
        from ...live.base import base_fingerprint, load_base

        fields = self.suite.fields
        model, tokenizer = load_base(fields.model, fields.dtype, fields.device)
        return model, Tokenizer(tokenizer), BaseRef(*parse_ref(fields.model), base_fingerprint(model))

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @property
    def base(self) -> BaseRef:
        return self._loaded[2]

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @cached_property
    def live(self) -> LiveModel:
        """The model with the bank composed into it, exactly, by row."""
        from ...live import LiveModel

        return LiveModel(self.model, self.bank, self.base)

    @cached_property
    def merged_rows(self) -> MergedRows:
        from ...live.merged_rows import MergedRows

        self.live  # noqa: B018 - its check of the base comes first
        return MergedRows(self.model)

    @cached_property
    def merges(self) -> Merges:
        return Merges(self.bank, self.device, CACHE_BYTES)

    # -- retrieval -----------------------------------------------------------------------------------------------------

    @cached_property
    def embedder(self) -> CachedEmbedder:
        from ...live.base import pick_device
        from ...retrieval import Embedder, HashEmbedder

        wanted, device = self.suite.fields.index.embedder, pick_device(self.suite.fields.device)
        encoder: TextEncoder
        if self._given is not None:
            encoder = self._given
        elif wanted == "hash":
            encoder = HashEmbedder(128)
        elif device.type == "cuda":
            encoder = Embedder(wanted, device=str(device), batch_size=512)
        else:
            encoder = Embedder(wanted)
        return CachedEmbedder(encoder, self.cache)

    def template(self, query: str) -> str:
        """The template of the index that a query of this kind is searched in."""
        wanted = self.suite.fields.index.template
        return query if wanted == "match" else wanted

    def index(self, query: str, seed: int) -> Index:
        """The index for queries of this kind, of one seed; built where it is not there yet."""
        from ...retrieval import Index

        template, entry = self.template(query), self.suite.fields.index
        if (template, seed) not in self._indices:
            data = [self.data_hash(name) for name in self.tasks]
            tag = short_hash([entry.rows, entry.store, self.embedder.identity, data])
            folder = self.cache / f"index-{template}-{seed}-{tag}"
            with lock(self.cache / f".{folder.name}.lock"):
                done = folder.with_name(f"{folder.name}.done")
                if not done.is_file():  # building goes on where a killed run left it
                    tasks = self.tasks.values()
                    Index.build(folder, tasks, self.embedder, entry.store, entry.rows, seed, template).close()
                    self.embedder.save()
                    atomic_file(done, "")
            self._indices[template, seed] = Index.open(folder, self.embedder)
        return self._indices[template, seed]

    def task_means(self, query: str, seed: int) -> tuple[list[str], np.ndarray]:
        """Tasks, and the mean of each one's index rows (in the query's form) as unit vectors [n, d]."""
        from ...retrieval.index import task_rows

        if (query, seed) not in self._means:
            entry, template = self.suite.fields.index, self.template(query)
            form = query if template == "both" else template
            means = []
            for task in self.tasks.values():
                texts = task_rows(task, entry.rows, seed, form)[1]
                means.append(self.embedder.encode(texts).mean(0))
            stacked = np.stack(means)
            stacked /= np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-12)
            self._means[query, seed] = list(self.tasks), stacked
        return self._means[query, seed]

    # -- the base's prompt ---------------------------------------------------------------------------------------------

    def base_format(self, name: str) -> str:
        """The base's best prompt format for a task, chosen on validation rows.

        As its adapter's training recorded it (metrics.json); else chosen now on the first `validation_rows`, and kept.
        """
        from ..compare import recorded_base_format

        if name not in self._formats:
            found = recorded_base_format(self.bank[name])
            self._formats[name] = found or self._choose_format(name)
        return self._formats[name]

    def _choose_format(self, name: str) -> str:
        from ...live.base_format import best_base_format

        rows = self.tasks[name].examples("validation", self.suite.fields.validation_rows)
        identity = [self.data_hash(name), self.base.fingerprint, len(rows), str(self.model.dtype)]

        def choose() -> str:
            with self.live.compose(None):
                made = best_base_format(self.model, self.tokenizer, self.tasks[name], rows, batch_size=self.batch_size)
            values = {format: value.to_dict() for format, value in made.validation.items()}
            return json.dumps({"task": name, "format": made.name, "validation": values})

        return str(json.loads(self.once("base-format", identity, choose))["format"])

    # -- what is made once ---------------------------------------------------------------------------------------------

    def once(self, what: str, identity: Any, make: Callable[[], str]) -> str:
        """`make()`'s text, kept in the cache folder under what it is of: made by one process, read by the others."""
        return once(self.cache / f"{what}-{short_hash([ENGINE, identity])}.json", make)

    def once_path(self, what: str, identity: Any, suffix: str = ".safetensors") -> tuple[Path, Path]:
        """For larger things (a trained router): the file to write, atomically, and the lock to hold meanwhile."""
        path = self.cache / f"{what}-{short_hash([ENGINE, identity])}{suffix}"
        return path, path.with_name(f".{path.name}.lock")

    def prepare(self, methods: Sequence[Method], progress: bool = False) -> None:
        """Embed every text and build every index that these methods need, so that processes started later only read."""
        needing = [method for method in methods if "index" in method.uses]
        if needing:
            fields = self.suite.fields
            queries = {q for m in needing for q in (m.queries or fields.queries)}
            rows = max(self.suite.rows_of(method) for method in needing)
            examples = self.examples(rows)
            told = max(method.validation_queries for method in needing)
            examples += [e for task in self.tasks.values() for e in task.examples("validation", told)]
            texts = [e.query if q == "hinted" else e.raw for q in sorted(queries) for e in examples]
            self.embedder.encode(texts, progress=progress)
            seeds = {s for m in needing for s in (m.seeds or fields.index.seeds)}
            for query in sorted(queries):
                for seed in sorted(seeds):
                    self.index(query, seed)
            self.embedder.save()

    def forget(self) -> None:
        """Let go of merged adapters, in use or kept for later: they are made again when they are needed."""
        self.__dict__.pop("merges", None)
        if "merged_rows" in self.__dict__:
            self.__dict__.pop("merged_rows").remove()

    def close(self) -> None:
        for index in self._indices.values():
            index.close()
        self._indices.clear()
        for part in ("live", "merged_rows"):
            if part in self.__dict__:
                self.__dict__.pop(part).remove()


def short_hash(identity: Any) -> str:
    """20 hex digits of the sha256 of plain data."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:20]
