"""The page's files: what is served, under which headers, and what is not. What they do is in test_page_browser.py."""

from __future__ import annotations

import re
import sys

import pytest
from serving_scenes import refused
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from loralloy.serving import page as pages
from loralloy.serving.app import create_app


@pytest.fixture
def web(api):
    """A client of its own: `Api` shows errors of the application as they are, and speaks no websocket."""
    pytest.importorskip("nicegui", reason="needs the page: pip install -e '.[page]'")
    return TestClient(api.app, base_url="http://127.0.0.1", raise_server_exceptions=False)


def test_every_file_that_is_asked_for_is_there(web):
    html = web.get("/")
    assert html.status_code == 200 and html.headers["content-type"].startswith("text/html")
    waiting, seen = re.findall(r'(?:src|href)="([^"]+)"', html.text), set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        file = web.get("/" + path)
        assert file.status_code == 200 and file.content, path
        if path.endswith(".js") and "/quasar" not in path and "/vue" not in path:
            waiting += ["page/" + name for name in re.findall(r'(?:from|import)\s*\(?"\./([^"]+)"', file.text)]
    ours = {"page/" + name for name in pages._OURS if name != "index.html"}
    assert seen == ours | {"page/" + name for name in pages.library_files()}


def test_the_browser_is_told_to_ask_nobody_else(web):
    for path in ("/", "/page/page.js", "/page/quasar.css"):
        policy = web.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert "http" not in policy and "*" not in policy
        assert web.get(path).headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*\bsrc=)", web.get("/").text)


@pytest.mark.parametrize(
    "path", ["/page/", "/page/x.js", "/page/__init__.py", "/page/..%2Fapp.py", "/page/%2Fetc%2Fpasswd", "/pages"]
)
def test_nothing_else_is_served(web, path):
    assert web.get(path).status_code == 404


def test_only_reading(web):
    for path in ("/", "/page/page.js"):
        assert web.head(path).status_code == 200 and web.head(path).content == b""
        assert web.post(path, content=b"x" * 10).status_code == 405


def test_packed_and_remembered(web):
    plain = web.get("/page/vue.js", headers={"accept-encoding": "identity"})
    packed = web.get("/page/vue.js", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in plain.headers and packed.headers["content-encoding"] == "gzip"
    assert plain.content == packed.content  # the client unpacks
    assert int(packed.headers["content-length"]) < len(plain.content) / 2
    again = web.get("/page/vue.js", headers={"accept-encoding": "gzip", "if-none-match": packed.headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    assert packed.headers["etag"] != plain.headers["etag"]


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [
        ("gzip", True), ("br, GZIP;q=0.5", True), ("gzip ; q=1.0, identity;q=0", True), ("*", True), ("x-gzip", True),
        ("gzip;q=0", False), ("gzip; q=0.000, br", False), ("*, gzip;q=0", False), ("*;q=0", False), ("", False),
        ("identity", False), ("notgzip", False), ("gzip;q=x", False), ("gzip;q=0.001", True), (",;,gzip", True),
    ],
)  # fmt: skip
def test_packed_only_for_who_takes_it(web, accepted, packed):
    answer = web.get("/page/vue.js", headers={"accept-encoding": accepted})
    assert (answer.headers.get("content-encoding") == "gzip") is packed
    assert ("-gzip" in answer.headers["etag"]) is packed and answer.headers["vary"] == "accept-encoding"


def test_the_page_says_nothing_that_the_key_guards(serve):
    pytest.importorskip("nicegui")
    api = serve(key="secret")
    html = api.call("GET", "/").text
    assert api.call("GET", "/").status_code == 200
    assert not any(name in html for name in (*api.service.bank.names, "secret", str(api.service.bank.base.name)))
    for path in ("/v1/models", "/v1/server"):
        refused(api.call("GET", path), 401)


def test_other_hosts_get_no_page(serve):
    api = serve(hosts=["127.0.0.1", "localhost"])
    for path in ("/", "/page/page.js"):
        assert api.call("GET", path, headers={"host": "evil.example"}).status_code == 400


def test_there_is_no_websocket(web):
    for path in ("/", "/page/page.js", "/_nicegui_ws/socket.io/", "/socket.io/"):
        with pytest.raises(WebSocketDisconnect), web.websocket_connect(path):
            pass


def test_the_api_s_errors_stay_its_own(api):
    refused(api.call("GET", "/v1/nothing"), 404)
    refused(api.call("DELETE", "/v1/models"), 405)


def test_without_the_package_it_says_what_to_install(serve, monkeypatch):
    monkeypatch.setattr(pages, "library_files", dict)
    said = serve().call("GET", "/")
    assert said.status_code == 200 and said.headers["content-type"].startswith("text/plain")
    assert "pip install 'loralloy[page]'" in said.text


def test_a_package_without_the_files_is_none(monkeypatch, tmp_path):
    (tmp_path / "nicegui").mkdir()
    (tmp_path / "nicegui" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nicegui", raising=False)
    assert pages.library_files() == {}


def test_the_page_can_be_left_out(api):
    app = create_app(api.service, page=False)
    assert TestClient(app, base_url="http://127.0.0.1").get("/").status_code == 404


@pytest.mark.parametrize("page", [True, False])
def test_the_command_s_flag(world, monkeypatch, page):
    from loralloy.cli.serve import serve as command

    started = []
    monkeypatch.setattr("uvicorn.run", lambda app, **_: started.append(app))
    command(str(world.bank), str(world.model), dtype="float32", page=page)
    (app,) = started
    try:
        web = TestClient(app, base_url="http://127.0.0.1")
        assert web.get("/").status_code == (200 if page else 404)
        assert web.get("/", headers={"host": "evil.example"}).status_code == 400
    finally:
        app.state.service.engine.scheduler.live.close()
