"""Coefficients in closed form: the weighted sum that answers each domain's inputs as that domain's own adapter does.

RegMean (Jin et al. 2023, arXiv 2212.09849, eq. 2) merges linear layers by least squares: W = (sum_i G_i)^-1 sum_i G_i W_i with
G_i = X_i^T X_i, a full matrix a module. Ours solves the same least squares over the n coefficients of the adapters,

    alpha = argmin sum_i E_{x in domain i} || (sum_j alpha_j dW_j - dW_i) x ||^2,

so that what comes out is weights like any other and the merge keeps its rank. With u = A_cat x in r-space the quantities are
tr(dW_j G_i dW_k^T) = sum over the block (j, k) of (B_cat^T B_cat) * E[u u^T]: no dW and no [in, in] Gram matrix is formed.
No labels are needed. Only for a rule and space in which dW is the weighted sum.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import LoralloyError
from ..factors import LoraFactors, widest
from ..layerwise import GRANULARITIES, group_of
from ..live import LiveModel
from ..live.names import named_for
from ..live.scoring import encode_prompt
from ..merging import RULES, Rule
from ..merging.plan import check_rule
from ..weights import Weights
from .learned import Learned
from .learned.objective import frozen
from .quadratic import Quadratic

if TYPE_CHECKING:
    from ..bank import Bank
    from ..base_ref import BaseRef

Batch = Mapping[str, Any]


@dataclass
class _Moments:
    """One module's stacked factors, and the second moments of u = A_cat x over the domain that is running."""

    A: Tensor  # [R, in]; of an embedding [R, vocabulary]
    inner: Tensor  # B_cat^T B_cat [R, R]
    owner: Tensor  # one-hot [R, n]
    embedding: bool
    total: Tensor  # sum of u u^T, [R, R]
    count: Tensor  # of inputs
    by_domain: list[Tensor] = field(default_factory=list)  # M_i [n, n]: M_i[j, k] = E_i <dW_j x, dW_k x>

    @classmethod
    def of(cls, factors: Mapping[str, LoraFactors], names: Sequence[str], device: torch.device) -> _Moments:
        wide = widest(device)
        # the root of the scaling goes to each side; the sign of dW_j x is in A
        parts = [(f.a.float(), f.b.float(), f.scaling) for f in factors.values()]
        a = torch.cat([x * math.copysign(math.sqrt(abs(s)), s) for x, _, s in parts], 0).to(device)
        b = torch.cat([x * math.sqrt(abs(s)) for _, x, s in parts], 1).to(device, wide)
        owner = torch.tensor([names.index(n) for n, f in factors.items() for _ in range(f.rank)], device=device)
        hot = torch.nn.functional.one_hot(owner, len(names)).to(wide)
        zero = torch.zeros(a.shape[0], a.shape[0], dtype=wide, device=device)
        embedding = next(iter(factors.values())).kind == "embedding"
        return cls(a, b.T @ b, hot, embedding, zero, zero.new_zeros(()))

    def add(self, module: nn.Module, x: Tensor, mask: Tensor | None) -> None:
        if self.embedding:
            u = self.A.T[x] * getattr(module, "embed_scale", 1.0)  # Gemma scales its embeddings
        else:
            u = x.to(self.A.dtype) @ self.A.T
        u = u.to(self.total.dtype)
        if mask is not None and u.shape[:-1] == mask.shape:
            u = torch.where(mask[..., None].bool(), u, 0.0)  # no indexing, which waits for the device to count
            self.count += mask.sum()
        else:
            self.count += u[..., 0].numel()
        u = u.reshape(-1, u.shape[-1])
        self.total += u.T @ u

    def close_domain(self) -> None:
        """Reduce what was summed to [n, n], and start anew."""
        moments = self.inner * (self.total / self.count.clamp(min=1))
        self.by_domain.append(self.owner.T @ moments @ self.owner)
        self.total.zero_()
        self.count.zero_()


