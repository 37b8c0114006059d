"""The vision half in one process: a vision transformer under the seed's random head, and drawing styles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plan import HERE, LEARNED_ROWS, Half, Job
from site_text import sample

from loralloy.live.vision import ImageClassifier, load_backbone
from loralloy.tasks.image_set import ImageSet
from loralloy.tasks.images import load_images
from loralloy.training.data import mix
from loralloy.training.image_config import ImageTrainConfig
from loralloy.training.images import train_images
from loralloy.training.images_self import train_images_unlabelled


class ImageSite:
    read_at = 0  # the class token

    def __init__(self, half: Half, out: Path, device: str = "auto") -> None:
        self.half, self.out = half, out
        f = half.fields
        path = (HERE / f["images"]["path"]).resolve()
        self.sets = load_images(str(path), f["images"]["layout"], f["images"]["size"])
        self.model = load_backbone((HERE / f["model"]).resolve(), f["dtype"], device)
        first = next(iter(self.sets.values()))
        self.classifier = ImageClassifier(self.model, first.classes, head="random", size=f["images"]["size"])
        self._seen: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def set(self, kind: str, name: str) -> ImageSet:
        return self.sets[self.half.fields["tasks" if kind == "task" else "domains"][name]]

    def begin(self, seed: int) -> None:
        """The head that the seed's task adapters are trained under, and everything is judged by."""
        self.classifier.draw_head(mix(seed, 7))

    def train(self, job: Job, out: Path) -> None:
        f = self.half.fields
        config = ImageTrainConfig(
            rank=job.rank, alpha=f["alpha"] * job.rank / self.half.rank, lr=f["lr"], steps=f["steps"],
            batch_size=f["batch_size"],
        )  # fmt: skip
        self.begin(job.seed)
        data = self.set(job.kind, job.of)
        if job.kind == "domain":
            train_images_unlabelled(self.classifier, data, out, masked=f["masked"], seed=job.seed, config=config)
        else:
            train_images(self.classifier, data, out, seed=job.seed, evaluate=False, config=config)

    def answers(self, domain: str, split: str) -> list[bool]:
        if (domain, split) not in self._seen:
            data = self.set("domain", domain)
            rows = data.rows(split)[: self.half.few]
            self._seen[domain, split] = data.load(rows).to(self.classifier.device), data.labels[rows]
        images, labels = self._seen[domain, split]
        return (self.classifier.predict(images) == labels).tolist()

    def unlabelled(self, kind: str, name: str, count: int, seed: int) -> list[dict[str, Any]]:
        """As of texts: training images, the first `count` of the seed's order."""
        data = self.set(kind, name)
        images = data.load(sample(data.rows("train"), count, seed))
        return [{"pixel_values": self.classifier.pixels(part), **self.classifier.more} for part in images.split(64)]

    def unlabelled_answers(self, domain: str, count: int, seed: int) -> Callable[[], torch.Tensor]:
        """As of texts: log-probabilities [count, classes]."""
        data = self.set("domain", domain)
        images = data.load(sample(data.rows("train"), count, seed)).to(self.classifier.device)
        return lambda: torch.cat([self.classifier(part) for part in images.split(64)]).float().log_softmax(1).cpu()

    def directions(self, domain: str) -> torch.Tensor:
        return self.classifier.directions()

    def general(self) -> list[dict[str, Any]]:
        raise NotImplementedError("there are no images of no domain; the reference is the task's own inputs")

    def objective(self, domain: str, kind: str, seed: int) -> Any:
        from loralloy.weighting.learned.images import ImageObjective

        data = self.set("domain", domain)
        rows = sample(data.rows("train"), 10**9, seed)
        if kind == "entropy":
            rows, labels = rows[: self.half.calibration], None
        else:
            by = [[r for r in rows if int(data.labels[r]) == c][:LEARNED_ROWS] for c in range(len(data.classes))]
            rows = [r for some in by for r in some]
            labels = data.labels[rows]
        kinds: Any = "entropy" if kind == "entropy" else "answer"
        return ImageObjective(self.classifier, data.load(rows), labels, [domain] * len(rows), kind=kinds, seed=seed)
