"""The objective of images: a classifier's loss on a few of them, under whatever composition its backbone carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from ...errors import LoralloyError
from .objective import Kind, shares

if TYPE_CHECKING:
    from torch import Tensor

    from ...live.vision import ImageClassifier


class ImageObjective:
    """See :class:`.objective.Objective`; `model` is the classifier's backbone.

    kind "answer": cross-entropy of the classifier's logits. kind "entropy": the entropy of their softmax, nats, which looks
    at no label (AdaMerging; Yang et al., ICLR 2024, section 3.2) but those that prototypes stand for.

    With a classifier of prototypes, each example is judged by the prototypes of all these images under the composition
    asked about, its own image left out of its class's (see :func:`loralloy.live.vision.prototype_logits`), and
    gradients flow through the prototypes too. The prototypes that evaluation uses are not touched.

    Args:
        classifier: whose head decides.
        images: uint8 [n, 3, h, w]; kept on the classifier's device.
        labels: [n] int64; None for entropy under a linear head.
        domains: of each image, its domain's name.
        kind: see above.
        augment: draw a light augmentation for each step above 0; step 0 sees the images as they are.
        views: augmented views of each image a step; the loss is their mean.

    Raises LoralloyError for no images, lists of unlike length, labels out of range or missing, and views below 1.
    """

    def __init__(
        self,
        classifier: ImageClassifier,
        images: Tensor,
        labels: Tensor | None,
        domains: Sequence[str],
        *,
        kind: Kind = "answer",
        augment: bool = True,
        views: int = 1,
        seed: int = 0,
    ) -> None:
        if kind not in get_args(Kind):
            raise LoralloyError(f"kind {kind!r} is not known; choose {', '.join(get_args(Kind))}")
        n = len(images)
        if not n:
            raise LoralloyError("there are no images to learn from; give at least one")
        if len(domains) != n or (labels is not None and len(labels) != n):
            raise LoralloyError(f"there are {n} images; give as many labels and domains")
        if labels is None and (kind == "answer" or classifier.kind == "prototypes"):
            raise LoralloyError("the images have no labels; only entropy under a linear head does without")
        if labels is not None and not (int(labels.min()) >= 0 and int(labels.max()) < len(classifier.classes)):
            raise LoralloyError(f"a label is out of range; the classifier has {len(classifier.classes)} classes")
        if views < 1:
            raise LoralloyError(f"views is {views}; it must be at least 1")
        self.classifier, self.model, self.kind = classifier, classifier.backbone, kind
        self.size, self.augment, self.views, self.seed = n, augment, views, seed
        self.images = images.to(classifier.device)
        self.labels = None if labels is None else labels.to(classifier.device)
        if kind == "entropy" or labels is None:
            self.strata = list(domains)
        else:
            names = [classifier.classes[int(label)] for label in labels]
            self.strata = [f"{domain}/{name}" for domain, name in zip(domains, names, strict=True)]
        self.choices = [0 if kind == "entropy" else len(classifier.classes)] * n
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._fed: dict[int, Tensor] = {}

    def losses(self, rows: Sequence[int], step: int = 0) -> Tensor:
        """The loss of each row, [rows], float32."""
        return self._losses(self._rows(rows)[0], step)

    def loss(self, rows: Sequence[int], step: int = 0) -> Tensor:
        """The mean within each stratum, averaged over the strata."""
        index, share = self._rows(rows)
        return self._losses(index, step) @ share

    def feed(self, rows: Sequence[int], step: int) -> Any:
        """The augmentation of a step, into the tensor that a recording reads; and what else it reads."""
        if not (self.augment and step > 0):
            return self._rows(rows)
        moves = self._moves(self._seen(len(rows)), step)
        kept = self._fed.setdefault(len(moves), moves).copy_(moves)
        return (*self._rows(rows), kept)

    def _seen(self, rows: int) -> int:
        """How many images one view of so many rows takes: under prototypes, all of them."""
        return len(self.images) if self.classifier.kind == "prototypes" else rows

    def _moves(self, images: int, step: int) -> Tensor:
        from ...live.vision import affines

        return affines(self.views * images, self.seed, step).to(self.images.device, non_blocking=True)

    def _rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Row numbers and shares of the loss on the device, where a step must not wait for them; kept for a few sets of rows."""
        import torch

        key = tuple(rows)
        if key not in self._known:
            if len(self._known) >= 16:
                self._known.clear()
            device = self.images.device
            share = torch.tensor(shares(self.strata, key), device=device)
            self._known[key] = torch.tensor(key, dtype=torch.long, device=device), share
        return self._known[key]

    def _losses(self, index: Tensor, step: int) -> Tensor:
        import torch
        from torch.nn.functional import cross_entropy

        logits = self._logits(index, step)
        views = len(logits) // len(index)
        if self.kind == "entropy":
            logp = logits.log_softmax(1)
            found = -(logp.exp() * logp).sum(1)
        else:
            assert self.labels is not None
            found = cross_entropy(logits, self.labels[index].repeat(views), reduction="none")
        return torch.stack(found.split(len(index))).mean(0)

    def _logits(self, index: Tensor, step: int) -> Tensor:
        """[views * rows, classes]."""
        import torch

        from ...live.vision import prototype_logits

        classifier = self.classifier
        views = self.views if self.augment and step > 0 else 1
        prototypes = classifier.kind == "prototypes"
        images = self.images if prototypes else self.images[index]
        moves = None
        if self.augment and step > 0:
            recording = images.is_cuda and torch.cuda.is_current_stream_capturing()
            moves = self._fed[views * len(images)] if recording else self._moves(len(images), step)
        features = classifier.features(images.repeat(views, 1, 1, 1), moves)
        if not prototypes:
            return classifier.logits(features)
        assert self.labels is not None
        parts = features.split(len(images))
        found = [
            prototype_logits(
                part[index], part, self.labels, classes=len(classifier.classes), temperature=classifier.temperature,
                own=index,
            )
            for part in parts
        ]  # fmt: skip
        return torch.cat(found)