def regmean(
    model: nn.Module,
    bank: Bank,
    inputs: Mapping[str, Iterable[Batch]],
    *,
    rule: Rule | str = "linear",
    space: str | None = None,
    granularity: Literal["adapter", "layer", "module"] = "module",
    ridge: float = 1e-3,
    under: Literal["own", "base"] = "own",
    base: BaseRef | None = None,
    progress: bool = True,
) -> Learned:
    """Weights from unlabeled inputs of each adapter's domain, without a step of gradient; see the head of this file.

    Args:
        model: the base; adapters fit its modules (linear, GPT-2's Conv1D, embeddings).
        bank: its adapters.
        inputs: adapter -> batches of its domain, each called as ``model(**batch)``; where a batch has an
            ``attention_mask``, its padding does not count. Every domain counts the same, however many inputs it has.
        rule, space: must be a plain weighted sum of dW (linear, cat and svd in delta space, cat in factors space).
        granularity: one coefficient an adapter, an adapter and layer, or an adapter and module. Errors of several modules
            are added as they are, in the units of the modules' outputs.
        ridge: pull towards 1 (:meth:`Quadratic.solve`).
        under: what runs while inputs are collected: each domain's "own" adapter (RegMean's) or the plain "base".
        base: what the model is, checked against the bank.

    Returns weights of source "regmean"; `settings` (and the weights' ``explain``) have the number of inputs a domain and the
    relative error of the solution, of weights 1 and of 1/n; the history's one entry has the first as its loss. Raises
    LoralloyError for another rule, domains that are not the bank's adapters, no inputs, convolutions, and inputs that are
    not finite.
    """
    chosen = check_sum(rule, space)
    check_options(granularity, ridge, under)
    check_domains(list(inputs), bank)
    began = time.perf_counter()
    bank = named_for(model, bank)
    quadratics, counts = collect(model, bank, inputs, under, base, progress)
    groups: dict[str, Quadratic] = {}
    for module, q in quadratics.items():
        key = group_of(module, granularity)
        groups[key] = groups[key] + q if key in groups else q
    whole = functools.reduce(operator.add, quadratics.values())
    alphas = {key: q.solve(ridge) for key, q in groups.items()}
    lost = sum(q.error(alphas[key]) ** 2 * q.constant for key, q in groups.items())
    ones = torch.ones_like(whole.c)
    error = math.sqrt(lost / whole.constant) if whole.constant > 0 else 0.0
    settings: dict[str, Any] = {
        "rule": str(chosen[0]), "space": chosen[1], "granularity": granularity, "ridge": ridge, "under": under,
        "inputs": counts,
        "error": {"regmean": error, "all 1": whole.error(ones), "all 1/n": whole.error(ones / len(ones))},
    }  # fmt: skip
    table: dict[str, Any] = {}
    for i, name in enumerate(bank.names):
        if granularity == "adapter":
            table[name] = float(alphas[""][i])
        else:
            table[name] = {m: float(alphas[group_of(m, granularity)][i]) for m in bank[name]}
    weights = bank.own_weights(Weights(table, "regmean", {"settings": settings}))
    entry = {"step": 0, "loss": error, "held_out": None, "alpha": dict(weights.items())}
    return Learned(weights, [entry], settings, time.perf_counter() - began, 1.0)


def check_sum(rule: Rule | str, space: str | None) -> tuple[Rule, str]:
    """The rule and space. Raises LoralloyError where dW is not the weighted sum."""
    found, where = check_rule(rule, space)  # type: ignore[arg-type]
    if where not in found.sums:
        sums = ", ".join(f"{r.name} ({' or '.join(r.sums)})" for r in RULES.values() if r.sums)
        raise LoralloyError(
            f"regmean solves for the weights of a plain sum of dW, and rule {found.name!r} in {where} space is none; take one of "
            f"{sums}, or the gradient or search strategy for this rule"
        )
    return found, where


def check_options(granularity: str = "module", ridge: float = 0.0, under: str = "own") -> None:
    """Raise LoralloyError for an option out of range."""
    if granularity not in GRANULARITIES:
        raise LoralloyError(f"granularity {granularity!r} is not known; choose {', '.join(GRANULARITIES)}")
    if under not in ("own", "base"):
        raise LoralloyError(f"under {under!r} is not known; choose own (each domain's own adapter) or base")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise LoralloyError(f"ridge is {ridge}; it must be a number of at least 0")


