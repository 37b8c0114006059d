"""The index: task examples as vectors, under a manifest that says which tasks count."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..atomic import atomic_folder, recover
from ..errors import LoralloyError
from . import lock as locks
from . import manifest as manifests
from .embed import Embedder, TextEncoder
from .lock import FolderLock
from .manifest import STORES, TEMPLATES, IndexedTask, Manifest, check_choice
from .rows import RAW, ROWS, content_hash, task_rows
from .store import ExactStore, Neighbours, Rows, Store

if TYPE_CHECKING:
    from ..tasks.task import Task


def _open_store(kind: str, folder: Path) -> Store:
    if kind == "exact":
        return ExactStore(folder / "exact")
    from .chroma import ChromaStore

    return ChromaStore(folder / "chroma")


class Index:
    """An index folder: ``manifest.json``, a store of rows (``chroma/`` or ``exact/``), a lock.

    A task counts only once its manifest entry is committed: before its rows change the entry is taken out, and it is
    put back when they are complete. So after a kill at any moment the index answers without that task, and the next
    run clears the stray rows and finishes. Use :meth:`build` or :meth:`open`; close it, or use it in a ``with``.
    """

    def __init__(self, folder: Path, manifest: Manifest, embedder: TextEncoder, lock: FolderLock) -> None:
        self.folder = folder
        self.manifest = manifest
        self.embedder = embedder
        self._lock = lock
        self._store: Store | None = None

    # -- opening -------------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, folder: str | Path, embedder: TextEncoder | None = None, *, template: str | None = None) -> Index:
        """Open an index to ask it. `embedder` defaults to all-MiniLM-L6-v2.

        Raises LoralloyError when there is none, when it was built with another embedder or (if given) another text
        `template`, when its rows do not fit its manifest, or while another process writes it.
        """
        folder = Path(folder)
        if not folder.exists():
            recover(folder.absolute())  # a replacement cut short where folders cannot be exchanged in one step
        manifest = Manifest.load(folder)
        _check_match(folder, manifest, embedder := embedder or Embedder(), template)
        lock = FolderLock(folder)
        index = cls(folder, manifest, embedder, lock)
        try:
            lock.shared()
            index.manifest = Manifest.load(folder)  # again: now nobody writes it
            _check_match(folder, index.manifest, embedder, template)
            index._check_rows()
        except BaseException:
            index.close()
            raise
        return index

    @classmethod
    def build(
        cls,
        folder: str | Path,
        tasks: Iterable[Task],
        embedder: TextEncoder | None = None,
        store: str = "chroma",
        rows: int = ROWS,
        seed: int = 0,
        template: str | None = None,
        *,
        overwrite: bool = False,
        progress: bool = False,
    ) -> Index:
        """Make `folder` an index that holds `tasks`, and open it. Idempotent: what is there and unchanged is skipped.

        Parameters: `store`, ``"chroma"`` or ``"exact"``; at most `rows` a task, chosen with `seed`; `template`,
        ``"hinted"`` (the task's hint and columns, the paper's), ``"raw"`` (columns only, what users type) or ``"both"``
        (two vectors a row; the default of a new index). Never the answer. An existing index keeps its other
        tasks and must agree in store, embedder and template; with `overwrite` it is replaced as a whole, once the new
        one is complete.
        """
        folder, tasks = Path(folder), list(tasks)
        check_choice("store", store, STORES)
        embedder = embedder or Embedder()
        names = [task.name for task in tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise LoralloyError(f"two tasks are named {twice[0]!r}; names must be unique in an index")
        recover(folder.absolute())
        is_index = (folder / manifests.NAME).is_file()
        if template is None:
            template = Manifest.load(folder).template if is_index else "both"
        check_choice("template", template, TEMPLATES)
        if folder.exists() and not is_index and _foreign(folder):
            raise LoralloyError(f"{folder}: not an index and not empty; choose another folder")
        if is_index and overwrite:
            with FolderLock(folder) as guard:
                guard.exclusive()
                with atomic_folder(folder, overwrite=True) as new:
                    fresh = cls.build(new, tasks, embedder, store, rows, seed, template, progress=progress)
                    fresh.close()
            return cls.open(folder, embedder)
        folder.mkdir(parents=True, exist_ok=True)
        index = cls(
            folder, Manifest(store, embedder.identity, embedder.dimension, template), embedder, FolderLock(folder)
        )
        try:
            with index._writing(create=True):
                _check_match(folder, index.manifest, embedder, template)
                if index.manifest.store != store:
                    raise LoralloyError(
                        f"{folder}: built with store {index.manifest.store!r}, not {store!r}; choose another folder, "
                        "or --overwrite to build it again"
                    )
                for task in tasks:
                    index._add(task, rows, seed, progress=progress)
        except BaseException:
            index.close()
            raise
        return index

    # -- changing ------------------------------------------------------------------------------------------------------

    def add(self, task: Task, rows: int = ROWS, seed: int = 0, *, force: bool = False, progress: bool = False) -> bool:
        """Add `task`, or replace it if its rows changed (`force`: in any case). True if rows were written."""
        with self._writing():
            return self._add(task, rows, seed, force, progress)

    def remove(self, name: str) -> None:
        """Take task `name` out. Raises LoralloyError, naming what there is, when it is not in the index."""
        if name not in self.manifest.tasks:
            raise LoralloyError(
                f"{self.folder}: no task {name!r} in this index; it has {', '.join(self.names) or 'none'}"
            )
        with self._writing():
            self._uncommit(name)
            self.store.remove(name)

    def _add(self, task: Task, rows: int, seed: int, force: bool = False, progress: bool = False) -> bool:
        if rows < 1:
            raise LoralloyError(f"rows is {rows}; index at least one row a task")
        ids, texts = task_rows(task, rows, seed, self.manifest.template)
        examples = sum(not i.endswith(RAW) for i in ids)
        entry = IndexedTask.of(task, examples, rows, seed, content_hash(ids, texts), len(ids))
        old = self.manifest.tasks.get(task.name)
        if old and old.content_hash == entry.content_hash and not force:
            if old != entry:  # only the task's own fields changed (its cue, say): the vectors stand
                self._commit(entry)
            return False
        self._uncommit(task.name)
        self.store.add(task.name, ids, self.embedder.encode(texts, progress=progress), texts)
        self._commit(entry)
        return True

    def _commit(self, entry: IndexedTask) -> None:
        self.manifest = replace(self.manifest, tasks=self.manifest.tasks | {entry.name: entry})
        self.manifest.save(self.folder)

    def _uncommit(self, name: str) -> None:
        if name in self.manifest.tasks:
            left = {other: entry for other, entry in self.manifest.tasks.items() if other != name}
            self.manifest = replace(self.manifest, tasks=left)
            self.manifest.save(self.folder)

    @contextlib.contextmanager
    def _writing(self, create: bool = False) -> Iterator[None]:
        """Hold the folder alone, clear what a killed run left, and go back to shared use at the end."""
        self._lock.exclusive()
        try:
            if create and not (self.folder / manifests.NAME).is_file():
                self.manifest.save(self.folder)
            self.manifest = Manifest.load(self.folder)  # another process may have changed it since it was opened
            for name in set(self.store.tasks()) - set(self.manifest.tasks):
                self.store.remove(name)
            self._check_rows()
            yield
        finally:
            self._lock.shared()

    def _check_rows(self) -> None:
        held = self.store.tasks()
        for name, entry in self.manifest.tasks.items():
            if held.get(name, 0) != entry.vectors or not entry.rows <= entry.vectors <= 2 * entry.rows:
                raise LoralloyError(
                    f"{self.folder}: task {name!r} has {held.get(name, 0)} vectors, its manifest says {entry.vectors} of "
                    f"{entry.rows} rows; the index is damaged: build it again with --overwrite"
                )

    # -- asking --------------------------------------------------------------------------------------------------------

    @property
    def store(self) -> Store:
        """The store of rows; it may hold rows that do not count: ask through :meth:`search`."""
        if self._store is None:
            self._store = _open_store(self.manifest.store, self.folder)
        return self._store

    @property
    def tasks(self) -> dict[str, IndexedTask]:
        """The committed tasks, by name."""
        return dict(self.manifest.tasks)

    @property
    def names(self) -> list[str]:
        return sorted(self.manifest.tasks)

    def __len__(self) -> int:
        return sum(entry.rows for entry in self.manifest.tasks.values())

    def check_template(self, tasks: Iterable[Task]) -> None:
        """Raises LoralloyError, naming the first, when one of `tasks` is in the index with another text template."""
        for task in tasks:
            entry = self.manifest.tasks.get(task.name)
            if entry and entry.template_hash != task.template_hash():
                raise LoralloyError(
                    f"{self.folder}: task {task.name!r} was indexed with another text template (hint, columns, "
                    f"separator or cue); run `loralloy index` on its task file again with -o {self.folder}"
                )

    def embed(self, texts: Sequence[str], progress: bool = False) -> np.ndarray:
        """Unit vectors ``[n, d]`` of query texts. Raises LoralloyError for an empty text."""
        for text in texts:
            if not text.strip():
                raise LoralloyError("the query text is empty; give the question to route")
        return self.embedder.encode(texts, progress=progress)

    def tasks_left(self, exclude: Collection[str] = (), only: Collection[str] | None = None) -> set[str]:
        """The committed tasks that are left; LoralloyError, naming what there is, when none is."""
        left = set(self.manifest.tasks) - set(exclude)
        if only is not None:
            left &= set(only)
        if not left:
            has = ", ".join(self.names) or f"none yet: run `loralloy index TASKS -o {self.folder}`"
            raise LoralloyError(f"{self.folder}: no task left to search; the index has {has}")
        return left

    def search(
        self, vectors: np.ndarray, k: int, exclude: Collection[str] = (), only: Collection[str] | None = None
    ) -> Neighbours:
        """The k nearest committed rows to each of `vectors` [m, d]: ids, distances ``1 - cos`` [m, <= k], tasks.

        `exclude` leaves tasks out (a query's own, say) and `only` keeps some; both are done over the labels in memory,
        and k neighbours remain. Raises LoralloyError when no task is left.
        """
        left = self.tasks_left(exclude, only)
        everything = left == set(self.store.tasks())
        return self.store.query(vectors, k, None if everything else left)

    def vectors(self, only: Collection[str] | None = None) -> Rows:
        """All committed rows (of the tasks `only`): ids, unit vectors ``[n, d]``, tasks; by task, then id.

        Raises LoralloyError when no task is left.
        """
        return self.store.vectors(self.tasks_left((), only))

    def texts(self, ids: Sequence[str]) -> list[str]:
        """The indexed texts of these rows."""
        return self.store.texts(ids)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None
        self._lock.release()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _foreign(folder: Path) -> bool:
    """Whether a folder without a manifest holds anything that a killed first run cannot have left."""
    ours = {locks.NAME, "chroma", "exact"}
    return any(path.name not in ours and not path.name.startswith(f".{manifests.NAME}.") for path in folder.iterdir())


def _check_match(folder: Path, manifest: Manifest, embedder: TextEncoder, template: str | None) -> None:
    if manifest.embedder != embedder.identity:
        raise LoralloyError(
            f"{folder}: built with embedder {manifest.embedder}, not {embedder.identity}; pass that one (--embedder), "
            "or build it again with --overwrite"
        )
    if template is not None and manifest.template != template:
        raise LoralloyError(
            f"{folder}: built with text template {manifest.template!r}, not {template!r}; ask with that one, or build "
            "it again with --overwrite"
        )
