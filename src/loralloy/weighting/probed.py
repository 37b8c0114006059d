"""The probe: how strongly each adapter answers real activations of the base, at every module, in one pass of the base alone.

For adapter i, module m and the calibration tokens x that m is given,

    response_i(m) = mean over x of ||dW_i x|| / (||dW_i||_F ||x||), between 0 and 1.

It is a function of dW_i, so (A, B) and (G A, B G^-1) have the same; and dW_i -> c dW_i, c > 0, multiplies numerator and
denominator by c, so an adapter does not gain by being large. dW is never formed: with the r-by-r Gram matrix
B^T B = R^T R, ||B (A x)|| = ||R A x|| and ||dW||_F = ||R A||_F, so that all adapters of a module are one thin product.

"TaDA" (To et al. 2026, arXiv 2606.05016) has a probe "proved invariant to adapter weight magnitude", on N = 32 inputs. Its
formula is not public: this one, and all that :mod:`.gating` makes of it, is this project's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LoralloyError
from ..factors import LoraFactors, widest
from ..live.fit import check_fit
from ..live.names import ModelNames
from ..merging.cholesky import gram_root
from ..merging.subspace import Span, span
from .common import Common, Sketch
from .moments import Moments

if TYPE_CHECKING:
    from ..bank import Bank

Batch: TypeAlias = Mapping[str, Any]
Signal: TypeAlias = Literal["response", "norm", "base"]
SIGNALS: dict[Signal, str] = {
    "response": "||dW x|| / (||dW||_F ||x||)",
    "norm": "||dW x||, which grows with the adapter (as LoGo, arXiv 2511.07129, weighs adapters)",
    "base": "||dW x|| ||W0||_F / (||dW||_F ||W0 x||): against what the base's own weight answers",
}


@dataclass(frozen=True)
class Readings:
    """What a probe saw.

    Attributes:
        adapters: n names, in the bank's order.
        modules: M names.
        sums: by signal, over an input's tokens, [N, M, n]; NaN where an adapter has no such module or its dW is 0.
        tokens: that were counted, [N, M].
        left_out: modules that were not probed, with the reason.
        moments, common: by module, where they were asked for.
    """

    adapters: tuple[str, ...]
    modules: tuple[str, ...]
    sums: Mapping[str, np.ndarray]
    tokens: np.ndarray
    left_out: Mapping[str, str] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)
    common: Mapping[str, Common] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        return len(self.tokens)

    def mean(self, signal: Signal = "response", counts: np.ndarray | None = None) -> np.ndarray:
        """Mean over tokens, [M, n]; with `counts` [..., N], each input taken that often, [..., M, n].

        NaN where no token was seen.
        """
        if counts is None:
            counts = np.ones(self.inputs)
        total = np.tensordot(counts, self.sums[signal], 1)
        seen = np.tensordot(counts, self.tokens, 1)[..., None]
        return np.divide(total, seen, out=np.full_like(total, np.nan), where=seen > 0)

    def of(self, inputs: Sequence[int]) -> Readings:
        """The same of some inputs, without what is of all of them (moments, common directions)."""
        index = list(inputs)
        sums = {name: values[index] for name, values in self.sums.items()}
        return Readings(self.adapters, self.modules, sums, self.tokens[index], self.left_out)


class _Probe:
    """One module: the adapters' R A / ||dW||_F side by side, and what they answered."""

    def __init__(
        self,
        target: nn.Module,
        factors: Mapping[str, LoraFactors],
        names: Sequence[str],
        moments: bool = False,
        common: int = 0,
    ) -> None:
        weight = target.weight
        assert isinstance(weight, Tensor)  # check_fit has seen to it
        self.kind, self.names = next(iter(factors.values())).kind, names
        found = [_rooted(f, weight.device) for f in factors.values()]
        self.rows = torch.cat([h for h, _ in found], 0)  # [R, in]
        place = {n: k for k, n in enumerate(factors)}
        owner = [i for i, n in enumerate(names) if n in place for _ in range(factors[n].rank)]
        spread = torch.zeros(len(owner), len(names), device=weight.device)
        spread[torch.arange(len(owner)), torch.tensor(owner)] = 1.0
        self.spread = spread  # [R, n]: squares by row -> squares by adapter
        size = [found[place[n]][1] if n in place else 0.0 for n in names]
        self.size = torch.tensor(size, device=weight.device)  # ||dW||_F
        bias = getattr(target, "bias", None)
        self.bias = bias if isinstance(bias, Tensor) else None
        quantised = not weight.dtype.is_floating_point
        self.base = None if quantised else torch.linalg.vector_norm(weight.detach().float())
        self.sums: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.mask: Tensor | None = None
        self.batch = 0
        self.ranks = {n: f.rank for n, f in factors.items()}
        self.span: Span | None = (
            None  # of all A^T: moments are summed between orthonormal directions, where rounding is even
        )
        if moments:
            at, wide = weight.device, widest(weight.device)
            self.span = span(torch.cat([f.a.to(at, torch.float32) for f in factors.values()]).mT[None])
            many = self.span.r.shape[1]
            self.directions = self.span.lift(torch.eye(many, dtype=wide, device=at)[None])[0].float()
            self.square = torch.zeros(many, many, dtype=wide, device=at)
        width = next(iter(factors.values())).shape[1]
        self.sketch = Sketch(width, common, weight.device) if common and self.kind == "linear" else None

    @property
    def moments(self) -> Moments:
        """Of the tokens seen so far."""
        assert self.span is not None
        seen = torch.cat(self.counts).sum().clamp(min=1).to(self.square.dtype)
        r = self.span.r[0].to(self.square.dtype)
        return Moments(self.ranks, (r.mT @ (self.square / seen) @ r).cpu())

    def begin(self, mask: Tensor | None, batch: int) -> None:
        """The next batch: its attention mask, [b, length], and how many inputs it has."""
        self.mask, self.batch = mask, batch
        self.sums.append(torch.zeros(batch, len(SIGNALS), len(self.names), device=self.size.device))
        self.counts.append(torch.zeros(batch, device=self.size.device))

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0].detach()
        if self.kind == "embedding":
            inner = self.rows.T[x]
            size = torch.ones_like(inner[..., 0])
            answer = torch.linalg.vector_norm(output.detach().float(), dim=-1)
        else:
            inner = x.float() @ self.rows.T
            size = torch.linalg.vector_norm(x.float(), dim=-1)
            plain = output.detach().float() - (0 if self.bias is None else self.bias.float())
            answer = torch.linalg.vector_norm(plain, dim=-1)
        unit = (inner.square() @ self.spread).sqrt()  # [..., n]: ||dW x|| / ||dW||_F
        live = size > 0
        flat = self.mask is not None and self.mask.numel() == live.numel()
        if self.mask is not None and flat:  # [b, length], or flattened
            live = live & self.mask.reshape(live.shape)
        base = torch.full_like(size, torch.nan) if self.base is None else self.base / torch.where(answer > 0, answer, 1)
        whole = torch.where(size > 0, size, 1.0)
        found = torch.stack(
            [unit / whole[..., None], unit * self.size, unit * base[..., None]], -2
        )  # [..., signals, n]
        found = torch.where(live[..., None, None], found, 0.0)
        if self.span is not None:
            y = (self.directions[x] if self.kind == "embedding" else x.float() @ self.directions)[live]
            self.square += (y.mT @ y).to(self.square.dtype)
        if self.sketch is not None:
            self.sketch.add(x[live])
        if flat or live.shape[0] == self.batch:
            self.sums[-1] += found.reshape(self.batch, -1, *found.shape[-2:]).sum(1)
            self.counts[-1] += live.reshape(self.batch, -1).sum(1)
        else:  # tokens of several inputs in one row, as experts see them: shared out evenly
            self.sums[-1] += found.reshape(-1, *found.shape[-2:]).sum(0) / self.batch
            self.counts[-1] += live.sum() / self.batch


