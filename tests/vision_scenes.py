"""Tiny random vision transformers and tiny sets of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers import generator
from loralloy.live.vision import ImageClassifier
from loralloy.tasks.image_set import ImageSet, from_arrays

CLASSES = ("circle", "square", "star")


def tiny_dinov2(seed: int = 0, layers: int = 2, hidden: int = 16, **more: Any) -> Any:
    """A random DINOv2 for 28 x 28 pixels (2 x 2 patches), float32, eval mode."""
    from transformers import Dinov2Config, Dinov2Model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Dinov2Config(
            hidden_size=hidden, num_attention_heads=2, num_hidden_layers=layers, mlp_ratio=2, image_size=28, patch_size=14,
            **more,
        )  # fmt: skip
        model = Dinov2Model(config).eval().requires_grad_(False)
        for parameter in model.parameters():  # the usual 0.02 makes all features alike
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model


def classifier(seed: int = 0, **options: Any) -> ImageClassifier:
    return ImageClassifier(tiny_dinov2(seed), options.pop("classes", CLASSES), **{"size": 28, **options})


def pictures(n: int, seed: int = 0, size: int = 20, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """uint8 [n, 3, size, size] whose class is the channel that is bright, and labels [n]."""
    g = generator(seed)
    labels = torch.arange(n) % 3
    images = torch.rand(n, 3, size, size, generator=g) * 90 + shift
    images[torch.arange(n), labels] += 120
    return images.clamp(0, 255).to(torch.uint8), labels


def image_set(name: str = "noto", n: int = 36, seed: int = 0, shift: float = 0.0) -> ImageSet:
    """Half of the rows to train on, a sixth for validation, a third to test on."""
    images, labels = pictures(n, seed, shift=shift)
    split = torch.tensor([(0, 0, 0, 1, 2, 2)[(i // 3) % 6] for i in range(n)])
    return from_arrays(name, images, labels, split, CLASSES, licence="MIT")


def image_tree(root: Path, domains: Sequence[str], classes: Sequence[str] = CLASSES, images: int = 5) -> Path:
    """A folder of domain/class/*.jpg: the layout of PACS and Office-Home."""
    from PIL import Image

    for d, domain in enumerate(domains):
        for c, kind in enumerate(classes):
            folder = root / domain / kind
            folder.mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", (16 + 4 * d, 20), (80 * c, 60 * d, 40 * i)).save(folder / f"pic_{i:03}.jpg")
    return root
