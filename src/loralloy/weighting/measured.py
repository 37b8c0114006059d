"""Loss and accuracy of compositions on a few text examples, by domain: what learned weights are compared by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..weights import Weights

if TYPE_CHECKING:
    from .candidates import Candidates
    from .learned import TextObjective

_ROWS = 16
DOUBT = 3.0  # nats: an answer of probability below 5 %, another option being likelier


@dataclass(frozen=True)
class Figures:
    """Of one composition on one set of examples.

    loss: mean of the objective, nats; each class of a domain counts the same. accuracy: share of the examples with options
    whose likeliest option is the answer; None where none has both. n: how many there are. kind: of the objective, "answer" or
    "entropy". doubtful: the ids of examples whose answer has a loss above DOUBT and is not the likeliest option.
    """

    loss: float
    accuracy: float | None
    n: int
    kind: str = "answer"
    doubtful: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        found = {("loss" if self.kind == "answer" else self.kind): self.loss, "accuracy": self.accuracy, "n": self.n}
        return found | ({"doubtful": list(self.doubtful)} if self.doubtful else {})


def measure(
    candidates: Candidates,
    objective: TextObjective,
    compositions: Mapping[str, Weights | None],
    rows: Sequence[int] | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Figures]]:
    """composition -> domain -> figures; the domain "" is all of them together.

    Args:
        candidates: the bank in the model; None among the compositions is the plain base.
        objective: text examples, labelled or for entropy.
        rows: which of them; all by default.
        on_rows: called with a number of examples when they are done (progress).
    """
    import torch

    chosen = list(range(objective.size)) if rows is None else list(rows)
    order = sorted(chosen, key=lambda i: len(objective.examples[i].prompt))
    result = {}
    for name, weights in compositions.items():
        loss: dict[int, float] = {}
        right: dict[int, bool] = {}
        with candidates.at(weights):
            for start in range(0, len(order), _ROWS):
                part = order[start : start + _ROWS]
                losses = objective.losses(part)
                for i, value in zip(part, losses.tolist(), strict=True):
                    loss[i] = value
                judged = [i for i in part if objective.examples[i].options and objective.examples[i].answer]
                if judged:
                    best = torch.stack([s.argmax() for s in objective.scores(judged)]).tolist()
                    for i, k in zip(judged, best, strict=True):
                        right[i] = objective.examples[i].options[k] == objective.examples[i].answer
                if on_rows:
                    on_rows(len(part))
        domains = dict.fromkeys(objective.examples[i].task for i in chosen)
        sets = {"": chosen} | {d: [i for i in chosen if objective.examples[i].task == d] for d in domains if d}
        result[name] = {d: _figures(objective, members, loss, right) for d, members in sets.items()}
    return result


def _figures(
    objective: TextObjective, rows: Sequence[int], loss: Mapping[int, float], right: Mapping[int, bool]
) -> Figures:
    by_stratum: dict[str, list[float]] = {}
    for i in rows:
        by_stratum.setdefault(objective.strata[i], []).append(loss[i])
    means = [sum(values) / len(values) for values in by_stratum.values()]
    judged = [right[i] for i in rows if i in right]
    accuracy = sum(judged) / len(judged) if judged else None
    answered = rows if objective.kind == "answer" else ()
    doubtful = tuple(objective.examples[i].id for i in answered if not right.get(i, True) and loss[i] > DOUBT)
    return Figures(sum(means) / len(means), accuracy, len(rows), objective.kind, doubtful)
