"""The harnesses of benchmarks/adaptive and benchmarks/tada; a random vision transformer and three tiny domains."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks/adaptive"
TADA = FOLDER.parent / "tada"
STREAM = """version: 1
title: "Tiny"
kind: images
model: model
dtype: float32
device: cpu
images: {path: emoji.npz, layout: emoji, size: 28, head: random}
experiences: [{name: a}, {name: b}, {name: c}]
orders: [[a, b, c], [c, b, a]]
seeds: [0, 1]
train: {rank: 2, alpha: 4, lr: 0.005, steps: 6, batch_size: 8}
out: out
"""


@pytest.fixture(autouse=True)
def as_it_was():
    """A harness is a process of its own: it silences the console and changes torch's precision for good."""
    import torch

    from loralloy.console import console

    quiet, precision = console.quiet, torch.get_float32_matmul_precision()
    yield
    console.quiet = quiet
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a model, images and the stream files of the page on emoji."""
    import numpy as np
    import torch

    from vision_scenes import CLASSES, pictures, tiny_dinov2

    folder = tmp_path_factory.mktemp("adaptive")
    tiny_dinov2().save_pretrained(folder / "model")
    n, arrays = 36, {}
    for i, name in enumerate("abc"):
        images, labels = pictures(n, seed=i, shift=25.0 * i)
        arrays[name] = images.permute(0, 2, 3, 1).numpy()
    split = torch.tensor([(0, 0, 0, 1, 2, 2)[(i // 3) % 6] for i in range(n)])
    told = {"classes": CLASSES, "styles": {name: {"spdx": "MIT"} for name in arrays}}
    memory = io.BytesIO()
    np.savez_compressed(
        memory, **arrays, labels=labels.numpy().astype("uint8"), names=np.array([f"n{i}" for i in range(n)]),
        split=split.numpy().astype("uint8"), metadata=np.array(json.dumps(told)),
    )  # fmt: skip
    (folder / "emoji.npz").write_bytes(memory.getvalue())
    for name in ("emoji4", "emoji7"):
        (folder / f"{name}.yaml").write_text(STREAM)
    return folder


@pytest.fixture
def harness(tiny, monkeypatch):
    """The modules of the harness, over the tiny stream; gone again afterwards, since their names are plain words."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), str(FOLDER.parent), *sys.path])
    names = [path.stem for path in FOLDER.glob("*.py")]
    found = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    monkeypatch.setattr(found.plan, "HERE", tiny)
    yield found
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def tada(monkeypatch):
    """The modules of benchmarks/tada; gone again afterwards, since their names are plain words."""
    monkeypatch.setattr(sys, "path", [str(TADA), str(TADA.parent), *sys.path])
    names = [path.stem for path in TADA.glob("*.py")]
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)
