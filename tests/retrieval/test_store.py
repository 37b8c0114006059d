from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from loralloy.errors import LoralloyError
from loralloy.retrieval.index import _open_store
from loralloy.retrieval.store import ExactStore


def unit(n: int, d: int = 16, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def fill(store, task: str, n: int = 50, seed: int = 0) -> np.ndarray:
    vectors = unit(n, seed=seed)
    store.add(task, [f"{task}/train/{i}" for i in range(n)], vectors, [f"{task} text {i}" for i in range(n)])
    return vectors


@pytest.fixture
def store(kind, tmp_path):
    store = _open_store(kind, tmp_path)
    yield store
    store.close()


def test_query_is_the_brute_force_answer(store):
    vectors = np.concatenate([fill(store, "a", seed=1), fill(store, "b", 70, seed=2)])
    names = [f"a/train/{i}" for i in range(50)] + [f"b/train/{i}" for i in range(70)]
    queries = unit(9, seed=3)
    ids, distances, tasks = store.query(queries, 10)
    for row, query in enumerate(queries):
        true = 1 - vectors.astype(np.float64) @ query
        order = np.argsort(true)[:10]
        assert ids[row] == [names[i] for i in order]
        np.testing.assert_allclose(distances[row], true[order], atol=1e-5)
        assert tasks[row] == [i.split("/")[0] for i in ids[row]]
    assert distances.shape == (9, 10) and distances.dtype == np.float32


def test_only_some_tasks_and_k_remain(store):
    fill(store, "a", 300, seed=1)
    b = fill(store, "b", 20, seed=2)
    ids, _distances, tasks = store.query(unit(4, seed=5), 15, tasks={"b", "unknown"})
    assert all(len(row) == 15 for row in ids) and {t for row in tasks for t in row} == {"b"}
    # The nearest rows of all are a's: they must not take b's places.
    ids, distances, _ = store.query(b[:1], 20, tasks=["b"])
    assert len(ids[0]) == 20 and distances[0, 0] == pytest.approx(0, abs=1e-5)


def test_fewer_rows_than_k(store):
    fill(store, "a", 3)
    ids, distances, _ = store.query(unit(2), 100)
    assert [len(row) for row in ids] == [3, 3] and distances.shape == (2, 3)


def test_equal_distances_go_by_id(store):
    same = np.repeat(unit(1), 8, axis=0)
    store.add("a", [f"a/{i}" for i in (5, 3, 7, 1, 0, 6, 2, 4)], same, ["x"] * 8)
    assert store.query(unit(1), 8)[0] == [[f"a/{i}" for i in range(8)]]


def test_add_replaces_and_remove_is_idempotent(store):
    fill(store, "a", 50)
    fill(store, "b", 20)
    fill(store, "a", 30, seed=9)
    assert store.tasks() == {"a": 30, "b": 20}
    assert store.query(unit(30, seed=9)[:1], 1)[0] == [["a/train/0"]]
    store.remove("a")
    store.remove("a")
    store.remove("never")
    assert store.tasks() == {"b": 20}
    assert {t for row in store.query(unit(3), 20)[2] for t in row} == {"b"}
    store.remove("b")
    with pytest.raises(LoralloyError, match="no rows to search"):
        store.query(unit(1), 5)


def test_survives_reopening(kind, tmp_path):
    store = _open_store(kind, tmp_path)
    fill(store, "a")
    fill(store, "with.dots_and-more", seed=1)
    before = store.query(unit(3, seed=8), 7)
    store.close()
    store = _open_store(kind, tmp_path)
    after = store.query(unit(3, seed=8), 7)
    assert before[0] == after[0] and before[2] == after[2]
    np.testing.assert_allclose(before[1], after[1], atol=1e-6)
    assert store.texts(["a/train/3", "with.dots_and-more/train/1"]) == ["a text 3", "with.dots_and-more text 1"]
    store.close()


def test_many_replacements_keep_recall(store):
    """Deleted rows stay in an HNSW graph for a while; they must not hide the living."""
    fill(store, "keep", 200, seed=1)
    for seed in range(6):
        fill(store, "churn", 200, seed=100 + seed)
    vectors = np.concatenate([unit(200, seed=105), unit(200, seed=1)])
    queries = unit(10, seed=4)
    ids, distances, _ = store.query(queries, 50)
    true = np.sort(1 - queries @ vectors.T, axis=1)[:, :50]
    np.testing.assert_allclose(distances, true, atol=1e-5)
    assert all(len(set(row)) == 50 for row in ids)


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (["a"], unit(2), "do not fit"),
        (["a", "a"], unit(2), "occurs twice"),
        (["a", "b"], 2 * unit(2), "unit norm"),
        (["a", "b"], unit(2) * np.nan, "unit norm"),
        ([], unit(0), "no rows"),
    ],
)
def test_bad_rows_are_refused(store, ids, vectors, message):
    with pytest.raises(LoralloyError, match=message):
        store.add("t", ids, vectors, ["x"] * len(ids))
    assert store.tasks() == {}


