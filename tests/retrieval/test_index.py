from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_tasks import WORDS, write_task

from loralloy.errors import LoralloyError
from loralloy.retrieval import HashEmbedder, Index
from loralloy.retrieval.manifest import Manifest


def rows_of(index: Index) -> dict:
    """Everything a store holds that a query can meet: ids, texts, and vectors by their bytes."""
    if index.manifest.store == "exact":
        store = index.store
        return {
            i: (store.texts([i])[0], v.tobytes())
            for t in store.tasks()
            for i, v in zip(store._ids[t], store._vectors[t], strict=True)
        }
    page = index.store._rows.get(include=["embeddings", "documents", "metadatas"])
    return {
        i: (d, e.tobytes(), m["task"])
        for i, d, e, m in zip(*(page[k] for k in ("ids", "documents", "embeddings", "metadatas")), strict=True)
    }


def folder_bytes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_build_search_reopen(kind, tasks, embedder, tmp_path):
    with Index.build(tmp_path / "i", tasks, embedder, kind) as index:
        assert index.names == sorted(WORDS) and len(index) == 3 * 48 and len(rows_of(index)) == 3 * 96
        ids, _, found = index.search(index.embed([tasks[0].examples("test")[0].query]), 10)
        assert set(found[0]) == {"spam"} and all(i.startswith("spam/train/") for i in ids[0])
        assert index.texts(ids[0][:1])[0].startswith("Which kind of spam is this?\nText: ")
    with Index.open(tmp_path / "i", embedder) as index:
        assert index.search(index.embed([tasks[0].examples("test")[0].query]), 10)[0] == ids
        assert set(index.search(index.embed(["free prize call"]), 10, exclude=["spam"])[2][0]) <= {"weather", "cooking"}
        assert set(index.search(index.embed(["free prize call"]), 10, only=["cooking"])[2][0]) == {"cooking"}
        with pytest.raises(LoralloyError, match="no task left"):
            index.search(index.embed(["x"]), 10, only=["nothing"])
        with pytest.raises(LoralloyError, match="empty"):
            index.embed(["  "])


@pytest.mark.parametrize("template", ["hinted", "raw"])
def test_answers_change_nothing(kind, embedder, tmp_path, template):
    """The index of a task with every answer changed is the same: ids, texts, vectors and manifest, byte for byte."""
    built = []
    for n, answers in enumerate(("ab", "ba", "b")):
        tasks = [write_task(tmp_path / str(n), name, answers=answers) for name in WORDS]
        with Index.build(tmp_path / f"index{n}", tasks, embedder, kind, rows=30, template=template) as index:
            built.append((rows_of(index), (tmp_path / f"index{n}" / "manifest.json").read_bytes()))
            if kind == "exact":
                built[-1] += (folder_bytes(tmp_path / f"index{n}"),)
    assert built[0] == built[1] == built[2]
    assert len(built[0][0]) == 90


def test_no_answer_and_no_cue_in_texts(embedder, tmp_path):
    task = write_task(tmp_path, "spam", labels=["GOLDEN", "SILVER"], answers=["GOLDEN", "SILVER"], cue="THECUE:")
    with Index.build(tmp_path / "i", [task], embedder, "exact") as index:
        texts = index.texts(index.store._ids["spam"])
    assert texts and not any(word in text for text in texts for word in ("GOLDEN", "SILVER", "THECUE"))


def test_only_training_rows(kind, tasks, embedder, tmp_path):
    with Index.build(tmp_path / "i", tasks, embedder, kind, template="raw") as index:
        indexed = {row[0] for row in rows_of(index).values()}
    held_out = {e.raw for task in tasks for split in ("test", "validation") for e in task.examples(split)}
    assert len(held_out) == 36 and not indexed & held_out
    assert indexed == {e.raw for task in tasks for e in task.examples("train")}


def test_seeded_choice_of_rows(tasks, embedder, tmp_path):
    def ids(folder, **options):
        with Index.build(tmp_path / folder, tasks, embedder, "exact", **options) as index:
            held = set(rows_of(index))
        plain = {i for i in held if not i.endswith("#raw")}
        assert held == plain | {f"{i}#raw" for i in plain}  # both vectors of a row, always
        return plain

    one, again, other = ids("1", rows=10), ids("2", rows=10), ids("3", rows=10, seed=1)
    assert one == again != other and len(one) == 30
    assert one < ids("4", rows=20)  # a larger index keeps the smaller one's rows


def test_one_task_at_a_time(kind, tasks, embedder, tmp_path):
    with Index.build(tmp_path / "i", tasks, embedder, kind) as index:
        before = rows_of(index)
        assert index.add(tasks[0]) is False  # nothing to do
        changed = write_task(tmp_path / "changed", "spam", hint="Another hint?")
        with pytest.raises(LoralloyError, match="another text template"):
            index.check_template([changed])
        assert index.add(changed) is True
        after = rows_of(index)
        hinted = {i for i in before if i.startswith("spam/") and not i.endswith("#raw")}
        assert {i for i in before if before[i] != after[i]} == hinted  # the raw texts have no hint
        index.check_template([changed])
        assert index.add(tasks[0]) is True and rows_of(index) == before
        index.remove("spam")
        assert rows_of(index) == {i: row for i, row in before.items() if not i.startswith("spam/")}
        with pytest.raises(LoralloyError, match="no task 'spam'"):
            index.remove("spam")
        assert index.add(tasks[0], force=True) and rows_of(index) == before


