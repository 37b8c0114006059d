"""The entry point that vLLM calls in each of its processes (group ``vllm.general_plugins``)."""

from __future__ import annotations

import logging
import os

from ..errors import LoralloyError
from .settings import Settings

NAME = "loralloy"
log = logging.getLogger("vllm.loralloy")


def register() -> None:
    """Give vLLM the resolver, if LORALLOY_BANK names a bank; may be called any number of times.

    Nothing is opened here. A setting that is wrong is logged, and vLLM starts without the resolver.
    """
    try:
        settings = Settings.read()
    except LoralloyError as error:
        log.error("compositions are not served: %s", error)
        return
    if settings is None:
        log.debug("LORALLOY_BANK is not set: compositions are not served")
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from .resolver import Resolver, make_resolver

    if NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    LoRAResolverRegistry.register_resolver(NAME, make_resolver(Resolver(settings)))
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").strip().lower() not in ("1", "true"):
        log.warning("VLLM_ALLOW_RUNTIME_LORA_UPDATING=True is not set: vLLM will not ask for compositions")
