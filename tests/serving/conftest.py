"""A tiny served world, its scheduler, and a server in the process."""

from __future__ import annotations

import pytest
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
