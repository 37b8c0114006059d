"""Groups of like adapters, so that a long stream merges a bounded number: OUR READING of HAM, not its code.

HAM (Coleman et al. 2025, arXiv 2509.13211) compares a new adapter with the group adapters by cosine similarity, lets it
join the most similar group above a threshold, else opens a group while there are fewer than a maximum, prunes by magnitude
and scales inside a group, merges there, and merges the groups at the end. Its threshold, pruning ratio and maximum were not
found, and it learns its scales while it trains. Here a group is the mean of its members, each pruned by magnitude; the
groups' coefficients are learned on the memory buffer like adapters' own; adapters are kept, so a group is made of them anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..adapter import Adapter
from ..bank import Bank
from ..errors import LoralloyError
from ..factors import inner, norm
from ..weights import Weights


def similarity(a: Adapter, b: Adapter) -> float:
    """Cosine of the two adapters' dW over all modules, from their factors (a module that one lacks counts as zero).

    Raises LoralloyError when one of them is all zero.
    """
    sizes = [sum(norm(x[module]) ** 2 for module in x) ** 0.5 for x in (a, b)]
    for adapter, size in zip((a, b), sizes, strict=True):
        if size == 0:
            raise LoralloyError(f"adapter {adapter.name!r} is all zero, so it is like nothing; train it longer")
    return sum(inner(a[module], b[module]) for module in a if module in b) / (sizes[0] * sizes[1])


def group_adapter(members: Sequence[Adapter], name: str, density: float = 0.5, device: str = "cpu") -> Adapter:
    """The mean of the members' dW, each pruned by magnitude to `density`, cut to their largest rank.

    A group of one is its member, as it is: pruning is for what interferes.
    """
    from ..merging import MagnitudePrune, merge

    if len(members) == 1:
        only = members[0]
        return Adapter(name, {m: only[m] for m in only}, only.config, only.base, licence=only.licence)
    bank = Bank(members, assume_same_base=True)
    rule = MagnitudePrune(density=density)
    return merge(
        bank, Weights.uniform(bank.names), rule, "delta", "max", name=name, measure="none", device=device
    ).adapter


class Groups:
    """Group adapters that have been made, by their members' content: a stream asks for the same ones at each experience."""

    def __init__(self, density: float = 0.5, device: str = "cpu") -> None:
        self.density, self.device = density, device
        self._made: dict[tuple[str, ...], Adapter] = {}

    def adapter(self, members: Sequence[Adapter]) -> Adapter:
        """The group adapter of these, named by them, joined by "+"."""
        key = tuple(member.content_hash for member in members)
        if key not in self._made:
            name = "+".join(member.name for member in members)
            self._made[key] = group_adapter(members, name, self.density, self.device)
        return self._made[key]


def assign(adapters: Sequence[Adapter], threshold: float, groups: int, made: Groups | None = None) -> list[list[str]]:
    """Names by group, the adapters taken in the order they came.

    An adapter joins the group whose adapter is most like it, if that cosine is at least `threshold` or there are `groups`
    groups already; else it opens one. Raises LoralloyError for fewer than one group.
    """
    if groups < 1:
        raise LoralloyError(f"`groups` is {groups}; there is at least one")
    made = made or Groups()
    members: list[list[Adapter]] = []
    for adapter in adapters:
        like = [similarity(adapter, made.adapter(group)) for group in members]
        best = max(range(len(like)), key=lambda g: like[g], default=-1)
        if best < 0 or (like[best] < threshold and len(members) < groups):
            members.append([adapter])
        else:
            members[best].append(adapter)
    return [[adapter.name for adapter in group] for group in members]


def group_bank(bank: Bank, assigned: Sequence[Sequence[str]], made: Groups | None = None) -> Bank:
    """A bank of group adapters."""
    made = made or Groups()
    return Bank([made.adapter([bank[name] for name in names]) for names in assigned], assume_same_base=True)
