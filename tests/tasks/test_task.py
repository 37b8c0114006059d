"""Task files: rendering, scaffolding, sources, and every error message."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loralloy.errors import LoralloyError
from loralloy.tasks import Example, Task, load_tasks

SPEC: dict[str, Any] = {
    "version": 1,
    "name": "toy",
    "hint": "Spam or ham?",
    "columns": [{"name": "text", "prefix": "Message: "}],
    "answer": "label",
    "labels": ["spam", "ham"],
    "source": {"path": "toy.jsonl"},
    "splits": {"test": 2, "validation": 1, "train": 3, "seed": 0},
}
ROWS = [{"text": f"message {n}", "label": "spam" if n % 2 else "ham"} for n in range(8)]


def write(folder: Path, rows: list[Any] | None = None, file: str = "toy.yaml", drop: str = "", **changes: Any) -> Task:
    """A task file and its data in `folder`, with fields replaced by `changes` or dropped; loads it."""
    spec = {key: value for key, value in {**SPEC, **changes}.items() if key != drop}
    (folder / file).write_text(yaml.safe_dump(spec), encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows))
    (folder / "toy.jsonl").write_text(lines, encoding="utf-8")
    return Task.load(folder / file)


def fails(pattern: str) -> Any:
    return pytest.raises(LoralloyError, match=pattern)


def test_examples_are_rendered_and_stable(tmp_path: Path) -> None:
    task = write(tmp_path)
    tests = task.examples("test")
    assert [example.id for example in tests] == ["toy/test/0", "toy/test/1"]
    example = tests[0]
    assert isinstance(example, Example) and example.options == ("spam", "ham") and example.task == "toy"
    assert example.prompt == f"Spam or ham?\nMessage: {example.raw}\nAnswer:"
    assert example.query == f"Spam or ham?\nMessage: {example.raw}"
    assert example.answer == next(row["label"] for row in ROWS if row["text"] == example.raw)
    assert task.examples("test", limit=1) == tests[:1] and task.examples("test", limit=0) == []
    assert [len(task.examples(name)) for name in ("test", "validation", "train")] == [2, 1, 3]
    assert write(tmp_path, ROWS[::-1]).examples("train") == task.examples("train")


def test_columns_separator_and_cue(tmp_path: Path) -> None:
    columns = [{"name": "passage"}, {"name": "question", "prefix": "Q: "}]
    task = write(tmp_path, columns=columns, separator=" | ", cue="A: ", hint="")
    prompt, query, raw = task.render({"passage": " p ", "question": "q", "label": "never looked at"})
    assert (prompt, query, raw) == ("p | Q: q | A:", "p | Q: q", "p | q")
    with fails(r"task 'toy' has 2 columns \('passage', 'question'\); use Task.render"):
        task.scaffold("p")
    assert write(tmp_path, cue="", hint="").render({"text": "x"}).prompt == "Message: x"


@given(st.text(min_size=1).filter(str.strip), st.text())
def test_no_answer_reaches_prompt_query_or_raw(text: str, answer: str) -> None:
    task = Task.from_dict(SPEC)
    assert task.render({"text": text, "label": answer}) == task.render({"text": text})


def test_scaffold_adds_what_is_missing() -> None:
    task = Task.from_dict(SPEC)
    expected = task.render({"text": "hi there"}).prompt
    for text in (
        "hi there",
        " hi there\n",
        "Message: hi there",
        "spam or ham? hi there",
        "Spam or ham?\nMessage: hi there",
    ):
        assert task.scaffold(text) == expected
    for text in ("", "  ", "Spam or ham?"):
        with fails("task 'toy': the text is empty; give the text to answer about"):
            task.scaffold(text)


def test_template_hash_follows_the_template_alone() -> None:
    base = Task.from_dict(SPEC).template_hash()
    assert re.fullmatch(r"[0-9a-f]{64}", base)
    assert Task.from_dict({**SPEC, "name": "other", "labels": ["a", "b"], "licence": "x"}).template_hash() == base
    changes = [{"hint": "x"}, {"cue": "x"}, {"separator": " "}, {"columns": [{"name": "text"}]}]
    hashes = {Task.from_dict({**SPEC, **change}).template_hash() for change in changes}
    assert len(hashes | {base}) == 5


def test_to_dict_reads_back() -> None:
    spec = Task.from_dict({**SPEC, "data": "somewhere"}).to_dict()
    assert spec["data"] == "somewhere" and Task.from_dict(spec).to_dict() == spec


def test_options_of_each_row_in_jsonl_and_csv(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": "yes", "choices": ["yes", f"no {n}"]} for n in range(8)]
    task = write(tmp_path, rows, drop="labels", options="choices")
    example = task.examples("train")[0]
    assert example.options == ("yes", "no " + example.raw[1:]) and example.answer == "yes"
    body = "text,label,choices\n" + "".join(f't{n},yes,"[""yes"", ""no {n}""]"\n' for n in range(8))
    (tmp_path / "toy.csv").write_text(body, encoding="utf-8-sig")
    same = write(tmp_path, drop="labels", options="choices", source={"path": "toy.csv"})
    assert same.examples("train") == task.examples("train")


def test_free_text_has_no_options(tmp_path: Path) -> None:
    task = write(tmp_path, [{"text": f"t{n}", "label": n} for n in range(8)], drop="labels")
    example = task.examples("train")[0]
    assert example.options == () and example.answer == example.raw[1:]  # numbers are written out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colums": []}, "unknown field `colums`; known here: version, name, family, hint, columns, .*licence, data"),
        ({"splits": {"tests": 3}}, "unknown field `splits.tests`; known here: test, validation, train, seed"),
        ({"columns": [{"nam": "x", "name": "y"}]}, r"unknown field `columns\[0\].nam`; known here: name, prefix"),
        ({"labels": [True, False]}, r"`labels\[0\]` must be text, not True; quote it"),
        ({"labels": ["a"]}, "`labels` needs at least two entries"),
        ({"labels": ["a", "a"]}, "`labels` names an entry twice"),
        ({"labels": ["a", "b "]}, "`labels` has an entry that is empty or has white space"),
        ({"options": "choices"}, "`labels` and `options` are both given"),
        ({"labels": [], "options": "label"}, "options column 'label' is also used"),
        ({"columns": [{"name": "label"}]}, "answer column 'label' is also in `columns`"),
        ({"columns": [{"name": "a"}, {"name": "a"}]}, "`columns` names a column twice"),
        ({"columns": []}, "`columns`: .*at least 1 item"),
        ({"name": "My Task"}, "`name` is 'My Task'; use lower-case letters"),
        ({"splits": {"test": -1}}, "`splits.test`: .*greater than or equal to 0"),
        ({"splits": {"test": 3.5}}, "`splits.test`: .*integer"),
        ({"version": 2}, "version 2 is not known to this loralloy .* upgrade"),
        ({"version": None}, "no `version`; add `version: 1`"),
    ],
)
def test_wrong_fields_are_named_with_the_file(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with fails(r"toy\.yaml: .*" + message):
        write(tmp_path, **changes)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    with fails("field `answer` is missing"):
        write(tmp_path, drop="answer")


def test_files_that_are_no_task_files(tmp_path: Path) -> None:
    with fails("no such task file"):
        Task.load(tmp_path / "none.yaml")
    for text, message in (("- a", "not a list"), ("", "not empty"), ("a: [", "not YAML")):
        (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
        with fails(r"x\.yaml: .*" + message):
            Task.load(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "a", "label": "ham"}, "line 9: no column 'text'; its columns are 'txt', 'label'"),
        ({"text": "a"}, "line 9: no column 'label'"),
        ({"text": " ", "label": "ham"}, "line 9: column 'text' is empty; fill it or remove the row"),
        ({"text": None, "label": "ham"}, "line 9: column 'text' is empty"),
        ({"text": ["a"], "label": "ham"}, "column 'text' holds a list, not text"),
        ({"text": "a", "label": True}, "column 'label' holds a bool, not text"),
        ({"text": "a", "label": ""}, "answer column 'label' is empty"),
        ({"text": "a", "label": "eggs"}, r"label is 'eggs', not among `labels` \(spam, ham\); add or correct it"),
        ({"text": "Message  1", "label": "ham"}, r"1 text\(s\) appear with two different answers"),
        ("a", "line 9: a str; each line is one JSON object"),
    ],
)
def test_wrong_rows_are_named_with_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    with fails("^task 'toy': .*" + message):
        write(tmp_path, [*ROWS, row]).examples("test")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("yes", "must hold a list of texts"),
        ([1, 2], "must hold a list of texts"),
        (["yes"], "column 'choices' needs at least two entries"),
        (["no", "maybe"], r"label is 'yes', not among the row's 'choices' \(no, maybe\)"),
    ],
)
def test_wrong_options_of_a_row(tmp_path: Path, choices: Any, message: str) -> None:
    task = write(tmp_path, [{"text": "a", "label": "yes", "choices": choices}], drop="labels", options="choices")
    with fails(message):
        task.examples("test")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("x.jsonl", b'{"text": 1', r"x\.jsonl, line 1: not JSON"),
        ("x.jsonl", b"\xff\xfe", r"x\.jsonl: not UTF-8 text .* save it as UTF-8"),
        ("x.csv", b"", r"x\.csv: no header line"),
        ("x.csv", b"text,text\n", "names a column twice .'text'."),
        ("x.csv", b"text,label\na,b,c\n", "line 2: 3 cells but the header has 2; put cells"),
        ("x.txt", b"", r"source files end in \.jsonl, \.csv, \.tsv or \.parquet, not '\.txt'"),
    ],
)
def test_wrong_data_files(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with fails(message):
        write(tmp_path, source={"path": file}).examples("test")


def test_missing_data_names_the_command_or_the_field(tmp_path: Path) -> None:
    with fails(r"data file .*gone\.jsonl is missing; correct `source.path` in .*toy\.yaml"):
        write(tmp_path, source={"path": "gone.jsonl"}).examples("test")
    with fails(r"is missing; build it with `python -m loralloy.tasks.packaged --out .*data --tasks sms_spam`"):
        write(tmp_path, source={"path": "data/sms_spam.jsonl"}).examples("test")


def test_too_few_rows_name_the_task(tmp_path: Path) -> None:
    with fails("task 'toy': 2 different texts are too few"):
        write(tmp_path, ROWS[:2]).examples("train")


def test_unknown_split_and_limit(tmp_path: Path) -> None:
    with fails("task 'toy': no split 'dev'; there are test, validation, train"):
        write(tmp_path).examples("dev")  # type: ignore[arg-type]
    with fails("limit is -1"):
        write(tmp_path).examples("test", limit=-1)


def test_load_tasks(tmp_path: Path) -> None:
    with fails("no task files"):
        load_tasks(tmp_path)
    with fails("no task files given"):
        load_tasks([])
    write(tmp_path, file="b.yaml", name="b")
    write(tmp_path, file="a.yml", name="a")
    assert [task.name for task in load_tasks(tmp_path)] == ["a", "b"]
    assert [task.name for task in load_tasks([tmp_path / "b.yaml", str(tmp_path / "a.yml")])] == ["b", "a"]
    assert load_tasks(tmp_path / "b.yaml")[0].path == tmp_path / "b.yaml"
    write(tmp_path, file="c.yaml", name="a")
    with fails(r"c\.yaml: the task name 'a' is taken by .*a\.yml; rename one"):
        load_tasks(tmp_path)
