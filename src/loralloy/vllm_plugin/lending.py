"""Which merged adapters vLLM may load at any moment, and when one may be taken back."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from .store import Store

_HIGH = 0.8  # of the room: beyond it, the oldest are taken back, to be gone when the room is needed


class Server(Protocol):
    """What of :class:`.running.Running` is needed here."""

    @property
    def can_forget(self) -> bool: ...
    @property
    def under_way(self) -> set[str]: ...
    def forget(self, names: list[str]) -> None: ...


@dataclass
class _Lent:
    at: float
    names: set[str] = field(default_factory=set)
    forgotten: float | None = None


class Lending:
    """The keys that were given to a vLLM server, the oldest first.

    vLLM keeps a name that it has resolved and loads its folder again whenever it needs to, and an engine that does not find
    the folder dies. So a key is taken back in two steps: its names are forgotten in the server, which then asks anew if
    they are wanted (and the key is lent again, at the end of the line); `grace` seconds later, if no request under way
    uses it, the store may delete it.

    Args:
        store: that holds the keys.
        server: None where it cannot be seen; then nothing is taken back.
        grace: seconds between the steps, and before the first.
    """

    def __init__(
        self, store: Store, server: Server | None, grace: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.store, self.server, self.grace, self._clock = store, server, grace, clock
        self._lent: OrderedDict[str, _Lent] = OrderedDict()
        self._lock = threading.Lock()  # names come on the event loop, merges from their thread

    def lend(self, key: str, name: str) -> bool:
        """Hold `key` for `name`, which is about to be given to vLLM with its folder; False if the folder has gone."""
        with self._lock:  # around the hold too: make_room may be about to let go of it
            if not self.store.hold(key):
                return False
            entry = self._lent.setdefault(key, _Lent(0.0))
            entry.at, entry.forgotten = self._clock(), None
            entry.names.add(name)
            self._lent.move_to_end(key)
            return True

    def make_room(self, size: int) -> None:
        """Take back what is oldest, as far as `size` more bytes ask for it; what is in use, or was lent lately, stays."""
        server = self.server
        if server is None or not server.can_forget:
            return
        with self._lock:
            now, sizes, busy = self._clock(), self.store.entries(), server.under_way
            over = sum(sizes.values()) + size - _HIGH * self.store.max_bytes
            for key, entry in list(self._lent.items()):
                if over <= 0:
                    break
                if entry.names & busy:
                    continue
                if entry.forgotten is None and now - entry.at >= self.grace:
                    server.forget(sorted(entry.names))
                    entry.forgotten = now
                if entry.forgotten is not None:
                    over -= sizes.get(key, 0)
            busy = server.under_way  # those that came before their name was forgotten
            for key, entry in list(self._lent.items()):
                due = entry.forgotten is not None and now - entry.forgotten >= self.grace
                if due and not entry.names & busy:
                    self.store.release(key)
                    del self._lent[key]
