"""A few examples: what is read, what is refused by file and line, and a balanced draw from tasks."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from loralloy.errors import LoralloyError
from loralloy.tasks.few import draw_few, read_few

sys.path.insert(0, str(Path(__file__).parents[1] / "retrieval"))

from small_tasks import write_task


def write(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


GOOD = {"prompt": "Is it?\nAnswer:", "answer": "yes", "options": ["yes", "no"], "domain": "d"}


def test_rows_are_examples(tmp_path):
    free = {"prompt": "Say it. ", "answer": " it ", "domain": "e"}
    one, two = read_few(write(tmp_path / "b.jsonl", GOOD, free))
    assert (one.task, one.prompt, one.answer, one.options) == ("d", "Is it?\nAnswer:", "yes", ("yes", "no"))
    assert (two.task, two.prompt, two.answer, two.options) == ("e", "Say it.", "it", ())
    assert one.id != two.id
    csv = tmp_path / "b.csv"
    csv.write_text('prompt,answer,options\n"a?",x,"[""x"", ""y""]"\nb?,z,\n')
    one, two = read_few(csv)
    assert (one.options, two.options, one.task) == (("x", "y"), (), "")


def test_unlabelled(tmp_path):
    path = write(tmp_path / "b.jsonl", {"prompt": "a", "options": ["x", "y"]}, {"prompt": "b", "answer": "x"})
    assert [e.answer for e in read_few(path, labelled=False)] == ["", "x"]
    with pytest.raises(LoralloyError, match="line 1: no column 'answer'"):
        read_few(path)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"label": "x"}, "line 2: unknown column 'label'; its columns are prompt, answer, options, domain"),
        ({"answer": "maybe"}, r"line 2: the answer 'maybe' is not among the options \(yes, no\)"),
        ({"answer": ""}, "line 2: the answer is empty"),
        ({"prompt": " \n"}, "line 2: the prompt is empty"),
        ({"options": ["yes"]}, "line 2: column 'options' needs at least two"),
        ({"options": "yes or no"}, "line 2: column 'options' must hold a list"),
        ({"domain": ""}, "line 2: some rows have a domain and others have none"),
    ],
)
def test_refusals_name_the_line(tmp_path, row, says):
    path = write(tmp_path / "b.jsonl", GOOD, GOOD | row)
    with pytest.raises(LoralloyError, match=says) as error:
        read_few(path)
    assert str(path) in str(error.value)


def test_no_rows_and_no_file(tmp_path):
    with pytest.raises(LoralloyError, match="holds no examples"):
        read_few(write(tmp_path / "b.jsonl"))
    with pytest.raises(LoralloyError, match="no such file"):
        read_few(tmp_path / "other.jsonl")


def test_a_draw_is_balanced_seeded_and_of_training_rows(tmp_path):
    for name in ("spam", "weather"):
        write_task(tmp_path, name)
    drawn = draw_few(tmp_path, 3, seed=1)
    assert Counter((e.task, e.answer) for e in drawn) == {(t, a): 3 for t in ("spam", "weather") for a in ("a", "b")}
    assert all("/train/" in e.id for e in drawn) and len({e.id for e in drawn}) == 12
    assert drawn == draw_few(tmp_path, 3, seed=1) != draw_few(tmp_path, 3, seed=2)
    assert draw_few(tmp_path / "weather.yaml", 3, seed=1) == drawn[6:]
    with pytest.raises(LoralloyError, match=r"task 'spam' has \d+ training rows of class 'a', fewer than 40"):
        draw_few(tmp_path, 40)
    with pytest.raises(LoralloyError, match="per_class is 0"):
        draw_few(tmp_path, 0)
