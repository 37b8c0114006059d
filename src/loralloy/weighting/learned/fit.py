"""learn(): the coefficients of a merge by gradients, on a memory buffer as small as one sample a class."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from ...console import progress as progress_bar
from ...errors import LoralloyError
from ...live.learnable import Learnable
from ...memory import reused
from .coefficients import Coefficients, Form, Granularity
from .config import ENOUGH, FINE, LearnConfig
from .objective import Objective, frozen
from .result import Learned
from .run import Run

if TYPE_CHECKING:
    from ...bank import Bank
    from ...base_ref import BaseRef
    from ...merging.rule import Rule


def learn(
    model: nn.Module,
    bank: Bank,
    objective: Objective,
    *,
    rule: Rule | str | None = None,
    space: str | None = None,
    form: Form = "sigmoid",
    b_max: float = 3.0,
    granularity: Granularity | Literal["auto"] = "auto",
    config: LearnConfig | None = None,
    learnable: Learnable | None = None,
    base: BaseRef | None = None,
    progress: bool = True,
) -> Learned:
    """Learn the coefficients of a bank's merge under a rule (Coleman et al. 2024: form "sigmoid", granularity "adapter").

    Only the coefficients have gradients; the model's parameters are frozen meanwhile and put back after it, and so is the
    composition it carried. Start, hold-out, regularisation, schedule, other forms and granularities are ours.

    Args:
        model: the module tree that the bank's adapters are of.
        bank: the adapters; all take part.
        objective: what the coefficients are judged by.
        rule, space: how they combine; None is "linear", and the rule's default space.
        form, b_max, granularity: see :class:`Coefficients`. "auto" is "layer" where there are 40 samples or more, at least 4 of
            every stratum, else "adapter" (docs/learn.md says what that rests on).
        config: how they are fitted.
        learnable: the bank in the model already, which saves making the terms; `rule` and `space` are then its own.
        base: what the loaded model is, where known; it is checked against the bank's.
        progress: whether a bar is shown (on a terminal).

    Raises LoralloyError for a rule that cannot be learned through, a `learnable` of another model, bank or rule, settings out
    of range, and a loss that is not a number.
    """
    config = config or LearnConfig()
    began = time.perf_counter()
    if granularity == "auto":
        fewest = min(Counter(objective.strata).values(), default=0)
        granularity = "layer" if fewest >= ENOUGH and objective.size >= FINE else "adapter"
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # wherever it is called, gradients flow here
        stack.enter_context(torch.enable_grad())
        bar = stack.enter_context(progress_bar()) if progress else None
        live = learnable
        if live is None:
            task = bar.add_task("terms", total=len(bank.modules)) if bar else None
            step = (lambda _: bar.advance(task)) if bar and task is not None else None
            live = Learnable(model, bank, rule or "linear", space, base=base, on_module=step)
            stack.callback(live.remove)
        else:
            _check_learnable(live, model, bank, rule, space)
        start: float | Literal["zero"] = "zero" if isinstance(config.start, str) else config.start
        coefficients = Coefficients(live.names, live.modules, form, granularity, b_max, start, live.present).to(
            live.device
        )
        stack.enter_context(frozen(objective.model))
        stack.enter_context(frozen(model))
        stack.enter_context(live.at(None))
        stack.enter_context(reused(live.device))
        run = Run(live, objective, coefficients, config, bar)
        stack.callback(run.steps.close)
        searched = run.search() if config.start == "scale" else []
        start_scale = float(coefficients().detach()[live.present.to(live.device)].mean())
        best = run.fit()
    settings = {
        "rule": str(live.rule),
        "space": live.space,
        "form": form,
        "b_max": float(b_max),
        "granularity": granularity,
        **asdict(config),
        "regularisation": run.pull,
        "hold_out": len(run.held),
        "label_noise": run.noise,
        "rows": objective.size,
        "scales": [scale for scale, _ in searched],
        "start_scale": start_scale,
        "best_step": best,
        "replayed": run.steps.replayed,
    }
    weights = live.bank.own_weights(coefficients.weights({"settings": settings}))
    seconds = time.perf_counter() - began
    return Learned(weights, run.history, settings, seconds, start_scale, searched, best)


def _check_learnable(live: Learnable, model: nn.Module, bank: Bank, rule: Rule | str | None, space: str | None) -> None:
    from ...merging.basis import learnable as of

    if live.model is not model or live.names != bank.names or any(live.given[n] is not bank[n] for n in bank):
        raise LoralloyError("the given learnable is of another model or bank; make one of this model and bank")
    if rule is not None and str(of(rule, space or live.space)[0]) != str(live.rule):
        raise LoralloyError(f"the given learnable is of rule {live.rule}, not {rule}; make one for each rule")
    if space is not None and space != live.space:
        raise LoralloyError(f"the given learnable is of {live.space} space, not {space}; make one for each space")