def _rooted(f: LoraFactors, device: torch.device) -> tuple[Tensor, float]:
    """R A / ||dW||_F [r, in] (zeros where dW is 0) and ||dW||_F, R^T R = B^T B."""
    b, a = f.b.to(device, widest(device)), f.a.to(device, widest(device))
    r, _, good = gram_root(b[None])
    root = r[0] if bool(good[0]) else torch.linalg.qr(b / max(float(b.abs().max()), 1e-300), mode="r").R
    rows = root @ a
    if not bool(good[0]):
        rows = torch.nn.functional.pad(rows * float(b.abs().max()), (0, 0, 0, a.shape[0] - rows.shape[0]))
    size = float(torch.linalg.vector_norm(rows))
    terms = float((torch.linalg.vector_norm(b, dim=0) * torch.linalg.vector_norm(a, dim=1)).sum())
    if size <= 1e-12 * terms:  # rounding of terms that cancel
        return torch.zeros_like(rows, dtype=torch.float32), 0.0
    return (rows / size).float(), size * abs(f.scaling)


def probe(
    model: nn.Module,
    bank: Bank,
    batches: Iterable[Batch],
    *,
    moments: bool = False,
    common: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Readings:
    """Run the base once over the calibration inputs and read how each adapter would answer, module by module.

    Args:
        model: the plain base, in any transformers architecture (any module tree whose names match the adapters'). The readings'
            modules are called as the model calls them (see :func:`loralloy.live.names.named_for`).
        bank: the adapters.
        batches: the model's arguments for each batch, as it takes them by keyword: ``input_ids`` and ``attention_mask``
            (see :func:`text_batches`), or ``pixel_values``. Tokens that the mask leaves out are not counted.
        moments: whether to read :class:`Moments` too: one more thin product a module, in the same pass.
        common: how many directions that the inputs have in common to read (see :mod:`.common`), also in the same pass.
        progress: called after each batch with the number of inputs in it.

    Embeddings are read by their columns; convolutions are left out, and said. The model's mode and hooks are restored.

    Raises LoralloyError for a module that the model does not have or that has another shape, for no input, and where the model
    ran none of the modules.
    """
    called = ModelNames(model)
    bank = called.bank(bank)
    found, names = called.modules, bank.names
    probes: dict[str, _Probe] = {}
    left_out: dict[str, str] = {}
    for name in bank.modules:
        factors = bank.factors(name)
        owner = next(iter(factors))
        if name not in found:
            raise called.unknown(bank[owner], name, f"adapter {owner!r}")
        try:
            check_fit(name, found[name], factors[owner])
        except LoralloyError as error:
            raise error.within(f"module {name!r} of adapter {owner!r}") from None
        if factors[owner].kind == "conv":
            left_out[name] = "a convolution"
        else:
            probes[name] = _Probe(found[name], factors, names, moments, common)
    run = _without_head(model, probes)
    handles = [found[name].register_forward_hook(p.hook) for name, p in probes.items()]
    try:
        with _evaluating(model), torch.inference_mode():
            for batch in batches:
                inputs = next(iter(batch.values())).shape[0]
                mask = batch.get("attention_mask")
                mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
                for p in probes.values():
                    p.begin(mask, inputs)
                run(**batch)
                if progress:
                    progress(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not probes or not next(iter(probes.values())).counts:
        raise LoralloyError("there is nothing to probe: no calibration input, or no linear module in any adapter")
    tokens = {name: torch.cat(p.counts).cpu().double().numpy() for name, p in probes.items()}
    for name, seen in tokens.items():
        if not seen.any():
            left_out[name] = "the model did not run it on these inputs"
    kept = [name for name in probes if name not in left_out]
    if not kept:
        raise LoralloyError(
            "the model ran none of the adapters' modules on the calibration inputs; give it other inputs"
        )
    values = np.stack([_values(probes[name]) for name in kept], 2)  # [N, signals, M, n]
    sums: dict[str, np.ndarray] = {name: values[:, at] for at, name in enumerate(SIGNALS)}
    seen_by = np.stack([tokens[name] for name in kept], 1)
    answers = {name: probes[name].moments for name in kept} if moments else {}
    shared = {name: sketch.common() for name in kept if (sketch := probes[name].sketch) is not None}
    return Readings(tuple(names), tuple(kept), sums, seen_by, left_out, answers, shared)


def _values(p: _Probe) -> np.ndarray:
    """[N, signals, n], NaN for adapters whose dW is 0 or not there."""
    values = torch.where(p.size > 0, torch.cat(p.sums), torch.nan)
    return values.cpu().double().numpy()


def _without_head(model: nn.Module, probes: Mapping[str, Any]) -> nn.Module:
    """The model's backbone where all probed modules are in it: logits of a large vocabulary are not needed."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = getattr(model, prefix, None) if prefix else None
    if isinstance(inner, nn.Module) and all(name.startswith(prefix + ".") for name in probes):
        return inner
    return model


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in was.items():
            module.training = mode


def text_batches(
    tokenizer: Any, texts: Sequence[str], batch_size: int = 8, max_length: int = 512, device: Any = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Batches of texts for :func:`probe`, in order, padded on the right; a text is cut to `max_length` tokens.

    The tokenizer adds the special tokens that it always adds.

    Raises LoralloyError for a text without a token.
    """
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    rows = [list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"]) for text in texts]
    if any(not row for row in rows):
        raise LoralloyError("a calibration text has no token; take empty texts out")
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        width = max(map(len, part))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in part], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part], device=device)
        yield {"input_ids": ids, "attention_mask": mask}
