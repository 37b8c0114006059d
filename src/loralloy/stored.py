"""An adapter's tensors on disk: name -> tensor and module -> factors of an open safetensors file, read when asked for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter_config import AdapterConfig
from .errors import LoralloyError
from .factors import Kind, LoraFactors
from .formats import Layout
from .tensor_file import DTYPES, TensorBytes


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises LoralloyError naming `what` if a tensor holds NaN or infinity."""
    # both ends carry a NaN, and looking at them makes no mask of the tensor's size
    if tensor.is_floating_point() and tensor.numel() and not all(map(math.isfinite, map(float, tensor.aminmax()))):
        raise LoralloyError(f"{what} holds NaN or infinity; the adapter's training diverged or the file is damaged")


class StoredTensors(Mapping[str, Tensor]):
    """name -> tensor of an open safetensors file."""

    def __init__(self, handle: Any, keys: Mapping[str, str]) -> None:
        self._handle, self._keys = handle, keys

    def __getitem__(self, name: str) -> Tensor:
        return self._handle.get_tensor(self._keys[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class StoredFactors(Mapping[str, LoraFactors]):
    """module -> factors, read from an open safetensors file and checked when first read.

    Args:
        handle: of safetensors' `safe_open`.
        where: which tensors are whose factors.
        config: for alpha; None where `alphas` tells.
        alphas: module -> alpha, of those that have a tensor for it.
        file: the file's path.
        identity: its (device, number) from before it was opened (:func:`loralloy.tensor_file.identity`).
    """

    def __init__(
        self,
        handle: Any,
        where: Layout,
        config: AdapterConfig | None,
        alphas: Mapping[str, float],
        file: Path,
        identity: tuple[int, int],
    ) -> None:
        self._handle, self._layout, self._config, self._alphas = handle, where, config, alphas
        self._file, self._identity = file, identity
        self._finite: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.modules)

    def __len__(self) -> int:
        return len(self._layout.modules)

    def __contains__(self, module: object) -> bool:
        return module in self._layout.modules

    def shape(self, module: str, side: str) -> list[int]:
        return list(self._handle.get_slice(self._layout.modules[module][side]).get_shape())

    def kind(self, module: str) -> Kind:
        return self._layout.kinds.get(module, "conv" if len(self.shape(module, "A")) > 2 else "linear")

    def scaling(self, module: str) -> float:
        rank = self.shape(module, "A")[0]
        if self._config is None:
            return self._alphas.get(module, float(rank)) / rank
        if module in self._alphas:
            return self._alphas[module] / rank
        return self._config.scaling(module, rank)

    def outline(self, module: str) -> LoraFactors:
        """Shapes and scaling, checked, from the header alone."""
        a, b = (self._empty(self._layout.modules[module][side]) for side in "AB")
        try:
            return LoraFactors(a, b, self.scaling(module), self.kind(module))
        except LoralloyError as error:
            raise error.within(f"module {module!r}") from None

    def _empty(self, key: str) -> Tensor:
        stored = self._handle.get_slice(key)
        dtype = DTYPES.get(stored.get_dtype()) or self._handle.get_tensor(key).dtype
        return torch.empty(stored.get_shape(), dtype=dtype, device="meta")

    def key(self, module: str, side: str) -> str:
        """The name of A or B in the file."""
        return self._layout.modules[module][side]

    def opened(self, stack: contextlib.ExitStack) -> TensorBytes | None:
        """The file's bytes, open until `stack` closes; None where another file has its path now (a merge onto a parent)."""
        try:
            return stack.enter_context(TensorBytes(self._file, self._identity))
        except OSError:
            return None

    def read(self, module: str) -> LoraFactors:
        """One module as it is stored, finite or not."""
        a, b = (self._handle.get_tensor(self.key(module, side)) for side in "AB")
        return LoraFactors(a, b, self.scaling(module), self.kind(module))

    def __getitem__(self, module: str) -> LoraFactors:
        f = self.read(module)
        if module not in self._finite:
            for side, tensor in (("A", f.A), ("B", f.B)):
                check_finite(tensor, f"tensor {self.key(module, side)!r}")
            self._finite.add(module)
        return f
