"""A safetensors file written one tensor at a time, in any order: memory never holds more than the tensor in hand.

The format (huggingface/safetensors, README, "Format"): the length of the header in 8 bytes, the header in JSON, the data.
Offsets in the header count from the end of the header, so data is written before the header is, and a header that grows
moves the data without changing an offset. :class:`TensorBytes` reads the data as bytes, for hashing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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

# Bytes read, written or moved at once: what a core's cache holds; several times faster than 16 MiB.
_BLOCK = 1 << 18
_READ = 1 << 22  # bytes read at once to be hashed, most tensors whole: threads that take turns often, wait often
_SYNC = 32 << 20  # bytes written before the system is asked to put them on disk, while more are made
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
        self._unsynced, self._syncing = 0, ThreadPoolExecutor(1)  # which starts a thread only for a large file
        self._synced: Future[None] | None = None

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        left_open = not self._file.closed
        self._syncing.shutdown()
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
        self._unsynced += plain.nbytes
        if self._unsynced >= _SYNC and (self._synced is None or self._synced.done()):
            self._sync()

    def _sync(self) -> None:
        """Have what is written so far put on disk by another thread, so that the sync at the end has little left to do."""
        if self._synced is not None:
            self._synced.result()  # an error of the disk is told once: here
        self._unsynced, self._synced = 0, self._syncing.submit(os.fsync, self._file.fileno())

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
        self._syncing.shutdown()
        self._file.close()
        if self._synced is not None:
            self._synced.result()

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


class TensorBytes:
    """The stored bytes of a safetensors file's tensors, in blocks of one buffer: each page is read, none is mapped.

    A context manager.

    Args:
        path: the file.
        expected: its (device, number), see :func:`identity`.

    Raises OSError if it cannot be opened or another file has its path now, LoralloyError if its header cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], expected: tuple[int, int]) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by the context
        try:
            if identity(self._file.fileno()) != expected:
                raise FileNotFoundError(f"{path} is another file now")
            size = int.from_bytes(self._file.read(8), "little")
            entries: dict[str, dict[str, list[int]]] = json.loads(self._file.read(size))
        except BaseException as error:
            self._file.close()
            if isinstance(error, ValueError):
                raise LoralloyError(f"{path} has no header; the file is torn or damaged, fetch it again") from None
            raise
        self._start, self._buffer = 8 + size, bytearray(_READ)
        self._offsets = {name: e["data_offsets"] for name, e in entries.items() if name != "__metadata__"}

    def __enter__(self) -> TensorBytes:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def blocks(self, name: str) -> Iterator[memoryview]:
        """One tensor's bytes; a block is overwritten by the next. Raises LoralloyError if the file ends before them."""
        start, end = self._offsets[name]
        self._file.seek(self._start + start)
        view, left = memoryview(self._buffer), end - start
        while left:
            got = self._file.readinto(view[: min(left, len(view))])
            if not got:
                raise LoralloyError(f"{self._file.name} ends inside tensor {name!r}; the file is torn, fetch it again")
            left -= got
            yield view[:got]


def identity(file: int | str | os.PathLike[str]) -> tuple[int, int]:
    """(device, number) of a file or of an open one."""
    found = os.stat(file)
    return found.st_dev, found.st_ino


def _json(header: Mapping[str, object]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def _aligned(size: int) -> int:
    return -(-size // 8) * 8
