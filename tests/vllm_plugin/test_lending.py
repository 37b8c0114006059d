"""What vLLM was given is taken back in two steps, and never what it may still load."""

from __future__ import annotations

import pytest

from loralloy.vllm_plugin.lending import Lending
from loralloy.vllm_plugin.store import REPORT, Full, Store

KEYS = [c * 32 for c in "0123456789abcdef"]


class Server:
    can_forget = True

    def __init__(self):
        self.names, self.under_way = set(), set()

    def forget(self, names):
        self.names -= set(names)


@pytest.fixture
def world(tmp_path):
    """A cache with room for five, a server, and a clock that the test turns."""

    class World:
        store, server, now = Store(tmp_path / "cache", 5500), Server(), 0.0

        def ask(self, i):
            """As the resolver does for a name that the server does not have."""

            def make(folder):
                (folder / "x").write_bytes(b"x" * 998)
                (folder / REPORT).write_text("{}")

            if not self.store.has(KEYS[i]):
                self.lending.make_room(1000)
            new = self.store.take(KEYS[i], 1000, make)
            assert self.lending.lend(KEYS[i], f"name{i}")
            self.server.names.add(f"name{i}")
            return new

        def alive(self):
            """The server may load whatever it has a name for, or a request under way for."""
            return all(self.store.has(KEYS[int(n[4:])]) for n in self.server.names | self.server.under_way)

    world = World()
    world.lending = Lending(world.store, world.server, 100.0, lambda: world.now)
    yield world
    world.store.close()


def test_the_oldest_is_forgotten_then_deleted(world):
    for i in range(4):
        world.ask(i)
        world.now += 1
    world.now += 200
    world.ask(4)  # over the mark: the oldest is forgotten, and stays for now
    assert world.server.names == {"name1", "name2", "name3", "name4"} and world.store.has(KEYS[0])
    world.now += 101
    world.ask(5)
    world.now += 101
    world.ask(6)
    assert not world.store.has(KEYS[0]) and world.alive()
    assert world.store.size <= 5500


def test_one_that_is_asked_for_again_comes_back_to_the_end(world):
    for i in range(4):
        world.ask(i)
    world.now += 200
    world.ask(4)
    assert "name0" not in world.server.names
    assert not world.ask(0)  # not merged again
    world.now += 200
    with pytest.raises(Full):
        world.ask(5)  # two are forgotten now, and deleted later
    world.now += 101
    world.ask(5)
    assert world.store.has(KEYS[0]) and not world.store.has(KEYS[1]) and world.alive()


def test_a_request_under_way_keeps_it(world):
    for i in range(4):
        world.ask(i)
    world.server.under_way = {"name0"}
    for i in range(4, 9):
        world.now += 200
        world.ask(i)
        assert world.alive()
    assert world.store.has(KEYS[0])
    world.server.under_way = set()
    for i in range(9, 12):
        world.now += 200
        world.ask(i)
    assert not world.store.has(KEYS[0]) and world.alive()


def test_a_request_that_comes_as_its_name_is_forgotten_keeps_it(world):
    """It had looked the name up just before."""
    for i in range(4):
        world.ask(i)
    world.now += 200
    world.ask(4)
    assert "name0" not in world.server.names
    world.server.under_way = {"name0"}
    world.now += 200
    with pytest.raises(Full):
        world.ask(5)  # the next oldest is forgotten in its place
    world.now += 200
    assert world.ask(5) and world.alive() and world.store.has(KEYS[0])


def test_all_lent_lately_is_full(world):
    for i in range(5):
        world.ask(i)
    with pytest.raises(Full):
        world.ask(5)
    assert world.alive() and len(world.server.names) == 5
    world.now += 300
    with pytest.raises(Full):
        world.ask(5)  # forgotten now, deleted after another while
    world.now += 101
    assert world.ask(5) and world.alive()


def test_one_lent_again_as_it_is_let_go_of_is_held(world):
    """The folder was found, and its hold went before it could be lent."""
    world.ask(0)
    world.store.release(KEYS[0])
    assert world.lending.lend(KEYS[0], "name0") and world.store.held == {KEYS[0]}
    assert not world.lending.lend(KEYS[1], "name1")


@pytest.mark.parametrize("server", [None, type("Blind", (Server,), {"can_forget": False})()])
def test_where_the_server_cannot_be_seen_nothing_is_deleted(world, server):
    world.lending = Lending(world.store, server, 0.0, lambda: world.now)
    for i in range(5):
        world.ask(i)
    world.now += 1e6
    with pytest.raises(Full):
        world.ask(5)
    assert all(world.store.has(k) for k in KEYS[:5])


def test_years_of_requests(world):
    """A long run: never over the limit, never a name without its folder."""
    import random

    draw = random.Random(0)
    for _ in range(200):
        world.now += draw.choice((0, 30, 150))
        i = draw.randrange(16)
        if f"name{i}" not in world.server.names:
            try:
                world.ask(i)
            except Full:
                continue
        world.server.under_way = {f"name{i}"} if draw.random() < 0.5 else set()
        assert world.alive() and world.store.size <= 5500
    assert world.store.evicted > 10
