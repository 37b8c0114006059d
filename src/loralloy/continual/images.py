"""The workshop of images: a vision transformer and domains of labelled images; adapters through `train_images`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base_ref import BaseRef
from ..errors import LoralloyError
from ..live.vision import HEAD_FILE, ImageClassifier, load_backbone
from ..tasks.image_set import ImageSet
from ..tasks.images import load_images
from ..training.config import SAVE_DTYPES
from ..training.data import mix
from ..training.image_config import ImageTrainConfig, find_targets
from ..training.images import train_images
from .fields import check_options
from .workshop import Answering, Evaluation

if TYPE_CHECKING:
    from torch import Tensor

    from ..weighting.learned.objective import Objective
    from .buffer import BufferRow
    from .experience import DomainStream, Experience


class ImageWorkshop:
    """See :class:`.workshop.Workshop`. All domains share their classes and one head (`images.head` of the stream).

    Args:
        stream: of kind "images"; its `train` holds fields of :class:`loralloy.training.image_config.ImageTrainConfig` and
            `save_dtype`.
        backbone: as :func:`loralloy.live.vision.load_backbone` gives it.
        sets: the image data by domain.

    Raises LoralloyError for an unknown training option, and a domain that the data does not have.
    """

    def __init__(self, stream: DomainStream, backbone: Any, sets: Mapping[str, ImageSet]) -> None:
        fields = stream.fields
        assert fields.images is not None  # the stream's fields have seen to it
        self.stream, self.model = stream, backbone
        self.experiences: Mapping[str, Experience] = {e.name: e for e in stream.experiences}
        for experience in stream.experiences:
            if experience.domain not in sets:
                raise LoralloyError(
                    f"experience {experience.name!r}: {fields.images.path} has no domain {experience.domain!r}; "
                    f"it has {', '.join(sets)}"
                )
        self.sets = {e.name: sets[e.domain] for e in stream.experiences}
        first = next(iter(self.sets.values()))
        for name, one in self.sets.items():
            if one.classes != first.classes:
                raise LoralloyError(
                    f"experience {name!r} has other classes than {first.name!r}; all must have the same"
                )
        given = dict(fields.train)
        self.save_dtype = given.pop("save_dtype", "fp16")
        if not isinstance(self.save_dtype, str) or self.save_dtype not in SAVE_DTYPES:
            raise LoralloyError(f"`train.save_dtype` is {self.save_dtype!r}; use {', '.join(SAVE_DTYPES)}")
        if "seed" in given:
            raise LoralloyError("`train.seed` is the stream's own to set: remove it (`seeds` lists the seeds)")
        check_options(given, ImageTrainConfig)
        if isinstance(given.get("targets"), list):
            given["targets"] = tuple(given["targets"])
        self.config = ImageTrainConfig.of(given)
        find_targets(backbone, self.config.targets)
        self.classifier = ImageClassifier(backbone, first.classes, head=fields.images.head, size=fields.images.size)
        self.name = Path(fields.model).name
        self.base = BaseRef(self.name, None, self.classifier.fingerprint)
        self._lead: Path | None = None
        self._own: dict[str, Tensor] = {}
        self._tests: dict[str, tuple[Tensor, Tensor]] = {}
        self.begin(0, None)

    @staticmethod
    def from_stream(stream: DomainStream) -> ImageWorkshop:
        """With the stream's backbone and images loaded."""
        from ..console import console
        from ..live.base import pick_device

        fields = stream.fields
        assert fields.images is not None
        sets = load_images(fields.images.path, fields.images.layout, fields.images.size)
        for name in [e.domain for e in stream.experiences if e.domain in sets]:
            if not sets[name].rows(fields.evaluate.split):
                raise LoralloyError(f"domain {name!r} has no {fields.evaluate.split} images (`evaluate.split`)")
        dtype = fields.dtype
        if dtype == "auto" and pick_device(fields.device).type == "cpu":
            dtype = "float32"  # results must not depend on which dtype was faster in a timing
        with console.status("loading the backbone"):
            backbone = load_backbone(fields.model, dtype, fields.device)
        return ImageWorkshop(stream, backbone, sets)

    def identity(self, what: str) -> dict[str, Any]:
        kind = self.classifier.kind
        plain = dataclasses.asdict(self.config)
        found = {
            "kind": "images",
            "base": self.base.fingerprint,
            "train": plain | {"targets": list(self.config.targets)},
            "saved": self.save_dtype,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "size": self.classifier.size,
            # adapters that prototypes judge are trained under the random head
            "head": "random" if kind == "prototypes" and what == "train" else kind,
        }
        if what == "evaluate":
            evaluate = self.stream.fields.evaluate
            found |= {"split": evaluate.split, "limit": evaluate.limit, "temperature": self.classifier.temperature}
        return found

    def fingerprint(self, experience: Experience) -> str:
        return self.sets[experience.name].fingerprint

    def leads(self) -> bool:
        return self.classifier.kind == "learned"

    def remembers(self) -> bool:
        return self.classifier.kind == "prototypes"

    def begin(self, seed: int, lead: Path | None) -> None:
        self._lead = lead
        self.classifier.support = None
        if lead is not None:
            self.classifier.load_head(lead)
        else:
            self.classifier.draw_head(mix(seed, 7))
        self._own = {k: v.detach().clone() for k, v in self.classifier.linear.state_dict().items()}

    def train(self, experiences: Sequence[Experience], out: Path, seed: int, init: Path | None = None) -> Path:
        self._restore_head()
        trains = self.leads() and (self._lead is None or len(experiences) > 1)
        # jointly, each domain gets the steps that it would get alone
        config = dataclasses.replace(self.config, steps=self.config.steps * len(experiences))
        train_images(
            self.classifier, [self.sets[e.name] for e in experiences], out, head="train" if trains else "frozen",
            init_adapter=init, seed=seed, base_name=self.name, save_dtype=self.save_dtype, evaluate=False,
            config=config,
        )  # fmt: skip
        return out

    def labels(self, experience: Experience, split: str) -> tuple[list[str], list[str]]:
        data = self.sets[experience.name]
        rows = data.rows(split)
        if split == "train":
            rows = rows[: self.config.limit]
        return [data.ids[i] for i in rows], [data.classes[int(data.labels[i])] for i in rows]

    def rows(self, experience: Experience, ids: Sequence[str]) -> list[dict[str, Any]]:
        self.sets[experience.name].find(ids)
        return [{} for _ in ids]

    def features(self, experience: Experience, ids: Sequence[str]) -> Tensor:
        data = self.sets[experience.name]
        return self.classifier.batched_features(data.load(data.find(ids)), self._batch_size).cpu()

    def objective(self, rows: Sequence[BufferRow], kind: str = "answer") -> Objective:
        from ..weighting.learned.images import ImageObjective

        # rows drawn without their labels have none; who needs them says so
        labels = self._labels(rows) if all(row.label for row in rows) else None
        images = self._images(rows)
        return ImageObjective(self.classifier, images, labels, [row.domain for row in rows], kind=kind)  # type: ignore[arg-type]

    def inputs(self, rows: Sequence[BufferRow]) -> list[dict[str, Any]]:
        images = self._images(rows)
        size = self._batch_size or (64 if self.classifier.device.type == "cpu" else 1024)
        return [{"pixel_values": self.classifier.pixels(part), **self.classifier.more} for part in images.split(size)]

    def check_balance(self) -> None:
        self.classifier.directions()

    def answering(self, rows: Sequence[BufferRow]) -> Answering:
        import torch

        images, size = self._images(rows), self._batch_size or 64

        def run() -> Tensor:
            return torch.cat([self.classifier(part) for part in images.split(size)]).float().log_softmax(1).cpu()

        return Answering(run, self.classifier.directions(), 0)

    def after_merge(self, rows: Sequence[BufferRow], step: Path | None = None) -> None:
        if step is not None and (step / HEAD_FILE).is_file():
            self.classifier.load_head(step)
        else:
            self._restore_head()
        if self.remembers():
            if not rows:
                raise LoralloyError("prototypes need a memory buffer with at least one row")
            self.classifier.fit_prototypes(self._images(rows), self._labels(rows))

    def evaluate(self, experience: Experience) -> Evaluation:
        if experience.name not in self._tests:
            fields, data = self.stream.fields.evaluate, self.sets[experience.name]
            rows = data.rows(fields.split)[: fields.limit]
            if not rows:
                raise LoralloyError(f"domain {experience.domain!r} has no {fields.split} images (`evaluate.split`)")
            self._tests[experience.name] = data.load(rows).to(self.classifier.device), data.labels[rows]
        images, labels = self._tests[experience.name]
        found = self.classifier.predict(images, self._batch_size)
        return Evaluation(tuple((found == labels).tolist()))

    @property
    def _batch_size(self) -> int | None:
        """The stream's, where it sets one; else the classifier's own, which is one pass on a GPU."""
        evaluate = self.stream.fields.evaluate
        return evaluate.batch_size if "batch_size" in evaluate.model_fields_set else None

    def _images(self, rows: Sequence[BufferRow]) -> Tensor:
        """uint8 [n, 3, h, w] of buffer rows, in their order."""
        import torch

        by_domain: dict[str, list[int]] = {}
        for n, row in enumerate(rows):
            by_domain.setdefault(row.domain, []).append(n)
        loaded = []
        for name, places in by_domain.items():  # one read a domain: folders are decoded by several threads
            data = self.sets[name]
            loaded.append(data.load(data.find([rows[n].id for n in places])))
        back = torch.tensor([n for places in by_domain.values() for n in places]).argsort()
        return torch.cat(loaded)[back]

    def _labels(self, rows: Sequence[BufferRow]) -> Tensor:
        """int64 [n] of buffer rows."""
        import torch

        return torch.tensor([self.classifier.classes.index(row.label) for row in rows])

    def _restore_head(self) -> None:
        self.classifier.linear.load_state_dict(self._own)
