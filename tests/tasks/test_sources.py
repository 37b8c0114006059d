"""Sources: files and data sets with their own splits, label maps, answers as places, paths into a row."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from loralloy.errors import LoralloyError
from loralloy.tasks import Task

SPLITS: tuple[Any, ...] = ("test", "validation", "train")
SPEC: dict[str, Any] = {
    "version": 1,
    "name": "toy",
    "columns": [{"name": "text"}],
    "answer": "label",
    "labels": ["a", "b"],
    "source": {"path": "x.jsonl"},
    "splits": {"test": 2, "validation": 1, "train": None, "seed": 0},
}
ROWS = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(8)]


def write(folder: Path, **changes: Any) -> Task:
    spec = {key: value for key, value in {**SPEC, **changes}.items() if value is not None}
    (folder / "toy.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    return Task.load(folder / "toy.yaml")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def fails(pattern: str) -> Any:
    return pytest.raises(LoralloyError, match=pattern)


def texts(task: Task, split: Any) -> list[str]:
    return sorted(example.raw for example in task.examples(split))


def test_tsv_and_parquet_hold_what_jsonl_holds(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{**row, "text": row["text"] + ' "quoted'} for row in ROWS]
    jsonl(tmp_path / "x.jsonl", rows)
    lines = ["text\tlabel", *(f"{row['text']}\t{row['label']}" for row in rows)]
    (tmp_path / "x.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    expected = write(tmp_path).examples("train")
    assert len(expected) == 5
    for name in ("x.tsv", "x.parquet"):
        assert write(tmp_path, source={"path": name}).examples("train") == expected
    (tmp_path / "x.tsv").write_text("text\tlabel\na\tb\tc\n", encoding="utf-8")
    with fails(r"x\.tsv, line 2: 3 cells but the header has 2; no cell of a \.tsv file can hold a tab"):
        write(tmp_path, source={"path": "x.tsv"}).rows()
    (tmp_path / "x.parquet").write_bytes(b"no")
    with fails(r"x\.parquet: cannot be read as Parquet"):
        write(tmp_path, source={"path": "x.parquet"}).rows()


@pytest.mark.parametrize(
    ("source", "package"), [({"path": "x.parquet"}, "pyarrow"), ({"dataset": "./d", "split": "train"}, "datasets")]
)
def test_missing_packages_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: dict[str, str], package: str
) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with fails(r"`?pip install 'loralloy\[data\]'`"):
        write(tmp_path, source=source).rows()


def test_own_splits_of_files(tmp_path: Path) -> None:
    jsonl(tmp_path / "tr.jsonl", ROWS[:5])
    jsonl(tmp_path / "te.jsonl", ROWS[5:])
    files = {"train": "tr.jsonl", "test": "te.jsonl"}
    task = write(tmp_path, source={"files": files}, splits={"test": None, "validation": 2})
    assert texts(task, "test") == ["text 5", "text 6", "text 7"]
    assert len(task.examples("validation")) == 2  # cut from train by hash
    assert sorted(texts(task, "validation") + texts(task, "train")) == [f"text {n}" for n in range(5)]
    assert texts(write(tmp_path, source={"files": files}, splits={"test": 2, "validation": 2}), "test") != texts(
        task, "test"
    )
    with fails("`splits.validation` is null .*give a number of rows"):
        write(tmp_path, source={"files": files}, splits={"validation": None}).rows()
    jsonl(tmp_path / "va.jsonl", [{"text": "new", "label": "a"}])
    task = write(tmp_path, source={"files": {**files, "validation": "va.jsonl"}}, splits={"test": 9, "validation": 9})
    assert texts(task, "validation") == ["new"] and len(task.examples("train")) == 5 and len(task.examples("test")) == 3
    jsonl(tmp_path / "te.jsonl", [])
    with fails("task 'toy': no row is left in split 'test'; check `source`"):
        write(tmp_path, source={"files": files}).rows()
    with fails(r"task 'toy': the data file .*gone\.jsonl is missing; correct `source.files`"):
        write(tmp_path, source={"files": {**files, "test": "gone.jsonl"}}).rows()


def test_repeats_are_an_error_or_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = [*ROWS[:5], {"text": "TEXT 6", "label": "a"}, {"text": "two", "label": "a"}, {"text": "Two", "label": "b"}]
    jsonl(tmp_path / "tr.jsonl", train[:6])
    jsonl(tmp_path / "te.jsonl", ROWS[5:])
    source = {"files": {"train": "tr.jsonl", "test": "te.jsonl"}}
    with fails(r"own splits share texts \(1 of train, also in test\), e\.g\. 'text 6': .*`repeats: drop`"):
        write(tmp_path, source=source).rows()
    jsonl(tmp_path / "tr.jsonl", train)
    with fails(r"split 'train': 1 text\(s\) appear with two different answers"):
        write(tmp_path, source=source).rows()
    task = write(tmp_path, source={**source, "repeats": "drop"}, splits={"test": None, "validation": 1})
    assert texts(task, "test") == ["text 5", "text 6", "text 7"]
    assert sorted(texts(task, "train") + texts(task, "validation")) == [f"text {n}" for n in range(5)]
    said = ("1 text(s) left out (train, two answers)", "1 text(s) left out (train, also in test)")
    assert task.remarks == said
    assert all(f"task toy: {line}" in capsys.readouterr().err for line in said[:1])
    jsonl(tmp_path / "x.jsonl", [*ROWS, {"text": "text 0", "label": "b"}])
    task = write(tmp_path, source={"path": "x.jsonl", "repeats": "drop"})
    assert sum(map(len, task.rows().values())) == 7 and task.remarks == ("1 text(s) left out (two answers)",)


def test_labels_may_be_a_map(tmp_path: Path) -> None:
    values = [0, 1, "2", False]
    jsonl(tmp_path / "x.jsonl", [{"text": f"t{n}", "label": values[n % 4]} for n in range(8)])
    task = write(tmp_path, labels={"0": "bad", 1: "good", 2: "bad", False: "good"})
    assert task.labels == ("bad", "good")
    answers = {e.raw: e.answer for split in SPLITS for e in task.examples(split)}
    assert answers == {f"t{n}": ("bad", "good", "bad", "good")[n % 4] for n in range(8)}
    assert Task.from_dict(task.to_dict()).to_dict() == task.to_dict()
    jsonl(tmp_path / "x.jsonl", [{"text": "t", "label": -1}])
    with fails(r"label is '-1', not among the values of `labels` \(0, 1, 2, false\)"):
        Task.load(tmp_path / "toy.yaml").rows()


@pytest.mark.parametrize(
    ("form", "answers"), [("index", [0, "1", 2, 0]), ("number", [1, 2, "3", 1]), ("letter", ["A", "b", "C", "A"])]
)
@pytest.mark.parametrize("options", ["c.text", ["one", "two", "c.text.2"]])
def test_answers_may_be_places(tmp_path: Path, form: str, answers: list[Any], options: Any) -> None:
    def row(n: int) -> dict[str, Any]:
        own = [f"x{n}", f"y{n}", f"z{n}"]
        return {"text": f"t{n}", "label": answers[n], "c": {"text": own}, "one": own[0], "two": own[1]}

    jsonl(tmp_path / "x.jsonl", [row(n) for n in range(4)])
    task = write(tmp_path, labels=None, options=options, answer_as=form)
    found = {e.raw: (e.answer, e.options) for s in SPLITS for e in task.examples(s)}
    assert found == {
        f"t{n}": (f"{letter}{n}", (f"x{n}", f"y{n}", f"z{n}")) for n, letter in enumerate(("x", "y", "z", "x"))
    }
    jsonl(tmp_path / "x.jsonl", [{**row(0), "label": {"index": 3, "number": 0, "letter": "D"}[form]}])
    with fails(rf"line 1: label is '.', no {form} of its 3 options; correct it or `answer_as`"):
        write(tmp_path, labels=None, options=options, answer_as=form).rows()


def test_an_answer_among_option_columns_does_not_show_by_its_place(tmp_path: Path) -> None:
    jsonl(tmp_path / "x.jsonl", [{"text": f"t{n}", "right": f"{7 * n % 5} r", "wrong": f"{n} w"} for n in range(6)])
    task = write(tmp_path, labels=None, answer="right", options=["right", "wrong"])
    for example in task.examples("train"):
        assert list(example.options) == sorted(example.options) and example.answer.endswith("r")


def test_several_right_answers_are_references(tmp_path: Path) -> None:
    jsonl(tmp_path / "x.jsonl", [{"text": f"t{n}", "a": {"text": ["one ", "two", "one"]}} for n in range(5)])
    example = write(tmp_path, labels=None, answer="a.text").examples("test")[0]
    assert (example.answer, example.references, example.options) == ("one", ("one", "two"), ())
    jsonl(tmp_path / "x.jsonl", [{"text": "t", "a": {"text": []}}])
    with fails("answer column 'a.text' is empty"):
        write(tmp_path, labels=None, answer="a.text").rows()
    with fails(r"no column 'a.txt'; its columns are 'text', 'a'"):
        write(tmp_path, labels=None, answer="a.txt").rows()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {}}, "give one of path, files, dataset"),
        ({"source": {"path": "x", "dataset": "y"}}, "`source` has path and dataset; give one"),
        ({"source": {"path": "x", "config": "y"}}, "`source.config` goes with `source.dataset`"),
        ({"source": {"dataset": "y"}}, "`source.dataset` needs either `splits: .* or `split: NAME`"),
        ({"source": {"files": {"train": "x"}}}, "`source.files` needs train and test"),
        ({"source": {"files": {"dev": "x"}}}, r"`source\.files\.dev"),
        ({"splits": {"test": None}}, "`splits.test` and `splits.validation` are numbers, unless"),
        ({"answer_as": "word"}, "`answer_as`"),
        (
            {"answer_as": "index", "labels": {"0": "a", "1": "b"}},
            "`answer_as: index` needs `labels` as a list, or `options`",
        ),
        ({"values": {"0": "c"}}, "`values` maps to a name that is not in `labels`"),
        ({"labels": None, "options": ["one"]}, r"`options` \(a list of columns\) needs at least two entries"),
    ],
)
def test_wrong_fields(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with fails(r"toy\.yaml: .*" + message):
        write(tmp_path, **changes)


def test_a_group_in_two_of_the_own_files_is_an_error(tmp_path: Path) -> None:
    rows = [{**row, "passage": f"Passage {n // 2}"} for n, row in enumerate(ROWS)]
    jsonl(tmp_path / "train.jsonl", rows[:5])
    jsonl(tmp_path / "test.jsonl", rows[5:])
    source = {"files": {"train": "train.jsonl", "test": "test.jsonl"}}
    splits = {"test": None, "validation": 1, "train": None, "seed": 0}
    assert len(write(tmp_path, source=source, splits=splits).examples("train")) == 4
    grouped = splits | {"group": "passage"}
    with fails(
        r"toy.*`splits.group`: 1 group\(s\) of train \(train.jsonl\) .* in test \(test.jsonl\), e.g. 'passage 2'"
    ):
        write(tmp_path, source=source, splits=grouped).examples("train")
    dropped = write(tmp_path, source=source | {"repeats": "drop"}, splits=grouped)
    found = {split: set(texts(dropped, split)) for split in SPLITS}
    assert found["test"] == {f"text {n}" for n in (5, 6, 7)}
    assert "text 4" not in found["train"] | found["validation"] and len(found["train"]) in (2, 3)
