"""One adapter on several tasks: whose rows it sees, and figures by task."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny

from loralloy.adapter import Adapter
from loralloy.errors import LoralloyError
from loralloy.tasks import Task
from loralloy.training import TrainConfig, train
from loralloy.training.data import encode_examples, epoch_batches
from loralloy.training.mixture import Mixture

TOKENIZER = tiny.make_tokenizer()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """vowels; consonants (the other way round, no validation rows); echo (no test rows)."""
    files = []
    for name, changes in {
        "vowels": {},
        "consonants": {"hint": "Is it a consonant?", "labels": ["no", "yes"], "splits": {"test": 8, "validation": 0}},
        "echo": {"hint": "What is it?", "splits": {"test": 0, "validation": 8}, "licence": "MIT", "data": "an echo"},
    }.items():
        folder = tmp_path_factory.mktemp(name)
        files.append(tiny.save_task(folder, rows=40, name=name, **changes))
    return files


@pytest.mark.parametrize("limit", [None, 5])
def test_the_rows_are_those_of_each_task(tasks: list[Path], limit: int | None) -> None:
    mixture = Mixture.of(tasks, "all")
    config = TrainConfig(limit=limit, max_length=64)
    rows, told = mixture.encode(TOKENIZER, config)
    each = {p: Task.load(p) for p in tasks}
    alone = [encode_examples(TOKENIZER, t.examples("train", limit), t.hint, 64)[0] for t in each.values()]
    assert rows == [row for part in alone for row in part]
    assert [(name, entry["rows"]) for name, entry in told.items()] == [
        (t.name, len(part)) for t, part in zip(each.values(), alone, strict=True)
    ]
    assert len({entry["data"] for entry in told.values()}) == 3 and told["echo"]["licence"] == "MIT"
    if limit is None:  # shuffled over all rows: no task has a stretch of its own (batches are of about one length)
        bounds = [len(alone[0]), len(alone[0]) + len(alone[1])]
        order = [
            sum(i >= b for b in bounds) for batch in epoch_batches([len(r.ids) for r in rows], 4, 0, 0) for i in batch
        ]
        assert {*order[: len(order) // 2]} == {*order[len(order) // 2 :]} == {0, 1, 2}


def test_refusals(tasks: list[Path], tmp_path: Path) -> None:
    with pytest.raises(LoralloyError, match=r"2 tasks are given; pass --bank .* or --name"):
        train(tasks[:2], "model", tmp_path / "x")
    with pytest.raises(LoralloyError, match="'vowels' is given twice"):
        Mixture.of([tasks[0], tasks[0]], "all")
    with pytest.raises(LoralloyError, match="'echo' is the name of one of the tasks"):
        Mixture.of(tasks, "echo")
    with pytest.raises(LoralloyError, match="no task is given"):
        Mixture.of([], "all")
    with pytest.raises(LoralloyError, match=r"task 'vowels': .*raise --max-length"):
        Mixture.of(tasks, "all").encode(TOKENIZER, TrainConfig(max_length=28))
    assert not list(tmp_path.iterdir())


def test_one_task_is_a_mixture_of_one(tasks: list[Path]) -> None:
    assert Mixture.of(tasks[0]).single and Mixture.of(tasks[0].parent).name == "vowels"
    assert not Mixture.of(tasks[0], "other").single


def test_metrics_and_card_are_by_task(
    tasks: list[Path],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from loralloy.cli import main

    output = tmp_path / "multi"
    words = ["train", *map(str, tasks), "--name", "three", "-m", str(model_folder), "-o", str(output), "--limit", "20"]
    words += ["--epochs", "1", "--batch-size", "8", "--device", "cpu", "--dtype", "float32", "--eval-limit", "6"]
    monkeypatch.setattr(sys, "argv", ["loralloy", *words])
    with pytest.raises(SystemExit) as leave:
        main()
    assert not leave.value.code
    out, err = capsys.readouterr()
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["task"] == "three" and list(metrics["tasks"]) == ["vowels", "consonants", "echo"]
    assert "validation" not in metrics["tasks"]["consonants"] and "test" not in metrics["tasks"]["echo"]
    for split, names in {"test": ("vowels", "consonants"), "validation": ("vowels", "echo")}.items():
        mean = metrics["mean"][split]
        assert mean["tasks"] == 2
        for who in ("adapter", "base", "base_best_format"):
            entries = [metrics["tasks"][name][split][who] for name in names]
            assert mean[who] == pytest.approx(sum(e["accuracy"] for e in entries) / 2)
            assert {e["n"] for e in entries} == {6}
    recorded = Adapter.load(output).provenance["training"]
    assert recorded["task"] == "three" and recorded["rows"] == sum(t["rows"] for t in recorded["tasks"].values())
    assert (
        recorded["tasks"]["echo"] | {"source": "an echo", "licence": "MIT", "truncated": 0} == recorded["tasks"]["echo"]
    )
    card = (output / "README.md").read_text()
    assert "| echo | 20 | an echo | MIT |" in card and "--name three" in card and "| mean of 2 tasks |" in card
    assert "consonants" in out and "mean" in out and "three: consonants accuracy" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["multi"]
