"""What every test shares: offline hubs, deterministic hypothesis, and the folders that only `make setup` fills."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
settings.register_profile(
    "loralloy",
    deadline=None,
    derandomize=True,  # the same examples every run: a red test stays red
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("loralloy")


@pytest.fixture(scope="session")
def real_model_folder() -> Path:
    """The converted SmolLM2-135M-Instruct; skips where `make setup` has not made it."""
    folder = ROOT / ".assets" / "models" / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder.relative_to(ROOT)} is missing; run `make setup`")
    return folder


@pytest.fixture(scope="session")
def real_bank_folder() -> Path:
    """The shipped bank; skips where it is not there."""
    folder = ROOT / "examples" / "bank"
    if not any(folder.glob("*/adapter_config.json")):
        pytest.skip(f"{folder.relative_to(ROOT)} holds no adapter; train the bank or check it out")
    return folder
