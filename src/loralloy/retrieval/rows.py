"""Which rows of a task an index holds, and under which ids and texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import LoralloyError

if TYPE_CHECKING:
    from ..tasks.task import Task

ROWS = 2000  # a task, as in the retrieval paper (arXiv 2602.21222)
RAW = "#raw"  # ends the id of a row's raw text in an index of both


def task_rows(task: Task, rows: int, seed: int, template: str) -> tuple[list[str], list[str]]:
    """Ids and texts of the examples that represent `task`: training rows, never an answer, a seeded choice of `rows`.

    A row's place in the choice is the hash of its seed and text, so a new row in the data displaces at most one other.
    Template "both" takes the rows that "hinted" takes and adds each one's raw text, as id + :data:`RAW`, where it
    differs (a task may have neither hint nor prefixes).
    """
    examples = task.examples("train")
    if not examples:
        raise LoralloyError(f"task {task.name!r}: its train split is empty, so there is nothing to index")
    texts = [example.raw if template == "raw" else example.query for example in examples]
    ids = [example.id for example in examples]
    order = sorted(range(len(ids)), key=lambda i: (hashlib.sha256(f"{seed}|{texts[i]}".encode()).digest(), ids[i]))
    chosen = sorted(order[:rows])
    twins = [i for i in chosen if template == "both" and examples[i].raw != texts[i]]
    return (
        [ids[i] for i in chosen] + [ids[i] + RAW for i in twins],
        [texts[i] for i in chosen] + [examples[i].raw for i in twins],
    )


def content_hash(ids: Sequence[str], texts: Sequence[str]) -> str:
    """SHA-256 over ids and texts, each with its length, so that moving characters between rows changes it."""
    digest = hashlib.sha256()
    for item in (*ids, *texts):
        data = item.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
