"""A small bank on disk, and composers over it."""

from __future__ import annotations

import pytest
from vllm_bank import small

from loralloy.bank import Bank
from loralloy.vllm_plugin.composer import Composer
from loralloy.vllm_plugin.store import Store


@pytest.fixture
def bank_folder(tmp_path):
    for seed, name in enumerate("abc"):
        small(name, seed + 1).save(tmp_path / "bank" / name)
    return tmp_path / "bank"


@pytest.fixture
def compose(bank_folder, tmp_path):
    """compose(rank=8, max_bytes=...) -> a Composer with a cache of its own process's kind."""
    stores = []

    def make(rank=8, max_bytes=1 << 20, bank=None, **more):
        stores.append(Store(tmp_path / "cache", max_bytes))
        return Composer(bank or Bank.load(bank_folder), stores[-1], rank, **more)

    yield make
    for store in stores:
        store.close()
