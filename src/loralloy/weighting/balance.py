"""An adapter whose answers are not all drawn to one side: the mean of its answers over unlabelled inputs, evened out.

Away from the texts that it was trained on, and beside another adapter, a task adapter may still tell its classes apart
and yet call most inputs the same: the scores of all inputs are shifted alike. With log p(k | x) the model's
log-probabilities of the answers, over unlabelled inputs x,

    shift_k = mean_x log p(k | x) - mean over k of the same,

is taken out. It is the prior of the answers that "batch calibration" (Zhou et al., ICLR 2024) divides by where a model
is used; here it is folded into the adapter. At the adapter's last module that writes to the residual stream,

    dW -> [dW]_(r-1) + (sum_k b_k u_k) v^T,    v = x-bar / ||x-bar||^2,

[dW]_(r-1) is the best of rank r - 1; x-bar is the module's mean input at the token where answers are read, so that
v^T x is about 1 there; u_k raises answer k alone, to first order (from the answers' rows of the output embedding). b is
found in a few passes over the inputs, each step by what the steps before it did (Broyden 1965). No labels, no
gradients; the rank stays.

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

if TYPE_CHECKING:
    from torch import nn

Answers = Callable[[], Tensor]
PASSES = 10
_FIRST = 0.05  # of the module's own answer: the size of the first step
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


def shift(logp: Tensor) -> Tensor:
    """Mean log-probabilities of the answers over inputs, centred, [k]; `logp` [inputs, k].

    Raises LoralloyError for fewer than two inputs or answers, and for numbers that are none.
    """
    if logp.ndim != 2 or min(logp.shape) < 2:
        raise LoralloyError(f"answers are of shape {list(logp.shape)}; give at least two inputs and two answers")
    mean = logp.double().mean(0)
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
    enough: float = 0.02,
    on_pass: Callable[[], None] | None = None,
) -> Balanced:
    """Take the shift of an adapter's answers out of it.

    Args:
        model: the plain base.
        adapter: a merged one, or any.
        answers: runs the model over the unlabelled inputs: log-probabilities [inputs, k] (see :func:`.levels.text_answers`).
        directions: [k, out], what raises each answer in the residual stream (see :func:`text_directions`).
        at: the token whose output is read: -1 for the last (prompts are padded on the left), 0 for a class token.
        module: where; None for the last of the adapter's modules that writes `out` numbers.
        passes: over the inputs, at most.
        enough: the largest |shift| that is left alone, nats.
        on_pass: progress.

    Raises LoralloyError for an adapter of rank 1 there, answers that begin alike, and where no step moves them.
    """
    from ..live.merged_rows import MergedRows

    name = module or _last(model, adapter, directions.shape[1])
    factors = adapter[name]
    if factors.rank < 2:
        raise LoralloyError(f"module {name!r} of adapter {adapter.name!r} has rank 1: there is no room for a balance")
    spread = directions.double() - directions.double().mean(0)
    size = float(torch.linalg.matrix_norm(spread))
    if size <= _ALIKE * float(torch.linalg.matrix_norm(directions.double())):
        raise LoralloyError("the answers begin with the same token, so one direction raises them all; use other labels")
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

    try:
        with _reading(model.get_submodule(name), at) as read:
            now = look(adapter)
        before = float(now.abs().max())
        if before <= enough:
            return Balanced(adapter, name, before, before, used)
        if (seen_there := read()) is None:
            raise LoralloyError(f"the answers were given without a run of module {name!r}; name another with `module`")
        mean, answer = seen_there
        kept = truncate(factors, factors.rank - 1)[0]
        v = mean / mean.square().sum()
        lift = torch.linalg.pinv(spread, rtol=_ALIKE)  # [out, k]: what raises the answers by so much, to first order
        step = -now / float(now.norm())
        step = step * (_FIRST * answer / float((lift @ step).norm()))
        total, best, inverse = torch.zeros_like(now), (before, adapter), None
        for _ in range(passes - 1):
            total = total + step
            made = _with(adapter, name, _joined(factors, kept, lift @ total, v))
            seen = look(made)
            left = float(seen.abs().max())
            if left < best[0]:
                best = (left, made)
            if left <= enough:
                break
            inverse = _learned(inverse, step, seen - now)
            if inverse is None:
                break
            now, step = seen, -(inverse @ seen)
    finally:
        rows.remove()
    if best[1] is adapter:
        raise LoralloyError(
            f"nothing that is written at module {name!r} evens the answers out; name another with `module`"
        )
    return Balanced(best[1], name, before, best[0], used)


def text_directions(model: nn.Module, tokenizer: Any, labels: Sequence[str]) -> Tensor:
    """[k, out], float32 on the CPU: the output embedding of each answer's first token."""
    from ..live.scoring import encode_answer

    weight = model.get_output_embeddings().weight  # type: ignore[operator]
    first = torch.tensor([encode_answer(tokenizer, label)[0] for label in labels], device=weight.device)
    return weight.detach()[first].float().cpu()


def _last(model: nn.Module, adapter: Adapter, out: int) -> str:
    """The last module, in the model's order, whose dW writes `out` numbers."""
    fits = [n for n, _ in model.named_modules() if n in adapter and adapter.outline(n).kind == "linear"]
    fits = [n for n in fits if adapter.outline(n).shape[0] == out and not n.endswith(_INNER)]
    if not fits:
        raise LoralloyError(
            f"adapter {adapter.name!r} has no linear module that writes {out} numbers; name one with `module`"
        )
    return fits[-1]


_INNER = ("q_proj", "k_proj", "v_proj", "query", "key", "value")  # of equal width, and not of the residual stream


def _joined(like: LoraFactors, kept: LoraFactors, u: Tensor, v: Tensor) -> LoraFactors:
    """kept + u v^T as factors of the rank and dtype of `like`, scaling included."""
    root = float((u.norm() / v.norm()).sqrt())
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
        return torch.eye(len(step), dtype=step.dtype) / gain if gain > 0 else None
    moved = inverse @ change
    along = float(step @ moved)
    return inverse + torch.outer(step - moved, step @ inverse) / along if abs(along) > 1e-12 else None


class _reading:
    """What a module is given and answers at one token, over all forwards inside."""

    def __init__(self, module: nn.Module, at: int) -> None:
        self.at, self.module = at, module
        self.total: Tensor | float = 0.0
        self.size, self.count = 0.0, 0

    def __enter__(self) -> Callable[[], tuple[Tensor, float] | None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = args[0].detach()
            if x.ndim != 3:
                return
            y = output.detach()[:, self.at].double()
            self.total = self.total + x[:, self.at].double().sum(0).cpu()
            self.size += float(y.norm(dim=-1).sum())
            self.count += len(x)

        self.handle = self.module.register_forward_hook(hook)
        return self._mean

    def _mean(self) -> tuple[Tensor, float] | None:
        """Mean input [in] and mean length of the output; None where the module was not run."""
        return (self.total / self.count, self.size / self.count) if isinstance(self.total, Tensor) else None

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()
