"""The emoji file: what is read out of packages, rendered, split and recorded."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest

from loralloy.errors import LoralloyError
from loralloy.tasks import emoji
from loralloy.tasks.images import load_emoji

pytest.importorskip("resvg_py")
NAMES = {"Food": ["apple", "bread", "pear", "plum"], "Objects": ["cup", "key", "pen", "pin"], "Flags": ["flag-a"]}


def package(path, colour: str, missing: str = "") -> str:
    """A tarball in the layout of @iconify-json; its sha512 in base64."""
    names = [n for group in NAMES.values() for n in group if n != missing]
    square = f'<path fill="{colour}" d="M0 0h16v8H0z"/>'
    icons = {"icons": {n: {"body": square} for n in names if n != "pear"}, "width": 16, "height": 16}
    if missing != "pear":
        icons["aliases"] = {"pear": {"parent": "apple"}}
    licence = {"title": "MIT", "spdx": "MIT", "url": "licence-page"}
    info = {"name": path.name, "author": {"name": "A. Artist", "url": "page"}, "license": licence}
    members = {"icons.json": icons, "info.json": info, "metadata.json": {"categories": NAMES}}
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz") as tar:
        for name, content in members.items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    path.write_bytes(memory.getvalue())
    return base64.b64encode(hashlib.sha512(memory.getvalue()).digest()).decode()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    folder = tmp_path / "npm"
    folder.mkdir()
    styles = []
    for name, colour, missing in (("noto", "currentColor", ""), ("twemoji", "#00ff00", "plum")):
        style = emoji.Style(name, "1.0.0", "")
        styles.append(dataclasses.replace(style, sha512=package(folder / style.file, colour, missing)))
    monkeypatch.setattr(emoji, "STYLES", tuple(styles))
    return folder


def test_what_all_styles_have_is_rendered(packages, tmp_path):
    path = emoji.build(tmp_path / "out", packages, size=16)
    sets = load_emoji(path)
    assert list(sets) == ["noto", "twemoji"]
    for data in sets.values():
        assert data.classes == ("Food", "Objects")  # no flags
        assert [i.split("/")[1] for i in data.ids] == ["apple", "bread", "cup", "key", "pear", "pen", "pin"]  # no plum
        assert data.labels.tolist() == [0, 0, 1, 1, 0, 1, 1] and data.licence == "MIT"
    black, green = (sets[name].load([0])[0] for name in ("noto", "twemoji"))
    assert black[:, 3, 8].tolist() == [0, 0, 0] and black[:, 12, 8].tolist() == [255, 255, 255]
    assert green[:, 3, 8].tolist() == [0, 255, 0]
    assert bool((sets["noto"].load([4]) == sets["noto"].load([0])).all())  # an alias is its parent


def test_every_style_has_the_same_split_and_it_is_the_names(packages, tmp_path):
    sets = load_emoji(emoji.build(tmp_path / "out", packages, size=16).parent)
    for data in sets.values():
        assert data.split.tolist() == [emoji.split_of(i.split("/")[1]) for i in data.ids]


def test_the_shares_of_the_split():
    counts = np.bincount([emoji.split_of(f"name-{i}") for i in range(4000)]) / 4000
    assert np.allclose(counts, [0.55, 0.10, 0.35], atol=0.03)


def test_licences_and_authors_are_recorded(packages, tmp_path):
    with np.load(emoji.build(tmp_path / "out", packages, size=16), allow_pickle=False) as arrays:
        metadata = json.loads(str(arrays["metadata"]))
    style = metadata["styles"]["twemoji"]
    assert (style["spdx"], style["author"], style["version"]) == ("MIT", "A. Artist", "1.0.0")
    assert "rendered" in style["changes"]


def test_the_file_is_the_same_each_time_and_kept(packages, tmp_path):
    first = emoji.build(tmp_path / "a", packages, size=16).read_bytes()
    assert emoji.build(tmp_path / "b", packages, size=16).read_bytes() == first
    (tmp_path / "a" / emoji.FILE).write_bytes(b"mine")
    assert emoji.build(tmp_path / "a", packages, size=16).read_bytes() == b"mine"
    assert emoji.build(tmp_path / "a", packages, size=16, overwrite=True).read_bytes() == first


def test_another_tarball_is_refused(packages, tmp_path):
    path = packages / emoji.STYLES[1].file
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(LoralloyError, match="sha512 differs"):
        emoji.build(tmp_path / "out", packages)
    assert not (tmp_path / "out").exists()


def test_without_npm_the_file_to_fetch_is_named(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    with pytest.raises(LoralloyError, match=r"put iconify-json-noto-1\.0\.0\.tgz into"):
        emoji.build(tmp_path / "out", tmp_path / "empty")


def test_what_npm_says_is_passed_on(packages, tmp_path, monkeypatch):
    script = tmp_path / "npm-stand-in"
    script.write_text("#!/bin/sh\necho 'E404 no such thing' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(emoji.shutil, "which", lambda name: str(script))
    assert emoji.main(["--out", str(tmp_path / "out"), "--packages", str(tmp_path / "empty")]) == 1
    with pytest.raises(LoralloyError, match="E404 no such thing"):
        emoji.fetch(emoji.STYLES[0], tmp_path / "empty")


def test_a_file_that_is_no_emoji_file(tmp_path):
    with pytest.raises(LoralloyError, match=r"loralloy\.tasks\.emoji"):
        load_emoji(tmp_path / "emoji.npz")
    np.savez(tmp_path / "emoji.npz", a=np.zeros(3))
    with pytest.raises(LoralloyError, match="is no emoji file"):
        load_emoji(tmp_path)


def test_pinned_digests_are_sha512():
    assert len({style.sha512 for style in emoji.STYLES}) == 7
    assert all(len(base64.b64decode(style.sha512)) == 64 for style in emoji.STYLES)
