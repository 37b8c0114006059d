"""The workshop: what the protocol asks of a modality (:class:`.text.TextWorkshop`, :class:`.images.ImageWorkshop`).

The protocol (:mod:`.run`) knows streams, buffers, rules and strategies; how a domain is trained, labelled, embedded and
scored is the workshop's. One workshop serves all orders, seeds and strategies of a stream; it holds one base model, in
which the protocol sets a composition before it asks for an evaluation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..base_ref import BaseRef
    from ..weighting.learned.objective import Objective
    from .buffer import BufferRow
    from .experience import DomainStream, Experience


@dataclass(frozen=True)
class Evaluation:
    """Which rows of a domain's test split were answered right, in the split's order."""

    correct: tuple[bool, ...] = field(repr=False)

    @property
    def accuracy(self) -> float:
        """The share of right answers, in [0, 1]."""
        return sum(self.correct) / len(self.correct)


@dataclass(frozen=True)
class Answering:
    """What :func:`loralloy.weighting.balance.balance` asks for, over some inputs.

    run: log-probabilities of the classes [inputs, k] under what is set in the model. directions: [k, out], what raises each
    class. at: the token where answers are read.
    """

    run: Callable[[], Tensor]
    directions: Tensor
    at: int


@runtime_checkable
class Workshop(Protocol):
    """How one modality trains, labels, embeds and scores. Made by ``from_stream(stream)`` of each class.

    model: the base, on its device, in eval mode; adapters are trained from it and compositions set in it. `train` leaves
        it as it was (its weights, hooks and modes).
    base: what the base is (`loralloy.live.base.base_fingerprint`), for banks to be checked against.
    experiences: the stream's, by name.
    """

    model: nn.Module
    base: BaseRef
    experiences: Mapping[str, Experience]

    def identity(self, what: str) -> dict[str, Any]:
        """Plain JSON of every setting that the result of "train" or of "evaluate" depends on, beside the domain itself.

        Base fingerprint, hyperparameters, head, image size ("train"); limits and split as well ("evaluate"). Adapters and
        experiences are cached under it, so what is left out here goes stale unseen.
        """
        ...

    def fingerprint(self, experience: Experience) -> str:
        """A content hash of a domain's rows of all splits: what changes when its data does."""
        ...

    def leads(self) -> bool:
        """Whether later adapters depend on the order's first domain (a head learned there). False: adapters are order-free."""
        ...

    def remembers(self) -> bool:
        """Whether evaluations use the buffer's rows (prototypes of classes): all of them are then cached by these too."""
        ...

    def begin(self, seed: int, lead: Path | None) -> None:
        """Set what all experiences of one run share: a head drawn from `seed`, or the one saved in the folder `lead`, the
        adapter of the order's first domain. Called before anything below; `lead` is None unless :meth:`leads`."""
        ...

    def train(self, experiences: Sequence[Experience], out: Path, seed: int, init: Path | None = None) -> Path:
        """Train an adapter from the base on one domain, or jointly on several, and write it to `out`; returns `out`.

        init: an adapter folder to go on from (sequential fine-tuning), of the same settings. `out` appears whole, and a
        killed call goes on or begins anew. With a head learned on the first domain (:meth:`leads`), a call before any
        `lead` has been given trains the head too and saves it in `out`; so does a joint one.
        """
        ...

    def labels(self, experience: Experience, split: str) -> tuple[list[str], list[str]]:
        """(ids, labels) of a split's rows, in its order; ids are stable and unique in the stream."""
        ...

    def rows(self, experience: Experience, ids: Sequence[str]) -> list[dict[str, Any]]:
        """What a buffer stores of these training rows: plain JSON (a text's prompt, answer and options; {} for images)."""
        ...

    def features(self, experience: Experience, ids: Sequence[str]) -> Tensor:
        """Features [n, d] (float32, CPU) of training rows under the plain base: what herding selects by."""
        ...

    def objective(self, rows: Sequence[BufferRow], kind: str = "answer") -> Objective:
        """The loss over buffer rows, for gradients: "answer" (labels) or "entropy" (none are looked at).

        Its strata are "domain/label". Nothing is set in the model: the learner does that.
        """
        ...

    def inputs(self, rows: Sequence[BufferRow]) -> list[dict[str, Any]]:
        """These rows' inputs in batches of keywords for ``model(**batch)``, no labels among them: what RegMean runs."""
        ...

    def check_balance(self) -> None:
        """Raises LoralloyError where no merge of this stream can be balanced (see :meth:`answering`)."""
        ...

    def answering(self, rows: Sequence[BufferRow]) -> Answering:
        """The answers to these rows' inputs, their labels not looked at: what a merge is balanced by.

        Raises LoralloyError for rows that do not have the same classes to answer with, and a head that is made anew of rows.
        """
        ...

    def after_merge(self, rows: Sequence[BufferRow], step: Path | None = None) -> None:
        """Called when a composition has been set in the model, before it is evaluated: prototypes are recomputed from the
        buffer's rows here. `step`: the merged adapter's folder, from which a head that was saved with it is read
        (joint and sequential training); None keeps the run's own head. Text has nothing to do."""
        ...

    def evaluate(self, experience: Experience) -> Evaluation:
        """Score a domain's test rows under whatever composition is set in `model`."""
        ...


def make_workshop(stream: DomainStream) -> Workshop:
    """The workshop of a stream's kind, with its base model loaded. Raises LoralloyError for a missing model or data."""
    if stream.fields.kind == "images":
        from .images import ImageWorkshop

        return ImageWorkshop.from_stream(stream)
    from .text import TextWorkshop

    return TextWorkshop.from_stream(stream)


@contextlib.contextmanager
def composed(workshop: Workshop, folder: Path | None) -> Iterator[None]:
    """The adapter in `folder` inside the workshop's model for the block, exactly as it is on disk; None is the plain base."""
    if folder is None:
        yield
        return
    import torch

    from ..bank import Bank
    from ..live.composed import LiveModel
    from ..live.learnable import Learnable
    from ..weights import Weights

    bank = Bank.load([folder])
    weights = Weights({bank.names[0]: 1.0})
    if next(workshop.model.parameters()).dtype in (torch.float16, torch.bfloat16):
        # beside the base, as PEFT runs it: added to a 16-bit weight, much of a small dW would be rounded away
        beside = LiveModel(workshop.model, bank, workshop.base)
        try:
            with beside.compose(weights):
                yield
        finally:
            beside.remove()
        return
    inside = Learnable(workshop.model, bank, "linear", "delta", base=workshop.base)
    try:
        with torch.no_grad():
            inside.set(weights)
        yield
    finally:
        inside.remove()
