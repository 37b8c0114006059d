"""Trained linear routers over frozen adapters: by token (mixture of experts) or by row (SMEAR)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...atomic import atomic_file
from ...errors import LoralloyError
from ..gated import Pass, normalised

if TYPE_CHECKING:
    from ..composed import LiveModel

KINDS = ("token", "smear")
_VERSION = 1


class LinearRouter(nn.Module):
    """One linear router a layer of the base: coefficients = softmax(W rms(x) + b) over the adapters.

    x is the input of the layer's first adapted module (q_proj in a Llama), and all modules of the layer share the coefficients.

    kind "token": every token has its own, adapters' outputs are mixed. `top_k` keeps the largest and normalises them again;
    None keeps all (soft).

    kind "smear" (Muqeeth et al. 2023, arXiv 2306.03745): x is averaged over the prompt's tokens, each row has one set of
    coefficients, and the factors are averaged: A' = sum_i w_i A_i, B' = sum_i w_i B_i. SMEAR pools over the whole input; in a
    causal model that is the prompt, since the answer is not known yet.

    W and b start at zero: every adapter 1/n. The parameters are float32, whatever the base's dtype.

    Args:
        names: the adapters, in order.
        groups: layer -> its modules, the one whose input is read first.
        widths: layer -> the number of features of that input.
        kind: "token" or "smear".
        top_k: experts kept; None for all.

    Raises LoralloyError for a kind or top_k that is unknown.
    """

    def __init__(
        self,
        names: Sequence[str],
        groups: Mapping[str, Sequence[str]],
        widths: Mapping[str, int],
        kind: str = "token",
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise LoralloyError(f"router kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
        if top_k is not None and top_k < 1:
            raise LoralloyError(f"top_k is {top_k}; a token needs at least one expert")
        self.names, self.kind, self.top_k = list(names), kind, top_k
        self.groups = {group: list(modules) for group, modules in groups.items()}
        self._group = {module: group for group, modules in self.groups.items() for module in modules}
        self._at = {group: i for i, group in enumerate(self.groups)}
        n = len(self.names)
        self.weights = nn.ParameterList([torch.zeros(n, widths[group]) for group in self.groups])
        self.biases = nn.ParameterList([torch.zeros(n) for _ in self.groups])

    @classmethod
    def of(cls, live: LiveModel, kind: str = "token", top_k: int | None = None) -> LinearRouter:
        """A fresh router for a live model's bank, on its device."""
        groups: dict[str, list[str]] = {}
        widths: dict[str, int] = {}
        for name, _ in live.model.named_modules():  # in the order of the model, so that a layer's first module is first
            if name in live.parts:
                match = re.match(r"^(?:.*?\.)?\d+(?=\.)", name)
                group = match[0] if match else name
                groups.setdefault(group, []).append(name)
                widths.setdefault(group, live.parts[name].A.shape[1])
        return cls(live.names, groups, widths, kind, top_k).to(live.device)

    @property
    def averages(self) -> bool:
        return self.kind == "smear"

    def forward(self, module: str, x: Tensor, now: Pass) -> Tensor:
        group = self._group.get(module)
        if group is None:
            raise LoralloyError(f"the router has no layer for module {module!r}; train it for this bank")
        if self.kind == "smear" and now.continues:
            return now.recall(group)
        if group not in now.kept:
            if module != self.groups[group][0]:
                raise LoralloyError(
                    f"module {module!r} ran before {self.groups[group][0]!r}, whose input its layer's router reads"
                )
            now.kept[group] = self._coefficients(self._at[group], x, now)
        return now.kept[group]

    def _coefficients(self, at: int, x: Tensor, now: Pass) -> Tensor:
        h = x.float()
        if self.kind == "smear":
            if now.pooled is None:
                h = h.mean(1, keepdim=True)
            else:
                w = now.pooled.to(h.dtype)[:, :, None]
                h = (h * w).sum(1, keepdim=True) / w.sum(1, keepdim=True).clamp(min=1.0)
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)  # one step size then suits every layer
        scores = nn.functional.linear(h, self.weights[at], self.biases[at])
        hard = normalised(scores, now.allowed, self.top_k)
        if self.training and self.top_k == 1:
            # The one that is kept has coefficient 1 whatever its score: the gradient goes straight through to the softmax.
            soft = normalised(scores, now.allowed)
            return hard + soft - soft.detach()
        return hard

    # -- on disk -------------------------------------------------------------------------------------------------------

    def save(
        self, path: str | os.PathLike[str], config: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> None:
        """One safetensors file; its metadata holds what :meth:`load` needs, and `config` (how it was trained)."""
        from safetensors.torch import save

        tensors = {}
        for group, w, b in zip(self.groups, self.weights, self.biases, strict=True):
            tensors[f"{group}.weight"], tensors[f"{group}.bias"] = w.detach().cpu(), b.detach().cpu()
        about = {
            "version": _VERSION, "kind": self.kind, "top_k": self.top_k, "adapters": self.names, "groups": self.groups,
            "config": dict(config or {}),
        }  # fmt: skip
        atomic_file(path, save(tensors, {"loralloy_router": json.dumps(about)}), overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LinearRouter:
        """Read a router, on the CPU; `config` is kept as the attribute of that name.

        Raises LoralloyError when the file is missing or is no router of version 1.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {}).get("loralloy_router", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, ValueError) as error:
            raise LoralloyError(f"{path}: cannot be read as a router ({error})") from None
        if not isinstance(about, dict) or about.get("version") != _VERSION:
            raise LoralloyError(f"{path}: this is no router file of version {_VERSION}; make one with train_router")
        groups = about["groups"]
        widths = {group: tensors[f"{group}.weight"].shape[1] for group in groups}
        router = cls(about["adapters"], groups, widths, about["kind"], about["top_k"])
        with torch.no_grad():
            for group, w, b in zip(groups, router.weights, router.biases, strict=True):
                w.copy_(tensors[f"{group}.weight"])
                b.copy_(tensors[f"{group}.bias"])
        router.config = about["config"]
        return router.eval()

    config: Mapping[str, Any] = {}
    """How it was trained; empty before."""
