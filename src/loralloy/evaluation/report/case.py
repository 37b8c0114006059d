"""The retrieval paper's case study (arXiv 2602.21222, section 7): one question, its weights, each strategy's choice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...atomic import atomic_file
from ...errors import LoralloyError
from ..metrics import per_byte
from .evidence import is_linear

if TYPE_CHECKING:
    from ...tasks import Example, Task
    from ..suite.method import Method, Query
    from ..suite.schema import Suite
    from ..suite.workbench import Workbench

VERSION = 1
FILE = "case.json"
QUESTION = "Where can I buy a tennis ball?"
PAPER_OPTIONS = (
    "You can purchase a tennis ball at any sports store.",
    "You can purchase a tennis racket at any sports store.",
)
OUR_OPTIONS = ("sports store", "tennis court", "park", "bank", "library")
"""In CommonsenseQA's form (five short options); the options are ours: the paper has none in this form."""
TASK = "commonsense_qa"


def case_study(suite: Suite, folder: Path | None = None, advance: Callable[[str], None] | None = None) -> Path:
    """Ask the question with the suite's model, bank and index (its first seed) and write ``case.json`` beside the cells.

    Each routed method of the suite, base, own adapter and uniform composition answers, for both sets of options and each of
    the suite's query kinds. Neighbours' texts are not kept; what it was made of is, as a cell's is. Raises LoralloyError when
    the suite has no task ``commonsense_qa`` of one text column, and for what loading model, bank and index can raise.
    """
    from ..suite.runner import overridden
    from ..suite.workbench import Workbench

    bench = Workbench(overridden(suite, out=str(folder.absolute())) if folder else suite)
    try:
        task = bench.tasks.get(TASK)
        if task is None or len(task.columns) != 1:
            raise LoralloyError(
                f"{suite.path}: the case study asks in the form of the task {TASK!r} with one text column, which the suite lacks"
            )
        forms = [
            _form(bench, task, name, options, answer, advance)
            for name, options, answer in (
                ("paper", PAPER_OPTIONS, PAPER_OPTIONS[0]),
                ("ours", OUR_OPTIONS, OUR_OPTIONS[0]),
            )
        ]
        data = {
            "version": VERSION, "question": QUESTION, "task": TASK, "prompt": example(task, OUR_OPTIONS, "").prompt,
            "seed": suite.fields.index.seeds[0], "model": Path(suite.fields.model).name, "dtype": str(bench.model.dtype),
            "made_of": _made_of(bench), "forms": forms,
        }  # fmt: skip
    finally:
        bench.close()
    path = (folder or suite.out) / FILE
    atomic_file(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return path


def _asked(suite: Suite) -> list[Method]:
    return [method for method in suite.methods if method.kind in ("routed", "base", "perfect", "uniform")]


def _made_of(bench: Workbench) -> dict[str, Any]:
    """As the cells of the methods that are asked have it, and the hash of these methods' settings."""
    from ..suite.cells import Cell, made_of

    made: dict[str, Any] = {}
    for method in _asked(bench.suite):
        parts = made_of(Cell(method, None, None, None), bench)
        made |= {name: part for name, part in parts.items() if part is not None}
    return made | {"methods": _methods(bench.suite)}


def _methods(suite: Suite) -> str:
    from ..suite.workbench import short_hash

    return short_hash([[method.name, method.settings] for method in _asked(suite)])


def stale_parts(case: Mapping[str, Any], suite: Suite, cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a case study was made of that the suite's cells, or its methods now, are not: "bank", "index", "methods"...;
    ["unknown"] for one that does not say."""
    made = case.get("made_of")
    if not isinstance(made, dict):
        return ["unknown"]
    of_cells: dict[str, list[Any]] = {}
    for cell in cells:
        for name, part in (cell.get("made_of") or {}).items():
            if part is not None:
                of_cells.setdefault(name, []).append(part)
    stale = [name for name, part in made.items() if name in of_cells and part not in of_cells[name]]
    return [*stale, *(["methods"] if made.get("methods") != _methods(suite) else [])]


def example(task: Task, options: tuple[str, ...], answer: str) -> Example:
    """The question as a row of the task."""
    from ...tasks import Example

    made = task.render({task.columns[0].name: QUESTION})
    return Example(f"case/{len(options)} options", task.name, made.prompt, made.query, made.raw, answer, options)


def _form(
    bench: Workbench,
    task: Task,
    name: str,
    options: tuple[str, ...],
    answer: str,
    advance: Callable[[str], None] | None,
) -> dict[str, Any]:
    row = example(task, options, answer)
    seed = bench.suite.fields.index.seeds[0]
    weights: list[dict[str, Any]] = []
    strategies: list[dict[str, Any]] = []
    for query in bench.suite.fields.queries:
        weights += _weights(bench, row, query, seed)
        for method in _asked(bench.suite):
            if "query" not in method.depends and any(s["method"] == method.name for s in strategies):
                continue
            strategies.append(_answer(bench, method, row, query, seed))
            if advance:
                advance(f"case study: {method.title()}")
    return {"name": name, "options": list(options), "answer": answer, "weights": weights, "strategies": strategies}


def _weights(bench: Workbench, row: Example, query: Query, seed: int) -> list[dict[str, Any]]:
    from ..suite.run import Run
    from .routes import said

    found = []
    for method in bench.suite.methods:
        if is_linear(method):
            made = method.weights(Run(bench, query, "in_domain", seed), [row])[0]  # type: ignore[attr-defined]
            ordered = dict(sorted(made.items(), key=lambda item: -item[1]))
            found.append(
                {"weigher": said(method), "query": query, "weights": {n: round(w, 4) for n, w in ordered.items()}}
            )
    return found


def _answer(bench: Workbench, method: Method, row: Example, query: Query, seed: int) -> dict[str, Any]:
    from ..suite.run import Run
    from .table import parameters

    given = Run(bench, query if "query" in method.depends else None, "in_domain", seed)
    made = method.answer(given, [row])[0]
    assert made.scores is not None
    return {
        "method": method.name, "heading": method.title(), "space": method.space, "rule": method.rule,
        "parameters": parameters(method), "rank": method.rank,
        "query": given.query, "choice": made.answer, "per_byte": per_byte(made.scores, row.options),
        "scores": [round(score, 3) for score in made.scores],
    }  # fmt: skip


def read_case(folder: Path) -> dict[str, Any] | None:
    """The case study beside a folder of cells; None where it was not made. Raises LoralloyError when it is unreadable."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoralloyError(f"{path}: not a readable case study ({error}); make it again with --case") from None
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise LoralloyError(f"{path}: not a case study of version {VERSION}; make it again with --case")
    return data
