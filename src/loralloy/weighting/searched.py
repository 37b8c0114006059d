"""Coefficients by black-box search on a few examples: LoraHub's objective, for any merging rule.

LoraHub (Huang et al., COLM 2024, arXiv 2307.13269; its released code): minimise loss(w) + 0.05 mean |w| over w in [-1.5, 1.5]^n,
from w = 0, in 40 evaluations on a handful of examples. It takes Nevergrad's NGOpt and adds A to A and B to B; here the
optimiser is CMA-ES (Hansen's own pycma), and the rule is whichever is asked for. Needs the extra ``loralloy[search]``.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ..errors import LoralloyError
from ..merging import Rule
from ..merging.plan import Rank
from ..weights import Weights
from .candidates import Candidates
from .learned import Learned, Objective
from .learned.objective import frozen, shares

if TYPE_CHECKING:
    from ..bank import Bank
    from ..base_ref import BaseRef

_ROWS = 32  # of one forward
_WORST = 1e30  # of a candidate whose loss is not a number: CMA-ES ranks, so any large value will do


@dataclass(frozen=True)
class SearchConfig:
    """How the search goes; the defaults are LoraHub's, but for `spread`, which its optimiser chooses itself.

    Attributes:
        budget: evaluations in all, the start's among them.
        bound: w stays within [-bound, bound].
        penalty: of mean |w|.
        spread: the first step's standard deviation.
        seed: of the search's own generator.
    """

    budget: int = 40
    bound: float = 1.5
    penalty: float = 0.05
    spread: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < 2:
            raise LoralloyError(f"budget is {self.budget!r}; give how many weights are tried, at least 2")
        for name in ("bound", "spread"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise LoralloyError(f"{name} is {getattr(self, name)}; it must be a number above 0")
        if not (math.isfinite(self.penalty) and self.penalty >= 0):
            raise LoralloyError(f"penalty is {self.penalty}; it must be a number of at least 0")


def search(
    model: nn.Module,
    bank: Bank,
    objective: Objective,
    *,
    rule: Rule | str = "linear",
    space: str | None = None,
    rank: Rank = "full",
    config: SearchConfig | None = None,
    candidates: Candidates | None = None,
    base: BaseRef | None = None,
    progress: bool = True,
) -> Learned:
    """One coefficient an adapter, by CMA-ES on the objective's loss over all its examples + penalty * mean |w|.

    Args:
        model, bank, base: the base model and adapters of it.
        objective: what is minimised (no gradients are taken).
        rule, space: any merging rule; one that is not a sum of terms is merged for each candidate.
        rank: of those merges; see :class:`Candidates`.
        config: LoraHub's numbers by default.
        candidates: made already for this rule, space and rank; left in the model.
        progress: show a bar.

    Returns what was best of all that was tried, the start w = 0 included; its history has a row an evaluation.
    Raises LoralloyError where pycma is missing or no candidate has a finite loss, and what :class:`Candidates` raises.
    """
    config = config or SearchConfig()
    propose = _optimiser(len(bank.names), config)
    began, own = time.perf_counter(), candidates is None
    held = candidates or Candidates(model, bank, rule, space, rank, base=base)
    history: list[dict[str, Any]] = []
    best = -1
    try:
        with frozen(model), _bar(config.budget) if progress else contextlib.nullcontext(lambda _: None) as tell:
            answer: float | None = None
            while len(history) < config.budget:
                w = propose(answer)
                if w is None:  # it has converged
                    break
                alpha = dict(zip(bank.names, w.tolist(), strict=True))
                with held.at(Weights(alpha)):
                    loss = loss_of(objective)
                value = loss + config.penalty * float(np.abs(w).mean())
                answer = value if math.isfinite(value) else _WORST
                if math.isfinite(value) and (best < 0 or value < history[best]["value"]):
                    best = len(history)
                history.append({"step": len(history), "loss": loss, "held_out": None, "alpha": alpha, "value": value})
                tell(history[best]["value"] if best >= 0 else math.nan)
    finally:
        if own:
            held.remove()
    if best < 0:
        raise LoralloyError(
            f"the loss of none of {len(history)} candidates is a number; load the model in float32, or check the adapters"
        )
    settings = {
        "rule": str(held.rule), "space": held.space, "rank": held.rank, **asdict(config), "rows": objective.size,
        "evaluations": len(history), "best_step": best,
    }  # fmt: skip
    weights = Weights(history[best]["alpha"], "searched", {"settings": settings, "loss": history[best]["loss"]})
    return Learned(weights, history, settings, time.perf_counter() - began, 0.0, [], best)


def loss_of(objective: Objective) -> float:
    """The loss over all examples, in parts where the objective can tell the loss of each."""
    rows = range(objective.size)
    losses: Any = getattr(objective, "losses", None)
    if losses is None:
        return float(objective.loss(rows))
    weights = shares(objective.strata, rows)
    parts = [(losses(rows[at : at + _ROWS]), weights[at : at + _ROWS]) for at in range(0, len(rows), _ROWS)]
    return float(sum(values @ values.new_tensor(share) for values, share in parts))


def check_installed() -> None:
    """Raise LoralloyError where pycma is missing."""
    try:
        import cma  # noqa: F401
    except ImportError:
        raise LoralloyError("the search strategy needs pycma: pip install 'loralloy[search]'") from None


def _optimiser(n: int, config: SearchConfig) -> Callable[[float | None], np.ndarray | None]:
    """What to try next, given the value of what was tried last (None at first): w = 0, then CMA-ES's candidates.

    pycma would seed NumPy's global generator: it gets one of its own.
    """
    check_installed()
    import cma

    random = np.random.default_rng(config.seed)
    strategy = cma.CMAEvolutionStrategy(
        np.zeros(n),
        config.spread,
        {
            "bounds": [-config.bound, config.bound],
            "seed": math.nan,  # "do nothing", in pycma's words
            "randn": lambda *shape: random.standard_normal(shape),
            "verbose": -9,
            "verb_log": 0,
            "verb_disp": 0,
        },
    )

    def walk() -> Iterator[np.ndarray]:
        yield np.zeros(n)
        while not strategy.stop():
            population = strategy.ask()
            values.clear()
            for x in population:
                yield np.clip(x, -config.bound, config.bound)
            strategy.tell(population, values)

    values: list[float] = []
    steps = walk()

    def propose(answer: float | None) -> np.ndarray | None:
        if answer is not None:
            values.append(answer)
        return next(steps, None)

    return propose


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[float], None]]:
    from ..console import progress

    with progress() as bar:
        task = bar.add_task("search", total=total)
        yield lambda best: bar.update(task, advance=1, description=f"search, best {best:.4f}")
