"""The resolver as vLLM asks it: a path or None, whatever happens inside. vLLM's two classes are stood in for."""

from __future__ import annotations

import asyncio
import logging
import sys
import types
from dataclasses import dataclass

import pytest
import torch

from loralloy.errors import LoralloyError
from loralloy.vllm_plugin import plugin
from loralloy.vllm_plugin.resolver import Resolver, make_resolver
from loralloy.vllm_plugin.settings import Settings


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class Registry:
    def __init__(self):
        self.resolvers = {}

    def get_supported_resolvers(self):
        return self.resolvers.keys()

    def register_resolver(self, name, resolver):
        self.resolvers[name] = resolver


@pytest.fixture
def vllm(monkeypatch):
    """Stubs of vllm.lora.request and vllm.lora.resolver."""
    request, resolver = types.ModuleType("vllm.lora.request"), types.ModuleType("vllm.lora.resolver")
    request.LoRARequest = LoRARequest
    resolver.LoRAResolver, resolver.LoRAResolverRegistry = type("LoRAResolver", (), {}), Registry()
    for module in (types.ModuleType("vllm"), types.ModuleType("vllm.lora"), request, resolver):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return resolver.LoRAResolverRegistry


class Models:
    """What the plugin reads of vLLM's OpenAIServingModels, and how that asks."""

    def __init__(self, resolver, rank=8, dtype=torch.float32):
        lora = types.SimpleNamespace(max_lora_rank=rank, lora_dtype=dtype)
        self.engine_client = types.SimpleNamespace(
            vllm_config=types.SimpleNamespace(lora_config=lora),
            output_processor=types.SimpleNamespace(request_states={}),
        )
        self.lora_requests, self.resolver = {}, resolver

    async def resolve_lora(self, name):
        found = await self.resolver.resolve_lora("tiny/llama", name)
        if found is not None:
            self.lora_requests[name] = found
        return found

    def ask(self, *names):
        async def go():
            return await asyncio.gather(*(self.resolve_lora(name) for name in names))

        return asyncio.run(go())


@pytest.fixture
def settings(bank_folder, tmp_path):
    return Settings(bank_folder, tmp_path / "cache")


def test_names_to_requests(vllm, settings, caplog):
    caplog.set_level(logging.INFO, "vllm.loralloy")
    models = Models(make_resolver(Resolver(settings)))
    plain, composed, again, wrong = models.ask("a", "0.6*a + 0.4*b", "0.4*b + 0.6*a", "0.6*a +")
    assert plain.lora_path == str(settings.bank / "a")
    assert composed.lora_name == "0.6*a + 0.4*b" and again.lora_name == "0.4*b + 0.6*a"
    assert composed.lora_path == again.lora_path and composed.lora_path.startswith(str(settings.cache))
    assert wrong is None
    assert sum(" merged in " in r.message for r in caplog.records) == 1
    (said,) = [r.message for r in caplog.records if "not served" in r.message]
    assert "'0.6*a +' is not served: composition" in said


def test_one_composition_asked_for_by_many_at_once_is_merged_once(vllm, settings):
    resolver = Resolver(settings)
    found = Models(make_resolver(resolver)).ask(*["a - b", "-b + a"] * 4)
    assert len({r.lora_path for r in found}) == 1 and resolver.composer.merges == 1


def test_the_rank_is_vllms(vllm, settings):
    resolver = Resolver(settings)
    Models(make_resolver(resolver), rank=16, dtype=torch.bfloat16).ask("a")
    assert (resolver.composer.rank, resolver.composer.dtype) == (16, torch.bfloat16)


@pytest.mark.parametrize("own, most, rank", [(4, 16, 4), (32, 16, 16), (None, 16, 16)])
def test_the_rank_asked_for(vllm, settings, own, most, rank):
    resolver = Resolver(Settings(settings.bank, settings.cache, rank=own))
    Models(make_resolver(resolver), rank=most).ask("a")
    assert resolver.composer.rank == rank


def test_without_a_server_in_sight_the_rank_has_to_be_said(vllm, settings, caplog):
    alone = make_resolver(Resolver(settings))
    assert asyncio.run(alone.resolve_lora("tiny/llama", "a")) is None
    assert "set LORALLOY_RANK" in caplog.text
    said = make_resolver(Resolver(Settings(settings.bank, settings.cache, rank=8)))
    assert asyncio.run(said.resolve_lora("tiny/llama", "a")).lora_path == str(settings.bank / "a")


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s, t: Settings(t / "gone", s.cache), "no such folder"),
        (lambda s, t: Settings(s.bank, s.bank / "a" / "adapter_config.json"), "LORALLOY_CACHE"),
    ],
)
def test_settings_that_do_not_work_are_told_and_nothing_is_raised(vllm, settings, tmp_path, caplog, change, says):
    models = Models(make_resolver(Resolver(change(settings, tmp_path))))
    assert models.ask("a", "a + b") == [None, None]
    assert says in caplog.text


