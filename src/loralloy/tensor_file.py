"""A safetensors file written one tensor at a time, in any order: memory never holds more than the tensor in hand.

The format (huggingface/safetensors, README, "Format"): the length of the header in 8 bytes, the header in JSON, the data.
Offsets in the header count from the end of the header, so data is written before the header is, and a header that grows
moves the data without changing an offset.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from .errors import LoralloyError

# In the order of safetensors' own enumeration, narrow to wide: the file holds them from the last to the first.
_NAMES = (
    "bool:BOOL uint8:U8 int8:I8 float8_e5m2:F8_E5M2 float8_e4m3fn:F8_E4M3 float8_e8m0fnu:F8_E8M0 int16:I16 uint16:U16 "
    "float16:F16 bfloat16:BF16 int32:I32 uint32:U32 float32:F32 complex64:C64 float64:F64 int64:I64 uint64:U64"
)
_PAIRS = [entry.split(":") for entry in _NAMES.split()]
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, of) for of, name in _PAIRS if hasattr(torch, of)}
"""safetensors' name of a dtype -> torch's."""
_CODES = {dtype: name for name, dtype in DTYPES.items()}
_WIDTHS = {dtype: position for position, dtype in enumerate(DTYPES.values())}

_BLOCK = (
    1 << 18
)  # bytes written at once, and moved at once when a header outgrows its room; several times faster than 16 MiB
Spec = tuple[torch.dtype, Sequence[int]]


def metadata_room(metadata: Mapping[str, str]) -> int:
    """Bytes that `metadata` takes in the header: what to pass as `reserve`."""
    return len(_json({"__metadata__": dict(metadata)})) - 1 if metadata else 0  # two braces less, one comma more


class TensorFile:
    """A safetensors file being written: first what it will hold, then each tensor, then the metadata.

    The layout is safetensors' own (wider dtypes first, then by name), so that equal tensors and metadata give equal bytes
    in whatever order they are written. Until :meth:`finish` the file has no header, and no reader takes it for a whole one.

    Args:
        path: the file to write; one that exists is replaced.
        specs: name -> (dtype, shape) of every tensor.
        reserve: bytes of header kept for the metadata (see :func:`metadata_room`); with less than it takes, `finish`
            moves the data.

    Raises LoralloyError for a dtype that the format has no name for, a tensor that is unknown, written twice, missing, or
    of another dtype or shape than was said.
    """

    def __init__(self, path: str | os.PathLike[str], specs: Mapping[str, Spec], reserve: int = 0) -> None:
        self.path = Path(path)
        self._entries: dict[str, dict[str, object]] = {}
        self._specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, (dtype, shape) in specs.items():
            if dtype not in _CODES:
                raise LoralloyError(f"{self.path.name}: safetensors has no name for {dtype} (tensor {name!r})")
            self._specs[name] = dtype, tuple(shape)
        end = 0
        for name in sorted(self._specs, key=lambda n: (-_WIDTHS[self._specs[n][0]], n.encode())):
            dtype, shape = self._specs[name]
            start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            self._entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        self._size, self._missing = end, set(self._entries)
        self._start = 8 + _aligned(len(_json(self._entries)) + max(0, reserve))
        self._file = open(self.path, "w+b", buffering=0)  # noqa: SIM115 - closed by finish and by the context
        self._file.truncate(self._start + self._size)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        left_open = not self._file.closed
        self._file.close()
        if kind is None and left_open:
            raise LoralloyError(f"{self.path.name} was not finished: call finish() once every tensor is written")

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor at its place; it is copied only if it is on another device or not contiguous."""
        if name not in self._specs:
            raise LoralloyError(f"{self.path.name}: there is no place for a tensor {name!r}; it was not announced")
        if name not in self._missing:
            raise LoralloyError(f"{self.path.name}: tensor {name!r} is written twice")
        dtype, shape = self._specs[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise LoralloyError(
                f"{self.path.name}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, but {dtype} {list(shape)} was "
                "announced"
            )
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        offset = self._entries[name]["data_offsets"][0]  # type: ignore[index]
        self._put(memoryview(plain.view(torch.uint8).numpy()), self._start + offset)  # type: ignore[arg-type]
        self._missing.remove(name)

    def finish(self, metadata: Mapping[str, str] | None = None) -> None:
        """Write the header, with `metadata` sorted by key, and close the file."""
        if self._missing:
            raise LoralloyError(
                f"{self.path.name}: {len(self._missing)} tensors were announced but not written, {min(self._missing)!r} "
                "first"
            )
        first: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        header = _json(first | self._entries)
        if 8 + len(header) > self._start:
            self._move(8 + _aligned(len(header)))
        room = self._start - 8
        self._put(memoryview(room.to_bytes(8, "little") + header.ljust(room)), 0)
        self._file.close()

    def _put(self, data: memoryview, at: int) -> None:
        """Write all of `data`: one call may take less (a signal, the system's limit of 2 GB)."""
        done = 0
        while done < len(data):
            part = data[done : done + _BLOCK]
            if hasattr(os, "pwrite"):  # no shared position: several threads may write their tensors at once
                done += os.pwrite(self._file.fileno(), part, at + done)
            else:
                self._file.seek(at + done)
                done += self._file.write(part) or 0

    def _move(self, start: int) -> None:
        """Shift the data up to `start`, the last block first."""
        end = self._size
        while end:
            begin = max(0, end - _BLOCK)
            self._file.seek(self._start + begin)
            block = bytearray(end - begin)
            got = 0
            while got < len(block):
                got += self._file.readinto(memoryview(block)[got:]) or 0
            self._put(memoryview(block), start + begin)
            end = begin
        self._start = start


def _json(header: Mapping[str, object]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def _aligned(size: int) -> int:
    return -(-size // 8) * 8
