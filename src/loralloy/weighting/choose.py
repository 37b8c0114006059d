"""One way to a weigher, by name."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ..errors import LoralloyError
from . import fitted
from .probe import ProbeRouter
from .retrieved import Router
from .tuned import TunedRouter, fit_kernel
from .weigher import Weigher

if TYPE_CHECKING:
    from ..retrieval.index import Index

KINDS = ("auto", "paper", "kernel", "probe")
FITS = {"paper": 1, "kernel": 1, "probe": 2, "auto": 2}
"""Raised when a kind's fit, and so its weights, change: what is kept of an earlier number is made again."""
PAPER: dict[str, Any] = {"k": 100, "p": 0.9, "temperature": 1.0}


def open_weigher(
    index: Index,
    kind: str = "auto",
    *,
    only: Collection[str] | None = None,
    k: int | None = None,
    p: float | None = None,
    temperature: float | None = None,
    kernel: str = "exp",
    show: int = 5,
    unlike: bool = False,
) -> Weigher:
    """A weigher over an index's tasks (those of `only`).

    ``"paper"``: the retrieval paper's kernel, top-100, exp(-d), p = 0.9 (arXiv 2602.21222), where nothing else is given.
    ``"kernel"``: the same with k, temperature and p chosen by leave-one-out, where not given.
    ``"probe"``: a probe on the stored vectors, linear or with a hidden layer; `temperature` multiplies its calibrated one,
    p is 0.9 if not given.
    ``"auto"``: the kernel as given when `k`, `temperature` or `kernel` is; else the probe when the index holds raw texts
    (template "both" or "raw"), and the tuned kernel when it does not: a probe that saw only hints misreads raw text.

    `unlike` adds ``explain["unlike"]`` to the paper's kernel too (a leave-one-out pass, once an index), and to the probe where a
    query leaves tasks out (one more such pass for them); otherwise the tuned ones have it.
    Raises LoralloyError for an unknown kind, a value out of range, or an option that the kind does not have.
    """
    if kind not in KINDS:
        raise LoralloyError(f"router is {kind!r}; known: {', '.join(KINDS)}")
    if kind == "auto":
        if k is not None or temperature is not None or kernel != "exp":
            kind = "paper"
        else:
            kind = "kernel" if index.manifest.template == "hinted" else "probe"
    if kind != "paper" and kernel != "exp":
        raise LoralloyError(f"kernel {kernel!r} goes with the paper's router; drop it, or pass --router paper")
    if kind == "probe":
        if k is not None:
            raise LoralloyError("the probe has no neighbours to count: drop k, or pass --router kernel")
        return ProbeRouter(
            index, only, 0.9 if p is None else p, 1.0 if temperature is None else temperature, show, unlike
        )
    if kind == "kernel":
        return TunedRouter(index, only, k, p, temperature, show)
    given = {"k": k, "p": p, "temperature": temperature}
    options = PAPER | {name: value for name, value in given.items() if value is not None}
    router = Router(index, **options, kernel=kernel, only=only, show=show)
    if not unlike:
        return router
    names = sorted(index.tasks_left((), only))
    return Router(index, **options, kernel=kernel, only=only, show=show, unlike=fit_kernel(index, names).unlike)


def fit_all(index: Index) -> ProbeRouter | None:
    """Fit what the default routers need to the whole index, and delete stale fits; None for an index without tasks."""
    fitted.prune(index)
    if not index.names:
        return None
    router = ProbeRouter(index)
    router.prepare()
    return router
