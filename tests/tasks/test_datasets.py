"""Hugging Face data sets, through the real `datasets.load_dataset` on local folders; and the paper's 22 tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from loralloy.errors import LoralloyError
from loralloy.tasks import Task, load_tasks

datasets = pytest.importorskip("datasets")
PAPER = Path(__file__).resolve().parents[2] / "examples" / "paper" / "tasks"


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def task_at(folder: Path, spec: dict[str, Any]) -> Task:
    (folder / "toy.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    return Task.load(folder / "toy.yaml")


def parquet(folder: Path, parts: dict[str, list[dict[str, Any]]], classes: dict[str, list[str]] | None = None) -> None:
    """A data set's folder: a Parquet file a split, `classes` as class labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in parts.items():
        data = datasets.Dataset.from_list(rows)
        for column, names in (classes or {}).items():
            data = data.cast_column(column, datasets.ClassLabel(names=names))
        data.to_parquet(folder / f"{split}.parquet")


TOY: dict[str, Any] = {
    "version": 1,
    "name": "toy",
    "columns": [{"name": "text"}],
    "answer": "label",
    "labels": ["neg", "pos"],
    "source": {"dataset": "./d", "splits": {"train": "train", "test": "test"}},
    "splits": {"test": None, "validation": 1, "train": None},
}


def test_class_labels_become_names_or_go_through_the_map(tmp_path: Path) -> None:
    parts = {split: [{"text": f"{split} {n}", "label": n % 2} for n in range(4)] for split in ("train", "test")}
    parquet(tmp_path / "d", parts, {"label": ["neg", "pos"]})
    task = task_at(tmp_path, TOY)
    assert {e.raw: e.answer for e in task.examples("test")} == {f"test {n}": ("neg", "pos")[n % 2] for n in range(4)}
    assert (len(task.examples("train")), len(task.examples("validation"))) == (3, 1)
    mapped = task_at(tmp_path, {**TOY, "labels": {0: "bad", 1: "good"}})
    assert {e.raw: e.answer for e in mapped.examples("test")} == {f"test {n}": ("bad", "good")[n % 2] for n in range(4)}
    one = task_at(
        tmp_path, {**TOY, "source": {"dataset": "./d", "split": "test"}, "splits": {"test": 1, "validation": 1}}
    )
    assert sum(map(len, one.rows().values())) == 4  # one split, divided by hash
    unlabelled = {**parts, "test": [{"text": "hidden", "label": -1}]}
    parquet(tmp_path / "d", unlabelled, {"label": ["neg", "pos"]})
    with pytest.raises(LoralloyError, match=r"data set \./d, split 'test', row 0: label is '-1', not among `labels`"):
        task_at(tmp_path, TOY).rows()


def test_errors_name_the_set_and_its_split(tmp_path: Path) -> None:
    parquet(tmp_path / "d", {"train": [{"text": "a", "label": "neg"}]})
    with pytest.raises(LoralloyError, match=r"task 'toy': data set \./d, split 'test': ValueError: .*check its id"):
        task_at(tmp_path, TOY).rows()
    gone = {**TOY["source"], "dataset": "./gone"}
    with pytest.raises(
        LoralloyError, match=r"data set \./gone, split 'test': .*Error: .*check its id, config, revision"
    ):
        task_at(tmp_path, {**TOY, "source": gone}).rows()