def test_cue_and_labels_change_without_embedding(tasks, tmp_path):
    class Counting(HashEmbedder):
        calls = 0

        def encode(self, texts, progress=False):
            type(self).calls += 1
            return super().encode(texts, progress)

    with Index.build(tmp_path / "i", tasks, Counting(128), "exact") as index:
        assert Counting.calls == 3
        assert index.add(write_task(tmp_path / "new", "spam", cue="Now:", labels=["b", "a", "c"])) is False
        assert (
            Counting.calls == 3 and index.tasks["spam"].cue == "Now:" and index.tasks["spam"].labels == ("b", "a", "c")
        )


def test_manifest_scaffolds_like_the_task_file(tasks, embedder, tmp_path):
    Index.build(tmp_path / "i", tasks, embedder, "exact").close()
    entry = Manifest.load(tmp_path / "i").tasks["spam"]
    assert entry.scaffold("free call") == tasks[0].scaffold("free call")
    assert entry.template_hash == tasks[0].template_hash() == entry.to_task().template_hash()


def test_other_embedder_template_and_store_are_refused_by_name(tasks, embedder, tmp_path):
    Index.build(tmp_path / "i", tasks, embedder, "exact").close()
    other = HashEmbedder(128, salt="other")
    for attempt in (
        lambda: Index.open(tmp_path / "i", other),
        lambda: Index.build(tmp_path / "i", tasks, other, "exact"),
    ):
        with pytest.raises(LoralloyError, match=rf"{embedder.identity}, not {other.identity}.*--embedder"):
            attempt()
    with pytest.raises(LoralloyError, match=r"template 'both', not 'raw'.*--overwrite"):
        Index.open(tmp_path / "i", embedder, template="raw")
    with pytest.raises(LoralloyError, match="template 'both', not 'raw'"):
        Index.build(tmp_path / "i", tasks, embedder, "exact", template="raw")
    with pytest.raises(LoralloyError, match="store 'exact', not 'chroma'"):
        Index.build(tmp_path / "i", tasks, embedder, "chroma")
    with Index.build(tmp_path / "i", tasks[:1], other, "exact", template="raw", overwrite=True) as index:
        assert index.names == ["spam"] and index.manifest.template == "raw"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_errors_name_the_way_out(tasks, embedder, tmp_path):
    with pytest.raises(LoralloyError, match="no index here; build one with `loralloy index"):
        Index.open(tmp_path / "none", embedder)
    with pytest.raises(LoralloyError, match="not an index and not empty"):
        Index.build(tmp_path / "tasks", tasks, embedder, "exact", overwrite=True)
    with pytest.raises(LoralloyError, match="two tasks are named 'spam'"):
        Index.build(tmp_path / "i", [tasks[0], tasks[0]], embedder, "exact")
    with pytest.raises(LoralloyError, match="known: chroma, exact"):
        Index.build(tmp_path / "i", tasks, embedder, "faiss")
    with pytest.raises(LoralloyError, match="known: both, hinted, raw"):
        Index.build(tmp_path / "i", tasks, embedder, "exact", template="full")
    with pytest.raises(LoralloyError, match="rows is 0"):
        Index.build(tmp_path / "i", tasks, embedder, "exact", rows=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m.update(version=2), "expected `version: 1`, found 2"),
        (lambda m: m.pop("embedder"), "embedder"),
        (lambda m: m["tasks"]["spam"].pop("rows"), "rows"),
        (lambda m: m["tasks"]["spam"].update(rows=7), "'spam' has 96 vectors, its manifest says 96 of 7 rows"),
        (lambda m: m.update(store="faiss"), "store is 'faiss'"),
    ],
)
def test_damaged_manifest(tasks, embedder, tmp_path, damage, message):
    Index.build(tmp_path / "i", tasks, embedder, "exact").close()
    path = tmp_path / "i" / "manifest.json"
    manifest = json.loads(path.read_text())
    damage(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(LoralloyError, match=message):
        Index.open(tmp_path / "i", embedder)


def test_locks(kind, tasks, embedder, tmp_path):
    first = Index.build(tmp_path / "i", tasks[:1], embedder, kind)
    second = Index.open(tmp_path / "i", embedder)  # readers share
    with pytest.raises(LoralloyError, match="open elsewhere"):
        first.add(tasks[1])
    assert first.names == ["spam"]
    with pytest.raises(LoralloyError, match="open elsewhere"):
        Index.build(tmp_path / "i", tasks, embedder, kind, overwrite=True)
    second.close()
    first.add(tasks[1])
    first._lock.exclusive()
    with pytest.raises(LoralloyError, match="being written elsewhere"):
        Index.open(tmp_path / "i", embedder)
    first.close()
    with Index.open(tmp_path / "i", embedder) as index:
        assert index.names == ["spam", "weather"]


CHILD = """
import sys, time
from pathlib import Path
from loralloy.retrieval import HashEmbedder, Index
from loralloy.retrieval import index as module
from loralloy.tasks import load_tasks

folder, kind, moment, only = sys.argv[1:5]
count = 0

def reached(name):
    global count
    if name == moment:
        count += 1
        if count == int(sys.argv[5]):
            print("here", flush=True)
            time.sleep(60)

class Slow(HashEmbedder):
    def encode(self, texts, progress=False):
        reached("embed")
        return super().encode(texts, progress)

def watched(cls):
    add, remove = cls.add, cls.remove
    def slow_add(self, *args):
        add(self, *args)
        reached("added")
    def slow_remove(self, *args):
        remove(self, *args)
        reached("removed")
    cls.add, cls.remove = slow_add, slow_remove

if kind == "chroma":
    from loralloy.retrieval import chroma
    watched(chroma.ChromaStore)
    chroma.BATCH = 16
    inner = chroma.ChromaStore._drop
    import chromadb.api.models.Collection as C
    upsert = C.Collection.upsert
    def slow_upsert(self, *args, **kw):
        upsert(self, *args, **kw)
        reached("batch")
    C.Collection.upsert = slow_upsert
else:
    watched(module.ExactStore)
save = module.Manifest.save
def slow_save(self, folder):
    save(self, folder)
    reached("saved")
module.Manifest.save = slow_save
Index.build(folder, load_tasks(only), Slow(128), kind).close()
"""


def kill_at(tmp_path: Path, kind: str, moment: str, tasks: Path, nth: int) -> None:
    """Run a build in another process and SIGKILL it when it has done `moment` for the n-th time."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "i"), kind, moment, str(tasks), str(nth)]
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "here\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize(
    ("moment", "nth", "counted"), [("embed", 2, 1), ("added", 2, 1), ("batch", 8, 1), ("saved", 1, 0), ("saved", 3, 2)]
)
def test_kill_while_building(kind, tasks, embedder, tmp_path, moment, nth, counted):
    if moment == "batch" and kind == "exact":
        pytest.skip("an exact store adds a task in one step")
    kill_at(tmp_path, kind, moment, tmp_path / "tasks", nth)
    order = [task.name for task in sorted(tasks, key=lambda task: task.name)]
    assert list(Manifest.load(tmp_path / "i").tasks) == order[:counted]
    with Index.open(tmp_path / "i", embedder) as index:  # what is not committed is not met
        assert index.names == order[:counted]
        if counted:
            found = index.search(index.embed([tasks[0].examples("test")[0].query]), 40)[2][0]
            assert len(found) == 40 and set(found) <= set(order[:counted])
    with Index.build(tmp_path / "i", tasks, embedder, kind) as index:
        finished = rows_of(index)
    with Index.build(tmp_path / "clean", tasks, embedder, kind) as index:
        assert finished == rows_of(index)
    left = {"manifest.json", ".lock", kind}
    assert {p.name for p in (tmp_path / "i").iterdir()} == left


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize("moment", ["saved", "embed", "added"])
def test_kill_while_replacing(kind, tasks, embedder, tmp_path, moment):
    Index.build(tmp_path / "i", tasks, embedder, kind).close()
    changed = write_task(tmp_path / "changed", "spam", hint="Another hint?")
    kill_at(tmp_path, kind, moment, tmp_path / "changed", 1)
    with Index.open(tmp_path / "i", embedder) as index:
        assert index.names == ["cooking", "weather"]
        assert "spam" not in index.search(index.embed(["free prize call"]), 90)[2][0]
    with Index.build(tmp_path / "i", [changed], embedder, kind) as index:
        assert index.names == sorted(WORDS)
        assert index.texts(["spam/train/0"])[0].startswith("Another hint?")
        assert len(rows_of(index)) == 3 * 96


def test_stray_rows_are_cleared_by_any_writer(kind, tasks, embedder, tmp_path):
    with Index.build(tmp_path / "i", tasks[:2], embedder, kind) as index:
        index.store.add("stray", ["stray/train/0"], embedder.encode(["free prize call"]), ["free prize call"])
        assert "stray" not in index.search(index.embed(["free prize call"]), 200)[2][0]
        index.remove("weather")
        assert index.store.tasks() == {"spam": 96}


def test_light_import():
    modules = "loralloy.retrieval, loralloy.weighting, loralloy.cli.index, loralloy.cli.route"
    code = f"import sys, {modules}; print(*sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    heavy = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert not {"chromadb", "sentence_transformers", "transformers", "torch", "matplotlib"} & set(heavy.split())


def test_an_index_keeps_its_template(tasks, embedder, tmp_path):
    with Index.build(tmp_path / "i", tasks[:1], embedder, "exact", template="hinted") as index:
        assert index.manifest.template == "hinted"
    with Index.build(tmp_path / "i", tasks, embedder, "exact") as index:  # no template named: the one it has
        assert index.manifest.template == "hinted" and len(index.names) == len(tasks)
    with Index.build(tmp_path / "new", tasks[:1], embedder, "exact") as index:
        assert index.manifest.template == "both"
