"""References: a folder, or a hub id with a pinned revision; never a moving target."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from helpers import adapter, factors
from loralloy.adapter import Adapter
from loralloy.errors import LoralloyError
from loralloy.hub import parse_ref, resolve


def test_parse_ref(tmp_path):
    assert parse_ref("org/name@v1.0") == ("org/name", "v1.0")
    assert parse_ref("org/name@refs/pr/3") == ("org/name", "refs/pr/3")
    assert parse_ref("org/name") == ("org/name", None)
    odd = tmp_path / "a@b"
    odd.mkdir()
    assert parse_ref(odd) == (str(odd), None)
    assert parse_ref("./no/such@place") == ("./no/such@place", None)


def test_folders_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name", "adapter").samefile(tmp_path / "org" / "name")


@pytest.mark.parametrize("ref", ["./missing", "/no/such/folder", "justaname", "a/b/c", ""])
def test_missing_folder(ref):
    with pytest.raises(
        LoralloyError, match=r"adapter folder .* does not exist; give a folder, or a hub id as org/name@revision"
    ):
        resolve(ref, "adapter")


def test_a_hub_id_needs_a_revision():
    with pytest.raises(LoralloyError, match="names no revision; pin one as org/name@<commit or tag>"):
        resolve("org/name", "model")


def test_offline_is_said(monkeypatch):
    import huggingface_hub

    def offline(*args, **more):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline mode is on\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        LoralloyError, match=r"adapter org/name@v1 is neither in the local hub cache nor downloadable .*offline"
    ):
        resolve("org/name@v1", "adapter")


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(LoralloyError, match="pip install huggingface_hub"):
        resolve("org/name@v1", "adapter")


def test_a_pinned_adapter_loads_and_never_asks_for_pickles(tmp_path, monkeypatch):
    adapter({"m": factors()}).save(tmp_path / "0123abc")
    asked = {}

    def download(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, allow=allow_patterns)
        return str(tmp_path / "0123abc")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    loaded = Adapter.load("org/spam@v1")
    assert asked["name"] == "org/spam" and asked["revision"] == "v1"
    assert not any(p.endswith((".bin", ".pt", "*")) for p in asked["allow"])
    assert loaded.name == "spam"  # not the cache folder's commit hash
