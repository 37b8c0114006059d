"""An adapter whose answers are not all drawn to one side: the mean of its answers over unlabelled inputs, evened out.

Away from the texts that it was trained on, and beside another adapter, a task adapter may still tell its classes apart
and yet call most inputs the same: the scores of all inputs are shifted alike. With log p(k | x) the model's
log-probabilities of the answers, over unlabelled inputs x,

    shift_k = mean_x log p(k | x) - mean over k of the same,

is taken out. It is the prior of the answers that "batch calibration" (Zhou et al., ICLR 2024) divides by where a model
is used; here it is folded into the adapter. At the adapter's last module that writes to the residual stream,

    dW -> [dW]_(r-1) + (sum_k b_k u_k) v^T,    v = x-bar / ||x-bar||^2,

[dW]_(r-1) is the best of rank r - 1; x-bar is the module's mean input at the token where answers are read, so that
v^T x is 1 there on average; u_k would raise answer k alone if the answers were read off the residual stream as they are (from
the answers' rows of the output embedding; the norm before it is left out). b is found in a few passes over the inputs, each step
by what the steps before it did (Broyden 1965). No labels, no gradients; the rank stays.

It takes the classes to be about equally frequent. To fold the calibration into a merged adapter is this project's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import LoralloyError
from ..factors import LoraFactors, truncate
from .hosts import Reading, check_saved, hosts

if TYPE_CHECKING:
    from torch import nn

Answers = Callable[[], Tensor]
PASSES = 10
ENOUGH = 0.02  # nats: the largest |shift| that is left alone
_FIRST = 0.05  # of the module's own answer: the size of the first step
_LONGEST = 1.0  # of the same: of any step
_ALIKE = 1e-3  # relative length of answers' directions below which they cannot be told apart


@dataclass(frozen=True)
class Balanced:
    """What came out.

    Attributes:
        adapter: the balanced one.
        module: where the shift is taken out.
        before, after: the largest |shift_k|, nats.
        passes: over the inputs.
    """

    adapter: Adapter
    module: str
    before: float
    after: float
    passes: int


def marked(done: Balanced, name: str | None = None, **more: Any) -> Adapter:
    """The balanced adapter with what was done to it in its provenance (and on its card); `more` is written beside it."""
    made, told = done.adapter, {"module": done.module, "before": done.before, "after": done.after, **more}
    extra = {n: made.extra_tensor(n) for n in made.extra}
    said = {**made.provenance, "balanced": told}
    return Adapter(name or made.name, dict(made), made.config, made.base, extra, said, made.licence)


def shift(logp: Tensor) -> Tensor:
    """Mean log-probabilities of the answers over inputs, centred, [k]; `logp` [inputs, k].

    Raises LoralloyError for fewer than two inputs or answers, and for numbers that are none.
    """
    if logp.ndim != 2 or min(logp.shape) < 2:
        raise LoralloyError(f"answers are of shape {list(logp.shape)}; give at least two inputs and two answers")
    mean = logp.detach().cpu().double().mean(0)
    if not bool(torch.isfinite(mean).all()):
        raise LoralloyError("the answers are not numbers; load the model in float32, or check the adapters")
    return mean - mean.mean()


def balance(
    model: nn.Module,
    adapter: Adapter,
    answers: Answers,
    directions: Tensor,
    *,
    at: int = -1,
    module: str | None = None,
    passes: int = PASSES,
    enough: float = ENOUGH,
    on_pass: Callable[[], None] | None = None,
) -> Balanced:
    """Take the shift of an adapter's answers out of it.

    Args:
        model: the plain base.
        adapter: a merged one, or any.
        answers: runs the model over the unlabelled inputs: log-probabilities [inputs, k] (see :func:`.levels.text_answers`).
        directions: [k, out], what raises each answer in the residual stream (see :func:`text_directions`).
        at: the token whose output is read: -1 for the last (prompts are padded on the left), 0 for a class token. What is run
            over a cache (an answer's further tokens) is not read.
        module: where; None for that of the adapter's modules that writes `out` numbers, is no query, key or value projection,
            has a rank of 2 or more, and is run last.
        passes: over the inputs, at most; 2 or more.
        enough: the largest |shift| that is left alone, nats.
        on_pass: progress.

    Where a later pass gives no numbers (factors or scores that overflow), the best of those before it is what comes back.

    Raises LoralloyError for an adapter of rank 1 there, tensors that it saved whole and that are not the model's own, answers
    that begin alike, and where no step moves them.
    """
    from ..live.merged_rows import MergedRows
    from ..live.names import ModelNames

    if passes < 2:
        raise LoralloyError(f"{passes} passes: the first only looks; give 2 or more")
    check_saved(model, adapter)
    adapter = ModelNames(model).adapter(adapter)
    names = hosts(model, adapter, directions.shape[1], module)
    directions = directions.detach().cpu().double()
    _check_apart(directions)
    rows = MergedRows(model)
    used = 0

    def look(made: Adapter) -> Tensor:
        nonlocal used
        with torch.no_grad(), rows.use([made], [0]):
            found = shift(answers())
        used += 1
        if on_pass is not None:
            on_pass()
        return found

    wrong: LoralloyError | None = None
    try:
        with Reading(model, names, at) as seen:
            now = look(adapter)
        if len(now) != len(directions):
            raise LoralloyError(f"there are {len(now)} answers and {len(directions)} directions; give one of each")
        before = float(now.abs().max())
        if before <= enough:
            return Balanced(adapter, seen.last or names[-1], before, before, used)
        if (name := seen.last) is None:
            raise LoralloyError(
                f"the answers were given without a run of module {names[-1]!r} over [inputs, tokens, width]; leave the balance "
                "out, or name another with `module`"
            )
        mean, answer = seen.of(name)
        if not bool(mean.any()) or not answer > 0:
            raise LoralloyError(f"module {name!r} is given or answers zeros alone; name another with `module`")
        factors = adapter[name]
        kept = truncate(factors, factors.rank - 1)[0]
        v = mean / mean.square().sum()
        lift = torch.linalg.pinv(directions - directions.mean(0), rtol=_ALIKE)  # [out, k]: to raise each answer by 1
        step = -now / float(now.norm())
        if not (written := float((lift @ step).norm())) > 1e-6 * float(torch.linalg.matrix_norm(lift)):
            raise LoralloyError(
                "no sum of the answers' directions evens them out; leave the balance out, or use other answers"
            )
        step = step * (_FIRST * answer / written)
        total, best, inverse = torch.zeros_like(now), (before, adapter), None
        for _ in range(passes - 1):
            step = step * min(1.0, _LONGEST * answer / max(float((lift @ step).norm()), 1e-300))
            total = total + step
            try:
                made = _with(adapter, name, _joined(factors, kept, lift @ total, v))
                then = look(made)
            except LoralloyError as error:  # a step too far: the model did answer before
                wrong = error
                break
            left = float(then.abs().max())
            if left < best[0]:
                best = (left, made)
            if left <= enough:
                break
            inverse = _learned(inverse, step, then - now)
            if inverse is None:
                break
            now, step = then, -(inverse @ then)
    finally:
        rows.remove()
    if best[1] is adapter:
        why = "" if wrong is None else f" ({wrong})"
        raise LoralloyError(
            f"nothing that is written at module {name!r} evens the answers out{why}; leave the balance out, or name another with "
            "`module`"
        )
    return Balanced(best[1], name, before, best[0], used)


def text_directions(model: nn.Module, tokenizer: Any, labels: Sequence[str]) -> Tensor:
    """[k, out], float32 on the CPU: the output embedding of each answer's first token.

    Raises LoralloyError for labels that begin with the same token, and a model without an output embedding.
    """
    from ..live.scoring import encode_answer

    weight = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    if weight is None or not weight.is_floating_point():
        raise LoralloyError("the model has no output embedding to read, so nothing is known to raise an answer")
    seen: dict[int, str] = {}
    for label in labels:
        token = encode_answer(tokenizer, label)[0]
        if token in seen:
            raise LoralloyError(
                f"the answers begin with the same token ({seen[token]!r} and {label!r}), so one direction raises both; leave the "
                "balance out, or use other labels"
            )
        seen[token] = label
    return weight.detach()[torch.tensor(list(seen), device=weight.device)].float().cpu()


def _check_apart(directions: Tensor) -> None:
    """Raise LoralloyError for two answers that one direction raises."""
    near = torch.pdist(directions) <= _ALIKE * directions.norm(dim=1).max()
    if bool(near.any()):
        raise LoralloyError(
            "two answers begin with the same token, so one direction raises both; leave the balance out, or use other labels"
        )


def _joined(like: LoraFactors, kept: LoraFactors, u: Tensor, v: Tensor) -> LoraFactors:
    """kept + u v^T as factors of the rank and dtype of `like`, scaling included."""
    root = float((u.norm() / v.norm()).sqrt()) or 1.0
    a = torch.cat([kept.a.double(), (v * root)[None].to(kept.a.device)])
    b = torch.cat([kept.b.double() * kept.scaling, (u / root)[:, None].to(kept.b.device)], 1)
    return LoraFactors(a.to(like.A.dtype), b.to(like.B.dtype), 1.0, like.kind)


def _with(adapter: Adapter, name: str, factors: LoraFactors) -> Adapter:
    parts = {m: factors if m == name else adapter[m] for m in adapter}
    extra = {n: adapter.extra_tensor(n) for n in adapter.extra}
    return Adapter(adapter.name, parts, adapter.config, adapter.base, extra, adapter.provenance, adapter.licence)


def _learned(inverse: Tensor | None, step: Tensor, change: Tensor) -> Tensor | None:
    """The inverse Jacobian after one more step (Broyden 1965), at first a number by the identity; None where nothing moved."""
    if inverse is None:
        gain = float(change @ step) / float(step @ step)
        if gain > 0:
            return torch.eye(len(step), dtype=step.dtype) / gain
        if not (moved := float(change.norm())) > 0:
            return None
        inverse = torch.eye(len(step), dtype=step.dtype) * (float(step.norm()) / moved)  # the other way than asked
    moved_by = inverse @ change
    along = float(step @ moved_by)
    if abs(along) <= 1e-12 * float(step @ step):
        return None
    return inverse + torch.outer(step - moved_by, step @ inverse) / along
