"""Deterministic algorithms are on while a GPU trains and the environment asks for them, and off again afterwards."""

from __future__ import annotations

import pytest
import torch

from loralloy.training.repeatable import VARIABLE, repeatable


def state():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.parametrize(
    ("device", "value", "on"),
    [
        ("cuda", ":4096:8", True),
        ("cuda", ":16:8", True),
        ("cuda", None, False),
        ("cuda", "1", False),
        ("cpu", ":4096:8", False),
    ],
)
def test_only_where_it_is_asked_for(monkeypatch, device, value, on):
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    before = state()
    with pytest.raises(RuntimeError, match="stop"), repeatable(torch.device(device)) as asked:
        assert asked is on
        assert state() == ((True, False, False) if on else before)
        raise RuntimeError("stop")
    assert state() == before


def test_what_was_set_before_is_set_again(monkeypatch):
    monkeypatch.setenv(VARIABLE, ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with repeatable(torch.device("cuda")):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert state()[:2] == (True, True)
    finally:
        torch.use_deterministic_algorithms(False)
