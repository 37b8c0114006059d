"""tada: the adapters' singular directions, freed of what opposes each other, added.

"TaDA: Calibrated Probe Gating for Task-Domain LoRA Merging" (To et al. 2026, arXiv 2606.05016) "discards conflicting singular
directions before combining the remaining components". No more of it is public: what conflicts, and what is discarded, is
defined here, and is this project's own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..errors import LoralloyError
from .rule import Param, Rule
from .stack import LowRank, Stack
from .subspace import Triplets, lifted, svd, triplets, weighted

Conflict: TypeAlias = Literal["shared", "owned", "cosine", "opposed", "output", "none"]

CONFLICT = Param(
    "what counts as a conflict, and what is discarded: where the other adapters together act against a singular direction, "
    "their part along it, as far as they are the weaker there (shared); along an input direction that several adapters read, "
    "all but a mean by energy (owned); the weaker of two components with a negative cosine (cosine); a component that the "
    "others act against (opposed); the weaker of two components that write the same output for different inputs (output); "
    "nothing (none)"
)
THRESHOLD = Param(
    "how strong a conflict must be: the share of a direction's strength that the others take away (shared, opposed), the "
    "share of an input direction's energy that is not the strongest adapter's (owned), minus the cosine (cosine), or the "
    "overlap of the outputs (output)",
    0,
    1,
)
_SILENT = 1e-7  # of the largest answer of a module: a component below it answers to none of the inputs
_EQUAL = 1e-6  # components whose strengths differ by less are equally strong: rounding decides nothing


@dataclass(frozen=True)
class Found:
    """What the conflicts of T adapters in L modules took.

    Attributes:
        components: how many each adapter had, [T, L].
        dropped: how many of them were discarded whole, [T, L].
        cleared: along how many of its own directions the others' part was discarded; of `owned`, along how many common input
            directions its own part was; [T, L].
        removed, total: ||result - exact||_F and ||exact||_F, exact being the weighted sum; float64 [L].
    """

    components: Tensor
    dropped: Tensor
    cleared: Tensor
    removed: Tensor
    total: Tensor


@dataclass(frozen=True)
class _Parts:
    """Every adapter's components side by side: dW_i = sum over k of i of s_k u_k v_k^T, weight and sign included.

    u, v: [L, R, n] between the bases of the triplets; size: [L, n], the s_k, at least 0; owner: [n]; plain: [L, n, n], cosines
    of u_k v_k^T and u_l v_l^T, 0 where a component has no strength; out: the cosines of u alone. What conflicts are judged
    by: into, between the inputs of two components (of v_k and v_l; on activations the correlation of v_k^T x and v_l^T x),
    cosine = out * into, and s = size * reach (reach 1; on activations the root mean square of v_k^T x).
    """

    u: Tensor
    v: Tensor
    size: Tensor
    reach: Tensor
    owner: Tensor
    out: Tensor
    into: Tensor
    plain: Tensor

    @property
    def cosine(self) -> Tensor:
        return self.out * self.into

    @property
    def s(self) -> Tensor:
        return self.size * self.reach

    @property
    def others(self) -> Tensor:
        """[n, n]: components of different adapters."""
        return self.owner[:, None] != self.owner[None]

    def by_adapter(self, mark: Tensor, adapters: int) -> Tensor:
        """[L, n] counted by adapter, [T, L]."""
        counts = mark.new_zeros(adapters, mark.shape[0], dtype=torch.int64)
        return counts.index_add_(0, self.owner, mark.T.to(torch.int64))


def _parts(stack: Stack, t: Triplets, moments: Tensor | None = None) -> _Parts:
    signed = torch.cat(weighted(stack, t.s), 1)
    s, live = signed.abs(), signed != 0
    u = torch.cat(t.u, 2) * torch.where(signed < 0, -1.0, 1.0)[:, None]
    v = torch.cat(t.v, 2)
    both = live[:, :, None] & live[:, None]
    out, into = (torch.where(both, x.mT @ x, 0.0) for x in (u, v))
    ranks = torch.tensor(stack.ranks, device=s.device)
    owner = torch.repeat_interleave(torch.arange(len(stack.ranks), device=s.device), ranks)
    plain, reach = out * into, torch.ones_like(s)
    if moments is not None:
        reach, into = _answers(stack, t, v, moments)
        into = torch.where(both, into, 0.0)
    return _Parts(u, v, s, reach, owner, out, into, plain)


def _answers(stack: Stack, t: Triplets, v: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """The root mean square of every v_k^T x, [L, n], and the correlations of v_k^T x and v_l^T x, [L, n, n], none centred."""
    wide = v.dtype
    ranks = torch.tensor(stack.ranks, device=v.device)
    scale = stack.scaling.abs().sqrt().copysign(stack.scaling).to(wide)  # what `absorbed` puts on A
    scale = torch.repeat_interleave(scale, ranks, 0).T  # [L, R]
    to = (t.right.inverse.to(wide) @ v).mT * scale[:, None]  # v_k^T x = to_k (A x)
    c = to @ moments.to(v.device, wide) @ to.mT
    reach = c.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    live = reach > _SILENT * reach.amax(1, keepdim=True)
    reach = torch.where(live, reach, 0.0)
    unit = torch.where(live, 1 / torch.where(live, reach, 1.0), 0.0)
    return reach, (c * unit[:, :, None] * unit[:, None]).clamp(-1, 1)


def resolve(
    stack: Stack, conflict: Conflict = "shared", threshold: float = 0.1, moments: Tensor | None = None
) -> tuple[LowRank, Found]:
    """The sum of a stack's adapters without their conflicts, before any cut; definitions and arguments as :func:`tada`.

    moments: [L, R, R], the mean over real inputs x of (A x)(A x)^T, A being all of the stack's A, one on the other (see
    :class:`loralloy.weighting.moments.Moments`): conflicts are then judged on activations instead of on dW. The cosine c_kl
    becomes (u_k . u_l) times the correlation (not centred) of v_k^T x and v_l^T x, and a component's strength what it
    answers, s_k rms(v_k^T x). o_k u_k is then what of the others' answer along u_k can be told from v_k^T x, and `shared`
    discards it as before. Judging by activations is this project's own.

    Raises LoralloyError for `owned` with moments: it has no component to judge.
    """
    t = triplets(stack)
    p = _parts(stack, t, moments)
    total = _size(p.plain, p.size)
    nothing = torch.zeros_like(p.s, dtype=torch.bool)
    dropped = cleared = nothing
    if conflict == "owned":
        if moments is not None:
            raise LoralloyError(
                "conflict 'owned' shares out input directions and judges no component; on activations use another"
            )
        return _owned(stack, t, p, threshold, total)
    strength = p.size
    if conflict == "shared":
        strength, cleared = _cleared(p, threshold)
    elif conflict != "none":
        dropped = _dropped(p, conflict, threshold)
        strength = torch.where(dropped, 0.0, p.size)
    result = stack.weighted_sum() if conflict == "none" else lifted(t, p.u, strength, p.v, stack.dtype)
    count = functools.partial(p.by_adapter, adapters=stack.adapters)
    removed = _size(p.plain, strength - p.size)
    return result, Found(count(p.size > 0), count(dropped), count(cleared), removed, total)


def _size(cosine: Tensor, s: Tensor) -> Tensor:
    """||sum_k s_k u_k v_k^T||_F, [L]."""
    return ((cosine @ s[:, :, None])[..., 0] * s).sum(1).clamp(min=0).sqrt()


def _cleared(p: _Parts, threshold: float) -> tuple[Tensor, Tensor]:
    """Strengths of `shared` (as sizes), and which directions were cleared."""
    pull = torch.where(p.others, p.cosine * p.s[:, None], 0.0)  # [L, k, l]: the part of component l along k
    net, against = pull.sum(2), (-pull).clamp(min=0)
    square = (p.s + pull.clamp(min=0).sum(2)) ** 2  # with those that act along it: two weak ones may outvote a third
    both = square[:, :, None] + square[:, None]
    share = square[:, :, None] / torch.where(both > 0, both, 1.0)
    mass = against.sum(2)
    yields = (against * share).sum(2) / torch.where(mass > 0, mass, 1.0)
    hit = (-net > threshold * p.s) & (p.reach > 0)
    reach = torch.where(p.reach > 0, p.reach, 1.0)
    return torch.where(hit, p.size - yields * net / reach, p.size), hit


def _dropped(p: _Parts, conflict: Conflict, threshold: float) -> Tensor:
    """Which components are discarded whole, [L, n]."""
    if conflict == "opposed":
        return -torch.where(p.others, p.cosine * p.s[:, None], 0.0).sum(2) > threshold * p.s
    if conflict == "cosine":
        pairs = p.cosine < -threshold
    else:
        pairs = p.out.abs() * (1 - p.into**2).clamp(min=0).sqrt() > threshold
    weaker = p.s[:, :, None] <= (1 + _EQUAL) * p.s[:, None]
    return (pairs & weaker & p.others).any(2) & (p.size > 0)


def _owned(stack: Stack, t: Triplets, p: _Parts, threshold: float, total: Tensor) -> tuple[LowRank, Found]:
    """Along each common input direction, a mean by energy instead of the sum."""
    _, size, q = svd((p.v * p.s[:, None]).mT, stack.dtype)  # of [dW_1; ...; dW_T], their outputs turned away
    reads = p.s[:, :, None] * (p.v.mT @ q)  # [L, k, a]: dW_i q_a = sum over k of i of reads_ka u_k
    rows = reads.split(list(stack.ranks), 1)
    energy = torch.stack([x.square().sum(1) for x in rows])  # [T, L, a]
    live = size > 0
    share = torch.where(live, energy / torch.where(live, energy.sum(0), 1.0), 0.0)
    contested = live & (1 - share.amax(0) > threshold)
    kept = torch.where(contested, share, 1.0)
    strength = torch.cat([x * k[:, None] for x, k in zip(rows, kept, strict=True)], 1)
    removed = torch.linalg.matrix_norm(p.u @ (strength - reads))
    components = p.by_adapter(p.s > 0, stack.adapters)
    lost = contested & (share > 0) & (share < share.amax(0))
    core = p.u @ strength  # [L, R, a]
    length = torch.linalg.vector_norm(core, dim=1)
    unit = core / torch.where(length > 0, length, 1.0)[:, None]
    return lifted(t, unit, length, q, stack.dtype), Found(
        components, torch.zeros_like(components), lost.sum(2), removed, total
    )


def tada(
    stack: Stack,
    *,
    conflict: Annotated[Conflict, CONFLICT] = "shared",
    threshold: Annotated[float, THRESHOLD] = 0.1,
) -> LowRank:
    """dW = sum_k b_k u_k v_k^T over all singular components k of all w_i dW_i = sum_k s_k u_k v_k^T (sign in u_k, s_k >= 0).

    b_k = s_k is the exact weighted sum, conflict=none. With c_kl = (u_k . u_l)(v_k . v_l), the cosine of two components, and
    o_k = sum_l s_l c_kl over the other adapters' components, what they do together along direction k:

    shared: where -o_k > threshold * s_k, b_k = s_k - y_k o_k: the others' part along k is discarded, as far as k is the stronger:
    y_k is the mean of S_k^2 / (S_k^2 + S_l^2) over the l that act against it, weighed by |s_l c_kl|, with S_k = s_k and what the
    other adapters add to it, sum_l max(0, s_l c_kl). Of two opposing components
    one gives up y, the other 1 - y: the opposition is taken away once, mostly from the weaker. What lies outside the
    direction is kept.
    owned: with q_a the right singular vectors of [dW_1; ...; dW_T] (weights included) and e_ia adapter i's part of the energy
    ||w_i dW_i q_a||^2 there, dW q_a = sum_i e_ia w_i dW_i q_a where 1 - max_i e_ia > threshold, and the plain sum elsewhere:
    what one adapter reads alone is kept whole, what several read is shared out.
    cosine: of two adapters' components with c_kl < -threshold, the weaker is discarded whole (both if they are equal).
    opposed: components with -o_k > threshold * s_k are discarded whole.
    output: of two with |u_k . u_l| sqrt(1 - (v_k . v_l)^2) > threshold, the weaker is discarded whole.

    All definitions are ours: the paper (To et al. 2026, arXiv 2606.05016) is known by its abstract. Functions of dW_i alone
    where its singular values differ: equal ones leave their directions to chance.
    """
    return stack.weighted_sum() if conflict == "none" else resolve(stack, conflict, threshold)[0]


RULE = Rule(
    "tada",
    tada,
    "free the adapters' singular directions of what opposes them, add",
    "a task adapter and a domain adapter, under the gates of `loralloy tada` (there conflict is none unless told)",
    "this project, after the abstract of To et al. 2026 (arXiv 2606.05016)",
    acts_on="stack",
    spaces=("delta", "core"),
)


def watched(rule: Rule, seen: list[Found], moments: Iterable[Tensor] | None = None) -> Rule:
    """The rule `tada`, which also puts what each batch took into `seen`; batches come in the order of a plan's modules.

    moments: [R, R] of every module in that order, as :func:`resolve` takes them: conflicts are judged on activations. They
    belong to one run of one plan, and the rule gets a name of its own, since no recipe can repeat it.
    """
    given = None if moments is None else iter(moments)

    @functools.wraps(rule.function)  # parameters are read from its signature
    def run(stack: Stack, **values: Any) -> LowRank:
        own = None if given is None else torch.stack([next(given) for _ in range(stack.modules)])
        result, found = resolve(stack, **values, moments=own)
        seen.append(found)
        return result

    return replace(rule, function=run, name=rule.name if given is None else f"{rule.name}_on_activations")