def check_domains(domains: Sequence[str], bank: Bank) -> None:
    """Raise LoralloyError unless there is one domain an adapter, by its name."""
    if strangers := [name for name in domains if name not in bank.names]:
        raise LoralloyError(
            f"regmean takes the inputs of each adapter's own domain by the adapter's name, and domain {strangers[0]!r} is no "
            f"adapter of the bank ({', '.join(bank.names)}); rename it, or leave its rows out"
        )
    if missing := [name for name in bank.names if name not in domains]:
        raise LoralloyError(
            f"regmean needs inputs of each adapter's domain, and there are none of {', '.join(missing)}; add some, or leave "
            f"{'it' if len(missing) == 1 else 'them'} out of the bank"
        )


def collect(
    model: nn.Module,
    bank: Bank,
    inputs: Mapping[str, Iterable[Batch]],
    under: str = "own",
    base: BaseRef | None = None,
    progress: bool = True,
) -> tuple[dict[str, Quadratic], dict[str, int]]:
    """(module -> its quadratic, domain -> how many inputs): one pass over the inputs."""
    names = bank.names
    for module in bank.modules:
        for name, f in bank.factors(module).items():
            if f.kind == "conv":
                raise LoralloyError(
                    f"module {module!r} of adapter {name!r} is a convolution, which regmean does not solve for; take the "
                    "gradient or search strategy, or adapters without it"
                )
    live = LiveModel(model, bank, base)
    try:
        moments = {m: _Moments.of(bank.factors(m), names, live.parts[m].A.device) for m in bank.modules}
        counts = {}
        for name in names:  # in the bank's order, whatever the mapping's
            own = Weights({name: 1.0}) if under == "own" else None
            with live.compose(own):
                counts[name] = _run(model, moments, name, inputs[name], progress)
            for part in moments.values():
                part.close_domain()
    finally:
        live.remove()
    result = {}
    for module, part in moments.items():
        m = torch.stack(part.by_domain).double().cpu()  # [domains, n, n], in one transfer a module
        if not bool(torch.isfinite(m).all()):
            raise LoralloyError(f"module {module!r}: its inputs are not finite; load the model in float32")
        i = torch.arange(len(names))
        result[module] = Quadratic(m.sum(0), m[i, i].sum(0), float(m[i, i, i].sum()))
    return result, counts


def _run(
    model: nn.Module, moments: Mapping[str, _Moments], domain: str, batches: Iterable[Batch], progress: bool
) -> int:
    """Run one domain's batches and add what the modules are given to their moments; how many inputs there were."""
    from ..console import progress as bar_of

    found, handles, mask = dict(model.named_modules()), [], None
    done = 0

    def hook(part: _Moments) -> Any:
        return lambda module, args: part.add(module, args[0], mask)

    try:
        handles = [found[name].register_forward_pre_hook(hook(part)) for name, part in moments.items()]
        with frozen(model), torch.no_grad(), bar_of() if progress else contextlib.nullcontext() as bar:
            task = bar.add_task(f"inputs of {domain}", total=None) if bar else None
            for batch in batches:
                mask = batch.get("attention_mask")
                model(**batch)
                done += len(next(value for value in batch.values() if isinstance(value, Tensor)))
                if bar and task is not None:
                    bar.update(task, completed=done)
    finally:
        for handle in handles:
            handle.remove()
    if not done:
        raise LoralloyError(f"there are no inputs of domain {domain!r}; give at least one")
    return done


def text_batches(model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int = 8) -> Iterator[Batch]:
    """Prompts as batches for :func:`regmean`, padded on the right (under a causal mask nothing before it changes)."""
    device, pad = model.get_input_embeddings().weight.device, tokenizer.pad_token_id or 0
    rows = sorted((encode_prompt(tokenizer, p) for p in prompts), key=len)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(r) for r in part], batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(r) for r in part])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        yield {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
