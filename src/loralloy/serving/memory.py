"""Memory of a long-running server, kept from growing by fragments."""

from __future__ import annotations

import ctypes
import sys

_TRIM, _MMAP, _ARENAS = -1, -3, -8  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX of glibc's malloc.h


def keep_steady(large: int = 1 << 17, arenas: int = 2) -> bool:
    """Have glibc's malloc give what is freed back to the system; True where it could be told to. For the whole process.

    A server allocates and frees buffers of ever other sizes (caches, bodies, logits) in several threads. By default glibc
    raises the size from which a buffer is mapped by itself, up to 32 MiB, with every one that is freed, and gives each thread
    an arena: the holes between what lives add up. What was seen with and
    without it is in docs/results/serving.md; it does not promise a flat line.

    Args:
        large: bytes from which a buffer has a mapping of its own, which goes back when it is freed; glibc's own first value.
        arenas: heaps that threads share.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return all([mallopt(_MMAP, large), mallopt(_TRIM, large), mallopt(_ARENAS, arenas)])
