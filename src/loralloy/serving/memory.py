"""Memory of a long-running server, kept from growing by fragments."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_TRIM, _MMAP, _ARENAS = -1, -3, -8  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX of glibc's malloc.h


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
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return all([mallopt(_MMAP, large), mallopt(_TRIM, large), mallopt(_ARENAS, arenas)])


def _glibc(name: str) -> Any:
    """A function of glibc; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library
        return None
