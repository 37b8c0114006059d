"""The page at ``/``: static files that talk to the same API as every other client, so that the key, the limits and the
metrics are the same for them. No state on the server, no websocket, nothing from the net.

Vue and Quasar are taken from the NiceGUI package, which carries them for offline use; its server is not run. Mounted in
this process it answers unknown and wrong API paths with a page of its own and status 200, keeps memory for each visitor,
key or not, and opens a websocket to pages of other origins.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

HERE = Path(__file__).parent
MISSING = (
    "LoRAlloy is serving; its API is at /v1 and described at /docs.\n"
    "The page that would be here needs a package: pip install 'loralloy[page]'\n"
)
_OURS = ("index.html", "start.js", "page.js", "api.js", "lane.js", "layers.js", "parts.js", "page.css", "icon.svg")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Vue compiles the page's own templates, which takes unsafe-eval; no inline script runs, and no address but this one is asked.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
    "vary": "accept-encoding",
}


def library_files() -> dict[str, Path]:
    """The libraries' files by the names under which the page asks for them; empty without the package that carries them."""
    spec = importlib.util.find_spec("nicegui")
    if spec is None or not spec.submodule_search_locations:
        return {}
    static = Path(next(iter(spec.submodule_search_locations))) / "static"
    files = {
        "vue.js": static / "vue.esm-browser.prod.js",
        "quasar.js": static / "quasar.umd.prod.js",
        "quasar.css": static / "quasar.unimportant.prod.css",
        "quasar-important.css": static / "quasar.important.prod.css",
    }
    return files if all(path.is_file() for path in files.values()) else {}


def add_page(app: FastAPI) -> None:
    """Answer ``/`` with the page, or with what to install for it. Only files known by name are ever read."""
    libraries = library_files()
    if not libraries:

        @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
        async def missing() -> PlainTextResponse:
            return PlainTextResponse(MISSING)

        return
    files = {name: HERE / name for name in _OURS} | libraries

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return _answer(request, files["index.html"])

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        if name not in files:
            return Response(status_code=404)
        return _answer(request, files[name])


@lru_cache(32)
def _packed(path: Path) -> tuple[bytes, bytes, str]:
    """A file, gzipped too, and its tag."""
    raw = path.read_bytes()
    return raw, gzip.compress(raw, 6, mtime=0), hashlib.sha256(raw).hexdigest()[:16]


def takes_gzip(accepted: str) -> bool:
    """Whether an Accept-Encoding header takes gzip (RFC 9110, 12.5.3): named, or by ``*``, with a weight above 0."""
    weights: dict[str, float] = {}
    for part in accepted.lower().split(","):
        coding, *parameters = (field.strip() for field in part.split(";"))
        weight = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    weight = float(value)
                except ValueError:
                    weight = 0.0  # not sent packed to a client that cannot say what it takes
        weights["gzip" if coding == "x-gzip" else coding] = weight
    return weights.get("gzip", weights.get("*", 0.0)) > 0


def _answer(request: Request, path: Path) -> Response:
    raw, small, tag = _packed(path)
    squeezed = takes_gzip(",".join(request.headers.getlist("accept-encoding")))
    headers = HEADERS | {"etag": f'"{tag}{"-gzip" if squeezed else ""}"', "content-type": _TYPES[path.suffix]}
    if headers["etag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if squeezed:
        headers["content-encoding"] = "gzip"
    return Response(small if squeezed else raw, headers=headers)
