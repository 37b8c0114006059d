"""Retrieval: task examples -> text -> vectors -> neighbours. What `loralloy.weighting.retrieved` stands on.

Heavy libraries (sentence-transformers, chromadb) are imported only when a model is loaded or a Chroma store is opened.
"""

from .embed import Embedder, TextEncoder, find_minilm
from .hashing import HashEmbedder
from .index import Index
from .manifest import IndexedTask, Manifest
from .store import ExactStore, Store

__all__ = [
    "Embedder",
    "ExactStore",
    "HashEmbedder",
    "Index",
    "IndexedTask",
    "Manifest",
    "Store",
    "TextEncoder",
    "find_minilm",
]
