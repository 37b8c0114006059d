"""Domain-incremental streams: domains arrive one by one, each gets an adapter from the base, and the merge is learned anew."""

from __future__ import annotations

from .buffer import BufferRow, MemoryBuffer
from .experience import DomainStream, Experience
from .workshop import Evaluation, Workshop, make_workshop

__all__ = [
    "BufferRow",
    "DomainStream",
    "Evaluation",
    "Experience",
    "MemoryBuffer",
    "Workshop",
    "make_workshop",
]
