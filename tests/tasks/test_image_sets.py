"""Image sets: what is in a split, and where the pictures come from."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from loralloy.errors import LoralloyError
from loralloy.tasks.image_set import from_arrays
from loralloy.tasks.images import load_folders, load_images, load_office_home, load_pacs
from vision_scenes import CLASSES, image_set, image_tree, pictures

PACS = ("art_painting", "cartoon", "photo", "sketch")


def test_splits_cover_the_rows_once():
    data = image_set(n=36)
    rows = [row for split in ("train", "validation", "test") for row in data.rows(split)]
    assert sorted(rows) == list(range(36)) and len(data.rows("train")) == 18
    assert data.find([data.ids[5], data.ids[2]]) == [5, 2]
    with pytest.raises(LoralloyError, match="no split 'dev'"):
        data.rows("dev")
    with pytest.raises(LoralloyError, match="no image 'noto/99'"):
        data.find(["noto/99"])


def test_the_fingerprint_follows_pixels_labels_and_split():
    images, labels = pictures(9)
    split = torch.tensor([0, 0, 0, 0, 0, 0, 2, 2, 2])
    same = from_arrays("a", images.clone(), labels, split, CLASSES)
    first = from_arrays("a", images, labels, split, CLASSES)
    assert same.fingerprint == first.fingerprint
    changed = images.clone()
    changed[0, 0, 0, 0] ^= 1
    assert from_arrays("a", changed, labels, split, CLASSES).fingerprint != first.fingerprint
    assert from_arrays("a", images, labels.flip(0), split, CLASSES).fingerprint != first.fingerprint
    assert from_arrays("a", images, labels, split.flip(0), CLASSES).fingerprint != first.fingerprint


def test_wrong_parts_are_refused():
    images, labels = pictures(6)
    split = torch.zeros(6)
    with pytest.raises(LoralloyError, match="give uint8"):
        from_arrays("a", images.float(), labels, split, CLASSES)
    with pytest.raises(LoralloyError, match="label is out of range; there are 2 classes"):
        from_arrays("a", images, labels, split, CLASSES[:2])
    with pytest.raises(LoralloyError, match="two images have one id"):
        from_arrays("a", images, labels, split, CLASSES, ["x"] * 6)
    with pytest.raises(LoralloyError, match="6 ids, 5 labels"):
        from_arrays("a", images, labels[:5], split, CLASSES)


@pytest.mark.parametrize("inside", ["", "kfold"])
def test_pacs_is_read_from_its_folder_or_the_one_above(tmp_path, inside):
    image_tree(tmp_path / inside, PACS, images=10)
    sets = load_pacs(tmp_path, size=8)
    assert tuple(sets) == PACS
    for d, data in enumerate(sets.values()):
        assert data.classes == tuple(sorted(CLASSES)) and len(data) == 30
        assert len(data.rows("test")) == 6 and len(data.rows("train")) == 24 and not data.rows("validation")
        row = data.find([f"{data.name}/square/pic_004.jpg"])
        pixels = data.load(row)
        assert pixels.shape == (1, 3, 8, 8) and pixels.dtype == torch.uint8
        assert data.classes[int(data.labels[row[0]])] == "square"
        want = torch.tensor([80.0, 60.0 * d, 160.0])
        assert float((pixels[0].float().mean((1, 2)) - want).abs().max()) < 6  # JPEG rounds


def test_the_split_depends_on_names_and_seed_alone(tmp_path):
    image_tree(tmp_path / "a", PACS, images=10)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = load_pacs(tmp_path / "a", size=8), load_pacs(tmp_path / "b", size=16)
    assert torch.equal(first["photo"].split, second["photo"].split)
    other = load_pacs(tmp_path / "a", size=8, seed=1)
    assert not torch.equal(first["photo"].split, other["photo"].split)
    assert first["photo"].fingerprint != second["photo"].fingerprint  # another size is other images
    with_validation = load_pacs(tmp_path / "a", size=8, validation=0.2)["photo"]
    assert with_validation.rows("test") == first["photo"].rows("test")
    assert len(with_validation.rows("validation")) == 6


def test_office_home_names_may_differ_in_spaces(tmp_path):
    image_tree(tmp_path, ("Art", "Clipart", "Product", "Real_World"))
    assert list(load_office_home(tmp_path)) == ["Art", "Clipart", "Product", "Real World"]
    assert list(load_images(tmp_path, "office_home")) == ["Art", "Clipart", "Product", "Real World"]
    assert list(load_folders(tmp_path)) == ["Art", "Clipart", "Product", "Real_World"]


def test_folders_that_cannot_be_used_say_why(tmp_path):
    with pytest.raises(LoralloyError, match="is no folder"):
        load_pacs(tmp_path / "nowhere")
    image_tree(tmp_path / "a", PACS[:3])
    with pytest.raises(LoralloyError, match="no domain 'sketch'"):
        load_pacs(tmp_path / "a")
    image_tree(tmp_path / "b", PACS)
    shutil.rmtree(tmp_path / "b" / "photo" / "star")
    with pytest.raises(LoralloyError, match="'art_painting' has class 'star' and 'photo' has not"):
        load_pacs(tmp_path / "b")
    image_tree(tmp_path / "c", PACS, images=1)
    with pytest.raises(LoralloyError, match="class 'circle' has 1 image"):
        load_pacs(tmp_path / "c")
    with pytest.raises(LoralloyError, match="layout 'vlcs' is unknown"):
        load_images(tmp_path, "vlcs")


def test_a_damaged_picture_is_named(tmp_path):
    image_tree(tmp_path, PACS)
    path = tmp_path / "photo" / "star" / "pic_001.jpg"
    path.write_bytes(b"no picture")
    data = load_pacs(tmp_path)["photo"]
    with pytest.raises(LoralloyError, match=r"pic_001\.jpg cannot be read"):
        data.load(data.find(["photo/star/pic_001.jpg"]))


def test_an_image_set_is_plain_data():
    data = image_set()
    assert dataclasses.replace(data, name="other").classes == CLASSES
    assert "18 train" in repr(data)
