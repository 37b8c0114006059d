"""`loralloy serve`: compositions over HTTP, in the shape of OpenAI's API."""

from __future__ import annotations

import os
from typing import Annotated, Any, Optional

import typer

from ..errors import LoralloyError
from .common import MODEL, DtypeOption, Kernel, LoadInOption, ModelOption, SameBase, load_bank, load_model
from .route import UNLIKE, KOption, NoFallback, POption, RouterOption, TemperatureOption, UnlikeOption

LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    bank: Annotated[str, typer.Argument(help="Folder of adapters.")],
    model: ModelOption = MODEL,
    index: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(envvar="LORALLOY_INDEX", help="Index made by `loralloy index`; without one there is no auto."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for every network, with an API key.")
    ] = LOCAL[0],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8000,
    api_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(envvar="LORALLOY_API_KEY", help="What clients have to send; better in the variable than here."),
    ] = None,
    router: RouterOption = "auto",
    k: KOption = None,
    p: POption = None,
    kernel: Kernel = "exp",
    temperature: TemperatureOption = None,
    unlike: UnlikeOption = UNLIKE,
    no_fallback: NoFallback = False,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 32,
    cache_tokens: Annotated[int, typer.Option(min=16, help="Room of the KV cache: rows times their longest.")] = 65536,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of one answer.")] = 1024,
    max_waiting: Annotated[int, typer.Option(min=1, help="Rows that may wait; then clients get 429.")] = 256,
    seconds: Annotated[float, typer.Option(min=0.1, help="The most a request may take.")] = 300.0,
    resident: Annotated[int, typer.Option(min=1, help="Adapters kept in memory beyond those in use.")] = 32,
    merged_mib: Annotated[int, typer.Option(min=1, help="MiB for merged compositions.")] = 2048,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Serve a page at / to ask and to compare.")] = True,
    dtype: DtypeOption = "auto",
    load_in: LoadInOption = None,
    assume_same_base: SameBase = False,
) -> None:
    """Serve a bank: each request names an adapter or a composition, or has its query routed; all share one batch.

    Example: loralloy serve examples/bank --index .assets/index
    """
    from ..weighting.unlike import check_threshold, usable_threshold

    try:
        import uvicorn

        from ..serving.app import create_app
        from ..serving.service import Limits, build
    except ImportError as error:
        raise LoralloyError(f"serving needs {error.name}: pip install 'loralloy[serve]'") from None

    if host not in LOCAL and not api_key:
        raise LoralloyError(f"--host {host} can be reached from elsewhere; set LORALLOY_API_KEY, or keep to {LOCAL[0]}")
    threshold = check_threshold(1.0 if no_fallback else unlike)
    adapters = load_bank(bank, assume_same_base, argument=True)
    weigher: Any = None
    if index is not None:
        from .ask import open_router

        weigher = open_router(index, adapters, k, p, kernel, temperature, router, threshold < 1, show=20)
        if unlike == UNLIKE:  # what was asked for by name is obeyed
            threshold = usable_threshold(threshold, weigher.index.manifest.template)
        weigher.weigh("The first text loads the embedder, which no request should wait for.")
    loaded, tokenizer, base = load_model(model, dtype, load_in)
    service = build(
        loaded,
        tokenizer,
        adapters,
        weigher,
        None if assume_same_base else base,
        threshold=threshold,
        resident=resident,
        max_rows=max_rows,
        cache_tokens=cache_tokens,
        max_waiting=max_waiting,
        max_bytes=merged_mib << 20,
        limits=Limits(max_tokens=max_tokens, seconds=seconds),
    )
    app = create_app(service, api_key, list(LOCAL[:2]) if host in LOCAL else None, page)
    # one process: the model and its batch are in it
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level=os.environ.get("LORALLOY_LOG", "info"),
        timeout_graceful_shutdown=int(service.limits.stopping_seconds),
        server_header=False,
        timeout_keep_alive=75,  # clients that pool connections reuse one as it closes, if it closes soon
    )
