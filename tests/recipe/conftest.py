"""A bank on disk, and recipe files beside it."""

from __future__ import annotations

import itertools

import pytest
from recipe_scenes import MODULES, NAMES

from helpers import adapter, factors


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Three adapters of rank 2, 3 and 4 on disk, eight modules each."""
    folder = tmp_path_factory.mktemp("recipes") / "bank"
    for n, name in enumerate(NAMES):
        parts = {m: factors(10, 8, 2 + n, seed=100 * n + k) for k, m in enumerate(MODULES)}
        adapter(parts, name).save(folder / name)
    return folder


@pytest.fixture
def write(bank, tmp_path):
    """write(text) -> a recipe file beside `bank`, which is called BANK in it."""
    counter = itertools.count()

    def run(text):
        path = tmp_path / f"recipe{next(counter)}.yaml"
        path.write_text(text.replace("BANK", str(bank)))
        return path

    return run