def test_unknown_text_and_wrong_width(store):
    fill(store, "a")
    with pytest.raises(LoralloyError, match="no row 'nope'"):
        store.texts(["a/train/0", "nope"])
    assert store.texts([]) == []
    with pytest.raises(LoralloyError, match="another embedder"):
        store.query(unit(1, d=8), 3)
    with pytest.raises(LoralloyError, match="at least one"):
        store.query(unit(1), 0)


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_exact_touches_one_task_only(tmp_path):
    store = ExactStore(tmp_path)
    fill(store, "a")
    before = digest(tmp_path)
    fill(store, "b", seed=3)
    fill(store, "b", seed=4)
    store.remove("b")
    assert digest(tmp_path) == before


def test_exact_names_a_torn_file(tmp_path):
    fill(ExactStore(tmp_path), "a")
    path = tmp_path / "a" / "vectors.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LoralloyError, match=r"vectors\.safetensors: damaged"):
        ExactStore(tmp_path)


def test_chroma_is_set_up_as_said(tmp_path):
    chroma = pytest.importorskip("loralloy.retrieval.chroma")
    pytest.importorskip("chromadb")
    store = chroma.ChromaStore(tmp_path)
    fill(store, "a")
    assert store._rows.configuration_json["hnsw"]["space"] == "cosine"
    assert store._rows.configuration_json["hnsw"]["ef_search"] == chroma.HNSW["ef_search"]
    assert store._client.get_settings().anonymized_telemetry is False
    row = store._rows.get(ids=["a/train/0"], include=["metadatas", "documents"])
    assert row["metadatas"] == [{"task": "a"}] and row["documents"] == ["a text 0"]
    # The fall-back when the graph does not answer gives the same as the graph.
    found = store._scan(unit(2, seed=7), 5, {"a"})
    ids, distances, _ = store.query(unit(2, seed=7), 5)
    assert [row[0] for row in found] == ids
    np.testing.assert_allclose([row[1] for row in found], distances, atol=1e-5)
    store.close()


@pytest.mark.slow
def test_chroma_reopens_beyond_sqlites_limit(tmp_path):
    """SQLite answers a query of at most 32,766 variables: an index of more rows must still open, and give all its vectors."""
    pytest.importorskip("chromadb")
    from loralloy.retrieval.chroma import ChromaStore

    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(33_000, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [f"t/train/{n}" for n in range(len(vectors))]
    store = ChromaStore(tmp_path / "c")
    store.add("t", ids, vectors, ids)
    store.close()
    again = ChromaStore(tmp_path / "c")
    assert again.tasks() == {"t": 33_000}
    found, read, _ = again.vectors()
    assert found == sorted(ids) and np.abs(read[found.index(ids[7])] - vectors[7]).max() < 1e-6
    again.close()
