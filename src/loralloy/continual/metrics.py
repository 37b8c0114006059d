"""What a stream's accuracy matrix says: average and final accuracy, forgetting, backward and forward transfer.

The matrix R [T, T] has R[t][j], the accuracy on domain j after experience t; domains are in the order they arrived, both
counted from 0 here and from 1 in the papers. Entries above the diagonal (domains still to come) may be None, and a row may
be all None where nothing was evaluated after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from ..errors import LoralloyError

Matrix = Sequence[Sequence[float | None]]


def check(matrix: Matrix) -> int:
    """T. Raises LoralloyError for a matrix that is not square, and for a row with some of its domains seen missing."""
    size = len(matrix)
    if not size or any(len(row) != size for row in matrix):
        raise LoralloyError("an accuracy matrix has one row an experience and one column a domain, at least one")
    for t, row in enumerate(matrix):
        seen = [value is not None for value in row[: t + 1]]
        if any(seen) and not all(seen):
            raise LoralloyError(f"row {t} of the accuracy matrix has some of its domains seen, and not others")
    return size


def _at(matrix: Matrix, t: int, j: int) -> float:
    value = matrix[t][j]
    return math.nan if value is None else value


def average_accuracy(matrix: Matrix, t: int | None = None) -> float:
    """A_t = 1/(t+1) sum_{j<=t} R[t][j], of the domains seen; by default after the last experience: the final accuracy.

    ACC of Lopez-Paz & Ranzato 2017 (GEM), equation 2. nan where row t was not evaluated.
    """
    size = check(matrix)
    t = size - 1 if t is None else t
    return sum(_at(matrix, t, j) for j in range(t + 1)) / (t + 1)


def incremental_accuracy(matrix: Matrix) -> float:
    """1/T sum_t A_t: the average over experiences of the average accuracy (iCaRL, Rebuffi et al. 2017)."""
    return sum(average_accuracy(matrix, t) for t in range(check(matrix))) / len(matrix)


def forgetting(matrix: Matrix) -> float:
    """F = 1/(T-1) sum_{j<T-1} (max_{j<=l<T-1} R[l][j] - R[T-1][j]): what was known best, less what is left.

    Chaudhry et al. 2018 (Riemannian Walk), section 3; the maximum is over the experiences since the domain came. It may
    be negative, is at most 1, and nan for one experience.
    """
    last = check(matrix) - 1
    lost = [_worst_nan(_at(matrix, t, j) for t in range(j, last)) - _at(matrix, last, j) for j in range(last)]
    return sum(lost) / last if last else math.nan


def _worst_nan(values: Iterable[float]) -> float:
    """The maximum; nan where one is nan, which `max` may pass over."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found)


def backward_transfer(matrix: Matrix) -> float:
    """BWT = 1/(T-1) sum_{j<T-1} (R[T-1][j] - R[j][j]): below 0 what came later has cost the earlier domains.

    Lopez-Paz & Ranzato 2017, equation 3. nan for one experience.
    """
    last = check(matrix) - 1
    return sum(_at(matrix, last, j) - _at(matrix, j, j) for j in range(last)) / last if last else math.nan


def forward_transfer(matrix: Matrix, base: Sequence[float | None]) -> float:
    """FWT = 1/(T-1) sum_{j>=1} (R[j-1][j] - base[j]): what a domain gains before it comes, over the plain base model.

    Lopez-Paz & Ranzato 2017, equation 4, where the baseline is a random initialisation. nan for one experience, and
    where domains to come were not evaluated.
    """
    size = check(matrix)
    if len(base) != size:
        raise LoralloyError(f"{len(base)} baseline accuracies for {size} domains; give one a domain")
    known = [math.nan if b is None else b for b in base]
    return sum(_at(matrix, j - 1, j) - known[j] for j in range(1, size)) / (size - 1) if size > 1 else math.nan


@dataclass(frozen=True)
class Metrics:
    """All of them, of one run; nan where they are not defined or were not measured."""

    final_accuracy: float
    incremental_accuracy: float
    forgetting: float
    backward_transfer: float
    forward_transfer: float

    @staticmethod
    def of(matrix: Matrix, base: Sequence[float | None]) -> Metrics:
        return Metrics(
            average_accuracy(matrix), incremental_accuracy(matrix), forgetting(matrix), backward_transfer(matrix),
            forward_transfer(matrix, base),
        )  # fmt: skip

    def to_dict(self) -> dict[str, float | None]:
        """JSON has no nan: None stands for it."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}
