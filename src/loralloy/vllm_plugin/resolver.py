"""What vLLM asks for a model's name that it does not know."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ..errors import LoralloyError
from .composer import Composed, Composer
from .lending import Lending
from .running import Running
from .settings import Settings
from .store import Store

if TYPE_CHECKING:
    from ..bank import Bank

MAX_WAITING = 256  # merges that may wait for their turn
log = logging.getLogger("vllm.loralloy")  # under vLLM's own logger, so that it is printed as vLLM's lines are


class Resolver:
    """Names to folders for vLLM; nothing that it raises reaches vLLM, which is told "no such adapter", and the log why.

    The bank is opened with the first name that is asked for: plugins are loaded in every process of vLLM, on every host,
    and only the API server's asks.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.running: Running | None = None
        self.composer: Composer | None = None
        self.lending: Lending | None = None
        self._look = ThreadPoolExecutor(1, "loralloy-look")
        self._merge = ThreadPoolExecutor(1, "loralloy-merge", _few_threads, (settings.threads,))
        self._waiting = 0

    async def path(self, base: str, name: str) -> str | None:
        """The folder of the adapter called `name`; None if there is none, for whatever reason."""
        try:
            if self.composer is None:
                self.running = Running.find()  # here, in vLLM's own coroutine, and not in a thread
            composed = await self._composed(base, name)
        except LoralloyError as error:
            log.warning("%s is not served: %s", _short(name), error)
            return None
        except OSError as error:
            log.error("%s is not served: %s: %s", _short(name), error.filename or "disk", error.strerror or error)
            return None
        except Exception:
            log.exception("%s is not served: the plugin failed", _short(name))
            return None
        return str(composed.path)

    async def _composed(self, base: str, name: str) -> Composed:
        loop = asyncio.get_running_loop()
        composed = await loop.run_in_executor(self._look, self._ready, base, name)
        if composed is None:
            if self._waiting >= MAX_WAITING:
                raise LoralloyError(f"{self._waiting} compositions wait to be merged; ask again later")
            self._waiting += 1
            try:
                composed = await loop.run_in_executor(self._merge, self._made, name)
            finally:
                self._waiting -= 1
            said = f"; ||dW - exact|| / ||exact|| = {composed.error:.2e}" if composed.error is not None else ""
            how = f"merged in {composed.seconds:.2f} s" if composed.merged else "merged meanwhile"
            log.info("%s %s to rank %d%s: %s", _short(name), how, composed.rank, said, composed.key)
        return composed

    def _ready(self, base: str, name: str) -> Composed | None:
        composed = self._opened(base).ready(name)
        return composed if composed is not None and self._lent(composed, name) else None

    def _made(self, name: str) -> Composed:
        assert self.composer is not None
        composed = self.composer.compose(name)
        if not self._lent(composed, name):
            raise LoralloyError(
                "its folder was deleted as soon as it was made; ask again, and leave LORALLOY_CACHE alone"
            )
        return composed

    def _lent(self, composed: Composed, name: str) -> bool:
        return composed.key is None or self.lending is None or self.lending.lend(composed.key, name)

    def _opened(self, base: str) -> Composer:
        if self.composer is None:
            bank = open_bank(self.settings, base)
            running = self.running
            rank = _rank(self.settings.rank, running.max_rank if running else None)
            store = Store(self.settings.cache, self.settings.max_bytes)
            store.sweep()
            self.lending = Lending(store, running, self.settings.grace)
            if running is None or not running.can_forget:
                log.warning("this vLLM does not show its adapters; the cache fills up to its limit and deletes nothing")
            if running is not None and running.restricted:
                log.warning("--lora-target-modules %s: vLLM drops all others from adapters", running.restricted)
            dtype = running.dtype if running else None
            self.composer = Composer(bank, store, rank, dtype, self.lending.make_room)
            log.info("%d adapters of %s; merged ones get rank %d at most, in %s", len(bank), bank.base, rank, dtype)
        return self.composer


def open_bank(settings: Settings, base: str | None = None) -> Bank:
    """The bank, checked against the base model's name. Raises LoralloyError."""
    from ..bank import Bank
    from ..base_ref import BaseRef, compare

    if not settings.bank.is_dir():
        raise LoralloyError(
            f"the bank {settings.bank} (LORALLOY_BANK, --bank): no such folder here; give a folder of adapters"
        )
    bank = Bank.load(settings.bank, settings.same_base)
    if base is not None and not settings.same_base:
        verdict, why = compare(bank.base, BaseRef(base))
        if verdict == "different":
            raise LoralloyError(
                f"LORALLOY_BANK {settings.bank} is of {bank.base}, and vLLM serves {base}: {why}; set "
                "LORALLOY_ASSUME_SAME_BASE=1 if you know that they are one"
            )
    return bank


def _few_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _rank(wanted: int | None, most: int | None) -> int:
    if wanted is None and most is None:
        raise LoralloyError("vLLM's --max-lora-rank cannot be seen from here; set LORALLOY_RANK to it")
    if wanted is not None and most is not None and wanted > most:
        log.warning("LORALLOY_RANK=%d is more than --max-lora-rank %d, which is taken", wanted, most)
    return min(r for r in (wanted, most) if r is not None)


def _short(name: str) -> str:
    return repr(name if len(name) <= 200 else name[:197] + "...")


def make_resolver(resolver: Resolver) -> Any:
    """The resolver as an instance of vLLM's own class."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class LoRAlloyResolver(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            path = await resolver.path(base_model_name, lora_name)
            # vLLM gives it a number of its own, the next one (OpenAIServingModels.resolve_lora)
            return None if path is None else LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=path)

    return LoRAlloyResolver()
