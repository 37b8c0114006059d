"""`loralloy front`: before a vLLM server, route requests for `auto` and forward what asks a model."""

from __future__ import annotations

import os
from typing import Annotated, Any, Optional
from urllib.parse import urlsplit

import typer

from ..errors import LoralloyError
from .common import Kernel, SameBase, load_bank
from .route import UNLIKE, KOption, NoFallback, POption, RouterOption, TemperatureOption, UnlikeOption
from .serve import LOCAL


def front(
    bank: Annotated[str, typer.Argument(help="Folder of adapters: the one that vLLM was given as LORALLOY_BANK.")],
    index: Annotated[str, typer.Option(envvar="LORALLOY_INDEX", help="Index made by `loralloy index`.")],
    vllm: Annotated[str, typer.Option(help="Where vLLM answers.")] = "http://127.0.0.1:8000",
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for every network, with an API key.")
    ] = LOCAL[0],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8001,
    api_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(envvar="LORALLOY_API_KEY", help="What clients have to send; it is passed on to vLLM."),
    ] = None,
    step: Annotated[float, typer.Option(help="Routed weights are rounded to multiples of this.")] = 0.1,
    top: Annotated[int, typer.Option(min=1, help="The most adapters of one routed composition.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long vLLM may be silent.")] = 300.0,
    router: RouterOption = "auto",
    k: KOption = None,
    p: POption = None,
    kernel: Kernel = "exp",
    temperature: TemperatureOption = None,
    unlike: UnlikeOption = UNLIKE,
    no_fallback: NoFallback = False,
    assume_same_base: SameBase = False,
) -> None:
    """Stand before vLLM: `auto` becomes a composition that vLLM's plugin merges; others go on under one name each.

    Example: loralloy front examples/bank --index .assets/index --vllm http://127.0.0.1:8000
    """
    from ..weighting.unlike import check_threshold, usable_threshold

    try:
        import uvicorn

        from ..serving.routing import Routing
        from ..vllm_plugin.forward import Upstream
        from ..vllm_plugin.front import Front, create_front
        from ..vllm_plugin.routed import rounded
    except ImportError as error:
        raise LoralloyError(f"the front needs {error.name}: pip install 'loralloy[front]'") from None

    if host not in LOCAL and not api_key:
        raise LoralloyError(f"--host {host} can be reached from elsewhere; set LORALLOY_API_KEY, or keep to {LOCAL[0]}")
    address = urlsplit(vllm)
    if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
        raise LoralloyError(f"--vllm {vllm} is no address; give one such as http://127.0.0.1:8000")
    if "@" in address.netloc:  # it is told to clients, in errors
        raise LoralloyError("--vllm has a user or password in it; leave them out, vLLM takes a key (LORALLOY_API_KEY)")
    rounded({}, step, top)  # raises for a step that is none
    threshold = check_threshold(1.0 if no_fallback else unlike)
    from .ask import open_router

    adapters = load_bank(bank, assume_same_base, argument=True)
    weigher: Any = open_router(index, adapters, k, p, kernel, temperature, router, threshold < 1, show=20)
    if unlike == UNLIKE:  # what was asked for by name is obeyed
        threshold = usable_threshold(threshold, weigher.index.manifest.template)
    weigher.weigh("The first text loads the embedder, which no request should wait for.")
    app = create_front(
        Front(Routing(weigher, threshold), Upstream(vllm, seconds), step, top, adapters=frozenset(adapters.names)),
        api_key,
        list(LOCAL[:2]) if host in LOCAL else None,
    )
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level=os.environ.get("LORALLOY_LOG", "info"),
        server_header=False,
        timeout_graceful_shutdown=20,
        timeout_keep_alive=75,
    )