PAIR = ("sentence1", "sentence2")
# Rows as the hub's sets hold them: (fields, the answer column's values, their class names if it is a ClassLabel).
ABCDE = ["A", "B", "C", "D", "E"]
SCHEMA: dict[str, tuple[list[str] | dict[str, Any], list[Any], list[str] | None]] = {
    "commonsense_qa": ({"question": "q", "choices": {"label": ABCDE, "text": list("vwxyz")}}, ABCDE, None),
    "obqa": ({"question_stem": "q", "choices": {"text": list("wxyz"), "label": ABCDE[:4]}}, ABCDE[:4], None),
    "piqa": (["goal", "sol1", "sol2"], [0, 1], ["0", "1"]),
    "copa": (["premise", "question", "choice1", "choice2"], [0, 1], None),
    "cosmos_qa": (["context", "question", "answer0", "answer1", "answer2", "answer3"], [0, 1, 2, 3], None),
    "record": ({"passage": "p", "query": "q", "entities": ["x", "y"]}, [["x"], ["y", "x"]], None),
    "imdb": (["text"], [0, 1], ["neg", "pos"]),
    "yelp": (["text"], [0, 1, 2, 3, 4], ["1 star", "2 star", "3 stars", "4 stars", "5 stars"]),
    "mrpc": ([*PAIR], [0, 1], ["not_equivalent", "equivalent"]),
    "multirc": (["paragraph", "question", "answer"], [0, 1], ["False", "True"]),
    "squad": (["context", "question"], [{"text": ["x", "y"], "answer_start": [0, 4]}], None),
    "boolq": (["question", "passage"], [True, False], None),
    "paws": ([*PAIR], [0, 1], ["0", "1"]),
    "qqp": (["question1", "question2"], [0, 1], ["not_duplicate", "duplicate"]),
    "rte": (["premise", "hypothesis"], [0, 1], ["entailment", "not_entailment"]),
    "cb": (["premise", "hypothesis"], [0, 1, 2], ["entailment", "contradiction", "neutral"]),
    "mnli": (["premise", "hypothesis"], [0, 1, 2], ["entailment", "neutral", "contradiction"]),
    "anli_r3": (["premise", "hypothesis"], [0, 1, 2], ["entailment", "neutral", "contradiction"]),
    "wnli": (["text1", "text2"], [0, 1], None),
    "wic": (["word", *PAIR], [0, 1], ["False", "True"]),
    "hellaswag": ({"ctx": "c", "endings": list("wxyz")}, ["0", "1", "2", "3"], None),
    "story_cloze": ({"prompt": "p", "rejected": "wrong"}, ["right"], None),
}
GOLD = {
    "commonsense_qa": "A", "obqa": "A", "piqa": "A", "copa": "A", "cosmos_qa": "A", "record": "x", "imdb": "negative",
    "yelp": "1", "mrpc": "not equivalent", "multirc": "No", "squad": "x", "boolq": "True", "paws": "No", "qqp": "No",
    "rte": "entailment", "cb": "entailment", "mnli": "entailment", "anli_r3": "entailment", "wnli": "not entailment",
    "wic": "no", "hellaswag": "A", "story_cloze": "right",
}  # fmt: skip
"""The answer's text for the first of the values above."""


def rows_like(name: str, split: str, count: int = 6) -> list[dict[str, Any]]:
    """Rows in the schema of the task's set, each with texts of its own; the first has the first answer value."""
    fields, answers, _ = SCHEMA[name]
    template = fields if isinstance(fields, dict) else dict.fromkeys(fields, "text")
    answer = yaml.safe_load((PAPER / f"{name}.yaml").read_text(encoding="utf-8"))["answer"].split(".")[0]
    rows = []
    for n in range(count):
        row = {
            key: f"{value} {key} {split} {n}" if isinstance(value, str) else value for key, value in template.items()
        }
        rows.append({**row, answer: answers[n % len(answers)]})
    return rows


def test_the_papers_tasks_are_there() -> None:
    tasks = load_tasks(PAPER)
    assert len(tasks) == 22 and {task.name for task in tasks} == SCHEMA.keys()
    assert all(task.source.dataset and task.family and task.licence and task.data_source for task in tasks)
    assert all("answer" not in (column.prefix for column in task.columns) for task in tasks)


@pytest.mark.parametrize("name", sorted(SCHEMA))
def test_a_paper_task_reads_rows_of_its_sets_schema(name: str, tmp_path: Path) -> None:
    """The task file as shipped, its data set's id replaced by a local folder of the same schema."""
    spec = yaml.safe_load((PAPER / f"{name}.yaml").read_text(encoding="utf-8"))
    classes = SCHEMA[name][2]
    own = spec["source"]["splits"]
    data = {split: datasets.Dataset.from_list(rows_like(name, split)) for split in own.values()}
    if classes is not None:
        data = {
            split: part.cast_column(spec["answer"], datasets.ClassLabel(names=classes)) for split, part in data.items()
        }
    folder = tmp_path / "data"
    for split, part in data.items():  # one folder a split, as config files on the hub name them
        (folder / split).mkdir(parents=True)
        part.to_parquet(folder / split / "0.parquet")
    config = {"config_name": "x", "data_files": [{"split": split, "path": f"{split}/*.parquet"} for split in data]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [config]})}---\n", encoding="utf-8")
    source = {**spec["source"], "dataset": "./data", "config": "x"}
    source.pop("revision", None)
    task = task_at(tmp_path, {**spec, "source": source, "splits": {**spec["splits"], "validation": 2}})
    tests = task.examples("test")
    assert len(tests) == 6 and len(task.examples("validation")) == 2 and task.examples("train")
    assert len(task.examples("train")) == (6 if "validation" in own else 4) and not task.remarks
    first = next(e for e in tests if f"{own['test']} 0" in e.raw)
    assert first.answer == GOLD[name] and (not first.options or first.answer in first.options)
    for example in tests:
        assert example.prompt.endswith(task.cue) and not example.prompt.endswith(example.answer)
        for column in task.columns:
            assert column.prefix in example.prompt
    if name == "squad":
        assert first.references == ("x", "y") and first.options == ()
    if name == "story_cloze":
        assert list(first.options) == sorted(first.options)