def test_another_base_model_is_refused(vllm, settings, caplog):
    resolver = make_resolver(Resolver(Settings(settings.bank, settings.cache, rank=8)))
    assert asyncio.run(resolver.resolve_lora("other/mistral", "a")) is None
    assert "other/mistral" in caplog.text and "LORALLOY_ASSUME_SAME_BASE" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("odd"), OSError(28, "No space left on device", "x"), MemoryError()])
def test_nothing_that_fails_inside_reaches_vllm(vllm, settings, caplog, monkeypatch, error):
    models = Models(make_resolver(Resolver(settings)))
    models.ask("a")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("loralloy.merging.run", fail)
    assert models.ask("a + b") == [None]
    assert "'a + b' is not served" in caplog.text
    monkeypatch.undo()


def test_a_composition_under_way_is_not_deleted(vllm, bank_folder, tmp_path):
    """The whole chain with a cache of three: vLLM's own lists decide what may go."""
    limit = 64 << 10  # by what is reserved for one, room for three of them
    resolver = Resolver(Settings(bank_folder, tmp_path / "cache", max_bytes=limit, grace=0.0))
    models = Models(make_resolver(resolver))
    (first,) = models.ask("a + b")
    models.engine_client.output_processor.request_states["x"] = types.SimpleNamespace(lora_name="a + b")
    for i in range(1, 20):
        models.ask(f"a + {i}*b")
        assert resolver.composer.store.size <= limit
        assert (resolver.composer.store.folder / first.lora_path).is_dir()
    models.engine_client.output_processor.request_states.clear()
    for i in range(1, 20):
        models.ask(f"a - {i}*b")
    assert not (resolver.composer.store.folder / first.lora_path).is_dir()


def test_register(vllm, bank_folder, monkeypatch, caplog):
    monkeypatch.delenv("LORALLOY_BANK", raising=False)
    plugin.register()
    assert not vllm.resolvers
    monkeypatch.setenv("LORALLOY_BANK", str(bank_folder))
    monkeypatch.setenv("LORALLOY_RANK", "many")
    plugin.register()
    assert not vllm.resolvers and "LORALLOY_RANK='many'" in caplog.text
    monkeypatch.setenv("LORALLOY_RANK", "16")
    plugin.register()
    (made,) = vllm.resolvers.values()
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in caplog.text
    plugin.register()
    assert list(vllm.resolvers.values()) == [made]


def test_the_entry_point_is_declared():
    from importlib.metadata import entry_points

    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "loralloy"]
    assert found.load() is plugin.register


@pytest.mark.parametrize(
    "name, value",
    [("LORALLOY_RANK", "0"), ("LORALLOY_RANK", "2.5"), ("LORALLOY_CACHE_GIB", "-1"), ("LORALLOY_CACHE_GIB", "nan"),
     ("LORALLOY_GRACE", "-1"), ("LORALLOY_GRACE", "0"), ("LORALLOY_GRACE", "0.99"),
     ("LORALLOY_THREADS", "x")],
)  # fmt: skip
def test_settings_name_the_variable(name, value):
    with pytest.raises(LoralloyError, match=name):
        Settings.read({"LORALLOY_BANK": "bank", name: value})


def test_a_grace_that_covers_nothing_is_refused():
    """Between a name's resolution and vLLM's request there has to be time in which its folder stays."""
    with pytest.raises(LoralloyError, match=r"^LORALLOY_GRACE='0': give a number of at least 1 seconds$"):
        Settings.read({"LORALLOY_BANK": "bank", "LORALLOY_GRACE": "0"})
    made = Settings.read({"LORALLOY_BANK": "bank", "LORALLOY_GRACE": "1"})
    assert made is not None and made.grace == 1.0


def test_settings():
    assert Settings.read({}) is None
    made = Settings.read({"LORALLOY_BANK": "bank", "LORALLOY_CACHE": "cache", "LORALLOY_CACHE_GIB": "0.5"})
    assert made.bank.is_absolute() and made.cache.is_absolute() and made.max_bytes == 1 << 29 and made.threads >= 1
