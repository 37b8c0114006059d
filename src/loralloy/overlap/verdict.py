"""What the numbers say about the choice of rule. Thresholds are conventions, documented in docs/inspect.md; they were not
fitted to accuracy, and the last remark says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from .measure import Overlap

NORMS = 3.0  # the largest ||dW|| over the smallest, above which equal weights are not equal shares
DUPLICATE = 0.95  # cosine above which two adapters are one
ALIGNED = 0.25  # cosine from which adding two adapters overshoots along what they share
ORTHOGONAL = 0.1  # |cosine| below which a weighted sum leaves each adapter's own part nearly alone
OPPOSED = 0.55  # weighted sign conflict from which two adapters pull against each other (chance is 0.5)
AGREED = 0.4  # weighted sign conflict below which they agree
SHARED = 0.2  # weighted alignment of output or input directions that counts as shared, if also
TIMES = 5.0  # ... this many times chance
SAME_START = 0.4  # unweighted alignment of input spaces that points to one initialisation of A
REACHED = 0.9  # SAR at the adapters' rank, below which a merge cut to that rank leaves much of an adapter out

CAUTION = (
    "This is guidance from geometry, no measurement of accuracy: Marczak et al. (2025) found the cosine of task vectors "
    "uncorrelated with merged accuracy, and SAR correlated with it. Compare the candidates on held-out rows."
)


@dataclass(frozen=True)
class Remark:
    """One thing that the numbers say.

    Attributes:
        kind: what it is about; one of the kinds in docs/inspect.md.
        text: the sentence.
        rules: rules and plug-ins that are candidates because of it.
        pairs: the pairs of adapters that it is about, the strongest first.
        weights: adapter -> coefficient, where the remark is about weights.
    """

    kind: str
    text: str
    rules: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    weights: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        data: dict[str, object] = {"kind": self.kind, "text": self.text}
        data |= {"rules": list(self.rules)} if self.rules else {}
        data |= {"pairs": [list(pair) for pair in self.pairs]} if self.pairs else {}
        return data | ({"weights": self.weights} if self.weights else {})


def verdict(found: Overlap) -> list[Remark]:
    """Remarks on the whole (all modules together), those that forbid or warn first; the last is a caution."""
    return [*_setting(found), *_norms(found), *_directions(found), *_cut(found), Remark("caution", CAUTION)]


def candidates(remarks: Sequence[Remark]) -> list[str]:
    """Rules and plug-ins that the remarks name, in order."""
    return list(dict.fromkeys(rule for remark in remarks for rule in remark.rules))


# -- what must be known before numbers are read ------------------------------------------------------------------------


def _setting(found: Overlap) -> list[Remark]:
    remarks = []
    has, zero, common = (found.all.sums[key] for key in ("has", "zero", "common"))
    for i, name in enumerate(found.names):
        if has[i] and zero[i] == has[i]:
            remarks.append(
                Remark(
                    "zero", f"{name}: dW is zero everywhere (untrained?), so nothing of it is defined; leave it out."
                )
            )
        elif zero[i]:
            remarks.append(Remark("zero", f"{name}: dW is zero in {int(zero[i])} of its {int(has[i])} modules."))
    pairs = [(i, j) for i, j in combinations(range(len(found.names)), 2)]
    apart = [(i, j) for i, j in pairs if common[i, j] < max(has[i], has[j])]
    if apart:
        least = sorted(apart, key=lambda p: float(common[p]))
        said = ", ".join(f"{_pair(found, p)} {int(common[p])}" for p in least[:3]) + _more(apart)
        remarks.append(
            Remark(
                "modules",
                f"Not every module is in every adapter (of {len(found.parts)}; in common: {said}). A pair is "
                "compared on what both have; in a merge, a module that one lacks is the others' alone.",
                pairs=_names(found, least),
            )
        )
    if found.extra:
        said = "; ".join(f"{name}: {', '.join(tensors)}" for name, tensors in found.extra.items())
        remarks.append(Remark("extra", f"Saved whole and not compared here: {said}."))
    if len({tuple(ranks) for ranks in found.ranks.values()}) > 1:
        said = ", ".join(f"{name} {span(ranks)}" for name, ranks in found.ranks.items())
        remarks.append(
            Remark(
                "ranks",
                f"Ranks differ ({said}): merge in delta space, where any ranks go together; acting on A and B "
                "apart (factors space, PEFT's) needs equal ones.",
            )
        )
    return remarks


def _norms(found: Overlap) -> list[Remark]:
    norm = found.all.norm
    live = [i for i in range(len(found.names)) if norm[i] > 0]
    if len(live) < 2:
        return []
    small, large = min(live, key=lambda i: float(norm[i])), max(live, key=lambda i: float(norm[i]))
    times = float(norm[large] / norm[small])
    if times <= NORMS:
        return []
    inverse = {found.names[i]: 1 / float(norm[i]) for i in live}
    weights = {name: w / sum(inverse.values()) for name, w in inverse.items()}
    said = ", ".join(f"{name} {w:.3g}" for name, w in weights.items())
    return [
        Remark(
            "norms",
            f"{found.names[large]} is {times:.1f} times as large as {found.names[small]} and drowns it at equal "
            f"weights. Weights in inverse proportion to the norms give each the same share: {said}.",
            pairs=((found.names[large], found.names[small]),),
            weights=weights,
        )
    ]


# -- directions --------------------------------------------------------------------------------------------------------


def _directions(found: Overlap) -> list[Remark]:
    whole, n, remarks = found.all, len(found.names), []
    cosine, conflict, out, inside = whole.cosine, whole.sign_conflict(), whole.alignment("out"), whole.alignment("in")
    pairs = [p for p in combinations(range(n), 2) if cosine[p] == cosine[p]]

    def count(picked: list[tuple[int, int]]) -> str:
        return f", {len(picked)} of {len(pairs)} pairs" if len(pairs) > 1 else ""

    def pick(value: Tensor, where: Tensor, ascending: bool = False) -> list[tuple[int, int]]:
        return sorted((p for p in pairs if where[p]), key=lambda p: float(value[p]) * (1 if ascending else -1))

    def say(picked: list[tuple[int, int]], value: Tensor) -> str:
        return ", ".join(f"{_pair(found, p)} {float(value[p]):.2f}" for p in picked[:3]) + _more(picked)

    same = pick(cosine, cosine >= DUPLICATE)
    if same:
        text = f"Nearly the same adapter twice: {say(same, cosine)} (cosine). It counts double in a merge; keep one."
        remarks.append(Remark("duplicate", text, (), _names(found, same)))
    aligned = pick(cosine, (cosine >= ALIGNED) & (cosine < DUPLICATE))
    if aligned:
        text = (
            f"Aligned{count(aligned)}: {say(aligned, cosine)} (cosine). Added at weight 1 each they overshoot along what "
            f"they share (the plain sum of all {n} has {whole.gain:.2f} times the squared norm of orthogonal ones): let "
            "weights sum to 1, or level the spectrum with iso_c or tsv_m, or put svc after the rule."
        )
        remarks.append(Remark("aligned", text, ("linear", "iso_c", "tsv_m", "svc"), _names(found, aligned)))
    apart = pick(cosine.abs(), cosine.abs() < ORTHOGONAL, True)
    if apart:
        text = (
            f"Nearly orthogonal{count(apart)} (|cosine| below {ORTHOGONAL:g}): a weighted sum (linear; svd to cut the rank) "
            "neither cancels nor overshoots: each adapter's dW comes out scaled by its weight and by little else."
        )
        remarks.append(Remark("orthogonal", text, ("linear", "svd"), _names(found, apart)))
    against = pick(conflict, conflict >= OPPOSED)
    if against:
        text = (
            f"Opposed{count(against)}: {say(against, conflict)} (sign conflict by magnitude, chance 0.50). A sum cancels "
            "there; ties elects one sign for each entry instead."
        )
        remarks.append(Remark("opposed", text, ("ties",), _names(found, against)))
    level = pick((conflict - 0.5).abs(), (conflict > AGREED) & (conflict < OPPOSED), True)
    if level:
        shares = [float(conflict[p]) for p in level]
        text = (
            f"Sign conflict of {span([round(v, 2) for v in shares])}{count(level)}: near the 0.5 of unrelated adapters. It "
            "comes with being orthogonal, is no opposition, and by itself no reason for ties."
        )
        remarks.append(Remark("signs", text, (), _names(found, level)))
    shared = pick(out, (out >= SHARED) & (out >= TIMES * whole.chance("out")) & (cosine < ALIGNED))
    if shared:
        text = (
            f"Shared outputs{count(shared)}: {say(shared, out)} (alignment, {_times(whole.chance('out'), out, shared[0])} "
            "chance at most) though the cosine is low: different inputs write to the same directions, which add up in a merge; "
            "pico before the rule, or svc after it, damps them."
        )
        remarks.append(Remark("shared_outputs", text, ("pico", "svc"), _names(found, shared)))
    plain = whole.alignment("in", weighted=False)
    reads = pick(inside, (inside >= SHARED) & (inside >= TIMES * whole.chance("in")) & (cosine < ALIGNED))
    if reads:
        start = bool(torch.stack([plain[p] for p in reads]).mean() >= SAME_START)
        why = " The row spaces of A hardly differ: they look trained from one initialisation of A." if start else ""
        text = (
            f"Shared inputs{count(reads)}: {say(reads, inside)} (alignment): they read the same directions and write to "
            f"different ones, so they are active together but do not cancel.{why}"
        )
        remarks.append(Remark("shared_inputs", text, (), _names(found, reads)))
    return remarks


def _cut(found: Overlap) -> list[Remark]:
    reached = found.all.sar_cut
    live = [i for i in range(len(found.names)) if reached[i] == reached[i]]
    if len(live) < 2 or min(float(reached[i]) for i in live) >= REACHED:
        return []
    worst = sorted(live, key=lambda i: float(reached[i]))
    said = ", ".join(f"{found.names[i]} {float(reached[i]):.2f}" for i in worst[:3])
    return [
        Remark(
            "cut",
            f"The uniform merge cut to rank {max_rank(found)} spans only part of what the adapters write (SAR: {said}"
            f"{', ...' if len(worst) > 3 else ''}). If the merge may be larger, keep more: a higher --rank, --rank full, or "
            "--energy 0.99; else merge fewer adapters, or try iso_c (made to raise SAR) or tsv_m.",
            ("iso_c", "tsv_m"),
        )
    ]


def max_rank(found: Overlap) -> int:
    """The largest rank that an adapter declares anywhere."""
    return max((r for ranks in found.ranks.values() for r in ranks), default=0)


# -- words -------------------------------------------------------------------------------------------------------------


def span(values: Sequence[float]) -> str:
    """ "3", "2 to 8", or "none"."""
    if not values:
        return "none"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _pair(found: Overlap, pair: tuple[int, int]) -> str:
    return f"{found.names[pair[0]]} and {found.names[pair[1]]}"


def _names(found: Overlap, pairs: Sequence[tuple[int, int]]) -> tuple[tuple[str, str], ...]:
    return tuple((found.names[i], found.names[j]) for i, j in pairs)


def _more(pairs: Sequence[object]) -> str:
    return f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""


def _times(chance: Tensor, value: Tensor, pair: tuple[int, int]) -> str:
    return f"{float(value[pair] / chance[pair]):.0f} times"
