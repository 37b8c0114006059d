"""A tiny served world, its scheduler, and a server in the process."""

from __future__ import annotations

import pytest
from browser import Look, chromium, listening, slowly
from serving_scenes import Api, Tiny

from loralloy.bank import Bank
from loralloy.live.base import load_base
from loralloy.live.paged import PagedModel
from loralloy.retrieval import HashEmbedder, Index
from loralloy.serving.scheduler import Scheduler
from loralloy.serving.service import build
from loralloy.weighting import open_weigher
from world import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def tiny(world):
    model, tokenizer = load_base(str(world.model), "float32", "cpu")
    return Tiny(model, tokenizer, Bank.load(world.bank), world.root)


@pytest.fixture
def paged(tiny):
    live = PagedModel(tiny.model, tiny.bank)
    yield live
    live.close()


@pytest.fixture
def scheduler(tiny, paged):
    return Scheduler(tiny.model, tiny.tokenizer, paged)


@pytest.fixture(scope="session")
def weigher(world):
    index = Index.open(world.index, HashEmbedder(128))
    made = open_weigher(index, "paper", k=20, show=20)
    made.prepare()
    return made


@pytest.fixture
def serve(tiny, weigher):
    made = []

    def start(key=None, hosts=None, headers=None, index=True, **options):
        service = build(tiny.model, tiny.tokenizer, tiny.bank, weigher if index else None, **options)
        made.append(Api(service, key, hosts, headers))
        return made[-1]

    yield start
    for api in made:
        api.close()
        api.service.engine.scheduler.live.close()


@pytest.fixture
def api(serve):
    return serve()


@pytest.fixture(scope="session")
def playwright():
    """Playwright; skips where it, the page's files or the browser are missing."""
    made = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install -e '.[dev]'")
    pytest.importorskip("nicegui", reason="no page: pip install -e '.[page]'")
    if chromium() is None:
        pytest.skip("no Chromium: apt-get install chromium, or name its executable in LORALLOY_CHROMIUM")
    return made


@pytest.fixture(scope="module")
def browser(playwright):
    with playwright.sync_playwright() as p:
        # --no-sandbox: in containers tests run as root
        made = p.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def start(tiny, weigher, browser, playwright, request):
    """A server on a port and a tab for its page. `slow`: seconds more for each step; `options`: the service's; else the tab's."""

    def go(world=tiny, key=None, index=True, slow=0.0, options=None, **context):
        service = build(world.model, world.tokenizer, world.bank, weigher if index else None, **(options or {}))
        request.addfinalizer(service.engine.scheduler.live.close)
        if slow:
            slowly(service, slow)
        there = listening(service, key)
        url = there.__enter__()
        request.addfinalizer(lambda: there.__exit__(None, None, None))
        look = Look(browser, url, service, playwright.expect, **context)
        request.addfinalizer(look.close)
        return look

    return go
