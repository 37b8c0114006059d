"""One run of the learner: which rows are held out, the search for a start, and the gradient steps."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...errors import LoralloyError
from ...live.learnable import Learnable
from .coefficients import NEAR, WIDE, Coefficients
from .config import ENOUGH, NOISE, LearnConfig
from .objective import Objective, shares
from .replay import Steps

_Part: TypeAlias = tuple[
    tuple[int, ...], tuple[float, ...]
]  # rows, and their shares of the loss (none: the objective's own)
_LOOK = 10  # steps between looks at the device: reading a loss waits for it


class Run:
    """One run's state: rows, coefficients, and what has been seen of the losses."""

    def __init__(
        self, live: Learnable, objective: Objective, coefficients: Coefficients, config: LearnConfig, bar: Any
    ) -> None:
        self.live, self.objective, self.coefficients, self.config, self.bar = live, objective, coefficients, config, bar
        strata, fraction = list(objective.strata), config.hold_out
        if objective.size < 1 or len(strata) != objective.size:
            raise LoralloyError(
                f"the objective has {objective.size} examples and {len(strata)} strata; give one stratum each"
            )
        by_stratum: dict[str, list[int]] = {}
        for i, stratum in enumerate(strata):
            by_stratum.setdefault(stratum, []).append(i)
        fewest = min(map(len, by_stratum.values()))
        enough = fewest >= ENOUGH
        if fraction == "auto":
            fraction = 0.25 if enough else 0.0
        self.shares = WIDE if config.scales == "wide" or (config.scales == "auto" and enough) else NEAR
        rng = random.Random(config.seed)
        held = [
            i for rows in by_stratum.values() for i in rng.sample(rows, min(int(fraction * len(rows)), len(rows) - 1))
        ]
        self.held = sorted(held)
        self.rows = sorted(set(range(objective.size)) - set(held))
        fewest = min(sum(i in set(self.rows) for i in rows) for rows in by_stratum.values())
        given = config.regularisation
        self.pull = 0.1 / min(max(fewest, 1), 16) if given is None else given
        self.history: list[dict[str, Any]] = []
        self.steps = Steps(live, config.replay and hasattr(objective, "feed"))
        self._rng = rng
        self._shares: dict[_Part, Tensor] = {}
        self._floors: dict[_Part, Tensor] = {}
        self.choices: Sequence[int] = getattr(objective, "choices", ())
        if len(self.choices) not in (0, objective.size):
            raise LoralloyError(
                f"the objective has {objective.size} examples and {len(self.choices)} choices; give one each, or none"
            )
        choosing = (
            Counter(s for s, n in zip(strata, self.choices, strict=False) if n) if hasattr(objective, "losses") else {}
        )
        noise = config.label_noise
        self.noise = (NOISE if min(choosing.values(), default=ENOUGH) < ENOUGH else 0.0) if noise == "auto" else noise
        if self.noise and not choosing:
            raise LoralloyError(
                f"label_noise is {self.noise:g}, and no example chooses among options (the objective's `choices`); "
                "give examples with options, or 0"
            )
        self._waiting: list[tuple[int, Tensor]] = []

    # -- losses --------------------------------------------------------------------------------------------------------

    def parts(self, rows: Sequence[int], step: int) -> Iterator[tuple[_Part, Callable[[], Tensor]]]:
        """The loss over rows as a sum of parts, each of so many rows that memory is bounded, and of about one length."""
        size, losses = self.config.rows_at_once, getattr(self.objective, "losses", None)
        if losses is None or (len(rows) <= size and not self.noise):
            yield (tuple(rows), ()), lambda: self.objective.loss(rows, step)
            return
        if lengths := getattr(self.objective, "lengths", None):
            rows = sorted(rows, key=lambda i: lengths[i])
        weights = shares(self.objective.strata, rows)
        for at in range(0, len(rows), size):
            some = (tuple(rows[at : at + size]), tuple(weights[at : at + size]))

            def part(some: _Part = some) -> Tensor:
                values = losses(list(some[0]), step)
                if some not in self._shares:  # kept: a recorded step must not wait for the device
                    self._shares[some] = values.new_tensor(some[1])
                    self._floors[some] = self._floor(some, values)
                if self.noise:
                    kept, chance = self._floors[some]
                    values = -torch.logaddexp(kept - values, chance)
                return values @ self._shares[some]

            yield some, part

    def _floor(self, some: _Part, like: Tensor) -> Tensor:
        """[2, rows]: log(1 - noise) and log(noise / choices) of each; 0 and -inf, which change nothing, without choices."""
        e, choices = self.noise, [self.choices[i] if self.noise else 0 for i in some[0]]
        pairs = [(math.log1p(-e), math.log(e / n)) if n else (0.0, -math.inf) for n in choices]
        return like.new_tensor(pairs).T

    def losses(
        self, rows: Sequence[int], step: int, table: Tensor, gradient: bool, more: int = 0
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Of each part, (loss, its gradient towards the table or None)."""
        kind = (gradient, step > 0)  # the first step sees rows as they are, later ones may see them augmented
        feed = getattr(self.objective, "feed", None)
        for some, part in self.parts(rows, step):
            inputs = feed(some[0], step) if feed is not None and self.steps.record else None
            yield self.steps.run(
                part, table, (kind, some), gradient, more, (inputs, self._shares.get(some), self._floors.get(some))
            )

    @torch.no_grad()
    def loss(self, rows: Sequence[int], step: int = 0, more: int = 0) -> Tensor:
        """The loss under the coefficients as they are."""
        table = self.coefficients()
        return torch.stack([loss.float() for loss, _ in self.losses(rows, step, table, False, more)]).sum()

    # -- the start -----------------------------------------------------------------------------------------------------

    def search(self) -> list[tuple[float, float]]:
        """Start from the uniform scale with the least loss on the buffer (the smallest of equals).

        Tried are those near the scale at which the merge is as long as an adapter (:meth:`Learnable.matching_scale`): on a
        few rows a far larger one may have the least loss by luck, and it takes the model to where no adapter has been; one
        row that is answered wrong with confidence takes the search to a far smaller one, at which nothing is said with any.
        """
        given = () if isinstance(self.config.scales, str) else self.config.scales
        grid = given or self.coefficients.scales(self.live.matching_scale(), self.shares)
        scales = [s for s in grid if self.coefficients.holds(s)]
        if not scales:
            low, high = self.coefficients.range
            raise LoralloyError(f"none of the scales {list(given)} is within ({low:g}, {high:g}); give some that are")
        task = self.bar.add_task("start", total=len(scales)) if self.bar else None
        losses = []
        for scale in scales:
            self.coefficients.reset(scale)
            losses.append(self.loss(self.rows))
            if self.bar:
                self.bar.advance(task)
        found = list(zip(scales, torch.stack(losses).tolist(), strict=True))
        finite = [pair for pair in found if math.isfinite(pair[1])]
        if not finite:
            raise LoralloyError(
                "the loss is not a number at any scale; load the model in float32, or check the adapters"
            )
        self.coefficients.reset(min(finite, key=lambda pair: pair[1])[0])
        return found

    # -- gradients -----------------------------------------------------------------------------------------------------

    def fit(self) -> int:
        """Gradient steps; leaves the best coefficients and returns their step (without a hold-out, the last)."""
        config, coefficients = self.config, self.coefficients
        parameters = [p for p in coefficients.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(parameters, lr=config.lr)
        origin = coefficients.c.detach().clone()
        task = self.bar.add_task("learn", total=config.steps) if self.bar else None
        batches = self._batches()
        best, best_loss, best_step = coefficients.state(), None, 0
        for step in range(config.steps + 1):
            held = None
            if self.held:
                held = self.loss(self.held, more=config.steps - step)
                # kept on the device: a comparison here would wait for it
                better = held < best_loss if best_loss is not None else torch.ones_like(held, dtype=torch.bool)
                best = torch.where(better, coefficients.state(), best)
                best_loss = held if best_loss is None else torch.where(better, held, best_loss)
            last = step == config.steps
            loss = self.loss(self.rows, step) if last else self._gradient(next(batches), step, origin, optimiser)
            self._note(step, loss, held)
            if not last:
                for group in optimiser.param_groups:
                    group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
                optimiser.step()
                if self.bar:
                    self.bar.advance(task)
            if last or (step + 1) % _LOOK == 0:
                self._look()
                if self.held:
                    best_step = min(range(len(self.history)), key=lambda i: self.history[i]["held_out"])
                    if step - best_step >= config.patience:
                        break
        if self.held:
            coefficients.restore(best)
            return best_step
        return len(self.history) - 1

    def _gradient(self, rows: Sequence[int], step: int, origin: Tensor, optimiser: torch.optim.Optimizer) -> Tensor:
        """Gradients of the loss and of the pull towards the start; returns the loss."""
        optimiser.zero_grad(set_to_none=True)
        table = self.coefficients()
        total, slope = torch.zeros((), device=origin.device), torch.zeros_like(table)
        for loss, grad in self.losses(rows, step, table.detach(), True, self.config.steps - step):
            total, slope = total + loss, slope + grad  # type: ignore[operator]
        table.backward(slope)
        if self.pull:
            (self.pull * (self.coefficients.c - origin).square().mean()).backward()
        return total

    def _batches(self) -> Iterator[list[int]]:
        """All rows at every step, or shuffled batches, epoch after epoch."""
        size = self.config.batch_size
        while True:
            if size is None or size >= len(self.rows):
                yield self.rows
                continue
            order = self._rng.sample(self.rows, len(self.rows))
            for at in range(0, len(order), size):
                yield order[at : at + size]

    def _note(self, step: int, loss: Tensor, held: Tensor | None) -> None:
        with torch.no_grad():
            table, there = self.coefficients(), self.coefficients.present
            alpha = (table * there).sum(0) / there.sum(0).clamp(min=1)
        nothing = torch.full_like(loss, torch.nan)
        self._waiting.append(
            (step, torch.cat([torch.stack([loss, nothing if held is None else held]).to(alpha), alpha]))
        )

    def _look(self) -> None:
        """What has been noted, fetched in one transfer and checked."""
        values = torch.stack([v for _, v in self._waiting]).tolist()
        for (step, _), (loss, held, *alpha) in zip(self._waiting, values, strict=True):
            if not (math.isfinite(loss) and (math.isfinite(held) or not self.held)):
                raise LoralloyError(
                    f"the loss is not a number at step {step}; lower the rate, or load the model in float32"
                )
            named = dict(zip(self.coefficients.names, alpha, strict=True))
            entry = {"step": step, "loss": loss, "held_out": held if self.held else None, "alpha": named}
            self.history.append(entry)
        self._waiting.clear()
