"""What glibc does with freed memory: a long-running server gives it back, steps of one size use it again."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

_TRIM, _MMAP, _ARENAS = -1, -3, -8  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX of glibc's malloc.h
_MOST, _NEVER = 2**31 - 1, -1
_usual = (1 << 25, 1 << 26)  # (_MMAP, _TRIM) outside `reused`: at first where glibc's own adjustment ends
_inside = 0


def give_back() -> bool:
    """Give the whole pages that are free within glibc's heaps back to the system; True where something was given.

    Holes: a stack of adapters that has grown a little does not fit where it was, nor does a smaller one fill that. A heap of
    800 MiB with 100 MiB of them took 8 ms, one without 1 ms.
    """
    trim = _glibc("malloc_trim")
    if trim is None:
        return False
    trim.argtypes, trim.restype = (ctypes.c_size_t,), ctypes.c_int
    return bool(trim(0))


def keep_steady(large: int = 1 << 17, arenas: int = 2) -> bool:
    """Have glibc's malloc give what is freed back to the system; True where it could be told to. For the whole process.

    A server allocates and frees buffers of ever other sizes (caches, bodies, logits) in several threads. By default glibc
    raises the size from which a buffer is mapped by itself, up to 32 MiB, with every one that is freed, and gives each thread
    an arena: the holes between what lives add up. :func:`give_back` is for those that are left.
    What was seen is in docs/results/serving.md.

    Args:
        large: bytes from which a buffer has a mapping of its own, which goes back when it is freed; glibc's own first value.
        arenas: heaps that threads share.
    """
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return False
    global _usual
    _usual = (large, large)
    return all([mallopt(_MMAP, large), mallopt(_TRIM, large), mallopt(_ARENAS, arenas)])


@contextlib.contextmanager
def reused(device: Any) -> Iterator[bool]:
    """Have glibc's malloc keep what is freed inside the block, where `device` is a CPU; whether it does. For the whole process.

    A step of training frees gigabytes of activations. By default glibc gives them back to the system, and the next step gets
    them as fresh pages, each a fault that clears it first. After the block what is free is given back.
    """
    global _inside
    mallopt = _glibc("mallopt") if device.type == "cpu" else None
    if mallopt is None:
        yield False
        return
    _inside += 1
    mallopt(_MMAP, _MOST)
    mallopt(_TRIM, _NEVER)
    try:
        yield True
    finally:
        _inside -= 1
        if not _inside:
            mallopt(_MMAP, _usual[0])
            mallopt(_TRIM, _usual[1])
            give_back()


def _glibc(name: str) -> Any:
    """A function of glibc; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library
        return None
    if name == "mallopt":
        found.argtypes, found.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return found
