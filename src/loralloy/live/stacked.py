"""The factors of all adapters at a module, stacked, and the hook that adds their weighted output to the base's.

For a batch of b rows whose weights spread to coefficients c [b, R], R the sum of the ranks,

    y += ((x A_cat^T) * c) B_cat^T,

one product, one multiplication in place and one product that adds to the base's output in place (BLAS's beta = 1): three
kernels a module, whatever the number of compositions in the batch. Modules that read the same input (q, k, v; gate, up) share
the first two, so a Llama layer takes 15 kernels where one adapter in PEFT takes 28. Rows of one adapter each have a way of
their own on a CPU (:mod:`.by_adapter`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.nn.utils.rnn import pad_sequence

from ..errors import LoralloyError
from ..factors import LoraFactors
from .gated import Gated
from .group import Group, Setting


def scaled(f: LoraFactors, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A [r, in, ...] and B [out, r, ...] with the scaling in them, as they are stacked.

    The root of the scaling goes to each side, so that 16-bit factors neither over- nor underflow.
    """
    root, wide = abs(f.scaling) ** 0.5, torch.promote_types(dtype, torch.float32)
    a, b = f.A.to(wide) * (root if f.scaling >= 0 else -root), f.B.to(wide) * root
    return a.to(device, dtype), b.to(device, dtype)


def place(target: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype and device that factors of this module of the base have to have."""
    weight = target.weight
    assert isinstance(weight, Tensor)  # check_fit has seen to it
    # a packed weight's dtype says nothing; its layer takes inputs of any, and PEFT too keeps factors in float32 beside it
    return weight.dtype if weight.dtype.is_floating_point else torch.float32, weight.device


class Stacked:
    """The stacked factors of one module of the base, and the hook that adds their weighted output.

    `parts`: by adapter, what :func:`scaled` gives; `names`: all adapters, in the order of the weights. A module belongs to a
    :class:`~.group.Group`, which holds what is set (:func:`.group.grouped`).
    """

    group: Group
    position: int  # in it

    def __init__(self, name: str, kind: str, parts: Mapping[str, tuple[Tensor, Tensor]], names: Sequence[str]) -> None:
        self.name, self.kind = name, kind
        self.gated: Gated | None = None  # while set, a gate decides and not the weights
        self.stack(parts, names)

    def stack(self, parts: Mapping[str, tuple[Tensor, Tensor]], names: Sequence[str]) -> None:
        """Take these adapters' factors (at least one's) in place of what was there; it has to be grouped anew."""
        self.A = torch.cat([a for a, _ in parts.values()], 0)  # [R, in, ...]
        self.B = torch.cat([b for _, b in parts.values()], 1)  # [out, R, ...]
        index = {n: i for i, n in enumerate(names)}
        layout = [(index[n], len(a)) for n, (a, _) in parts.items()]
        # column of A_cat -> index of its adapter, so that a row's weights spread to its R coefficients by one gather
        self.columns = [i for i, rank in layout for _ in range(rank)]
        self.owner = torch.tensor(self.columns, device=self.A.device)
        self.layout = tuple(layout)  # modules of one layout have the same coefficients
        self._by_adapter: tuple[Tensor, Tensor] | None = None

    def stacked(self, n: int) -> tuple[Tensor, Tensor]:
        """The factors by adapter, padded to one rank: A [n, r, in] and B^T [n, r, out]; zero where one has no such module."""
        if self._by_adapter is None:
            mine = [self.owner == i for i in range(n)]
            a, b = (pad_sequence([t[m] for m in mine], batch_first=True) for t in (self.A, self.B.T))
            self._by_adapter = a, b
        return self._by_adapter

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.gated is not None:
            return output + self.gated.output(self, args[0]).to(output.dtype)
        setting = self.group.setting
        if setting is None:
            return None
        x = args[0]
        if setting.rows not in (1, x.shape[0]):
            raise LoralloyError(
                f"weights are set for {setting.rows} rows but the batch has {x.shape[0]}; give one weight a row, or one for all"
            )
        if self.kind != "linear":
            return self._other(module, x, output, setting)
        by_adapter = setting.by_adapter if x.numel() == x.shape[0] * x.shape[-1] else None  # one token a row
        inner = self.group.inner(x, self.position, setting, by_adapter)
        if by_adapter is not None:
            more = by_adapter.more(inner, self.position)
            if self._owned(module, output, more):
                output.view(-1, output.shape[-1]).index_add_(0, by_adapter.order, more)
                return output
            return output.index_add(0, by_adapter.order, more.view(-1, *output.shape[1:]).to(output.dtype))
        start, end, out = setting.slots[self.position]
        if inner.shape[-1] != end - start:
            inner = inner[..., start:end]
        if self._owned(module, output, inner):
            output.view(-1, output.shape[-1]).addmm_(inner.flatten(0, -2), out)
            return output
        return output + (inner @ out).to(output.dtype)

    def _owned(self, module: nn.Module, output: Tensor, more: Tensor) -> bool:
        """Whether what is made of `more` may be added to the module's output in place.

        That is when the output is new and in nobody's hands: it is made by nn.Linear's own forward (a subclass may give
        back its input, or what it keeps), and no other hook has seen it before this one.
        """
        return (
            output.dtype == more.dtype
            and output.is_contiguous()
            and not (torch.is_grad_enabled() and (output.requires_grad or more.requires_grad))
            and type(module).forward is nn.Linear.forward
            and "forward" not in vars(module)
            and next(iter(module._forward_hooks.values()), None) == self.hook
            and not _global_forward_hooks
        )

    def _other(self, module: nn.Module, x: Tensor, output: Tensor, setting: Setting) -> Tensor:
        c, a = setting.c, setting.A
        if self.kind == "embedding":
            inner = a.T[x] * getattr(module, "embed_scale", 1.0)  # [b, l, R]; Gemma scales its embeddings
            inner = inner * c.reshape(c.shape[0], *([1] * (inner.ndim - 2)), c.shape[1])
            return output + (inner @ setting.slots[0].out).to(output.dtype)
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        inner = module._conv_forward(x.to(a.dtype), a, None)  # [b, R, ...]
        inner = inner * c.reshape(c.shape + (1,) * (inner.ndim - 2))
        return output + (inner.movedim(1, -1) @ setting.slots[0].out).movedim(-1, 1).to(output.dtype)  # B is 1x1


def overflow(name: str, dtype: torch.dtype) -> LoralloyError:
    return LoralloyError(f"module {name!r}: the factors overflow the model's dtype {dtype}; load the model in float32")
