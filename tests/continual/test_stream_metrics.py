"""Identities of the accuracy matrix's metrics."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloy.continual.metrics import (
    Metrics,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    incremental_accuracy,
)
from loralloy.errors import LoralloyError

share = st.integers(0, 20).map(lambda n: n / 20)
matrices = st.integers(2, 5).flatmap(
    lambda t: st.lists(st.lists(share, min_size=t, max_size=t), min_size=t, max_size=t)
)


def close(a, b):
    return math.isclose(a, b, abs_tol=1e-12)


@given(st.lists(share, min_size=2, max_size=6))
def test_a_matrix_constant_in_time_forgets_and_transfers_nothing(row):
    matrix = [row] * len(row)
    assert forgetting(matrix) == 0 == backward_transfer(matrix)
    assert close(forward_transfer(matrix, row), 0)
    assert close(average_accuracy(matrix), sum(row) / len(row))


@given(matrices, share)
def test_one_value_everywhere(matrix, value):
    matrix = [[value] * len(matrix)] * len(matrix)
    metrics = Metrics.of(matrix, [0.0] * len(matrix))
    assert close(metrics.final_accuracy, value) and close(metrics.incremental_accuracy, value)
    assert close(metrics.forward_transfer, value)


@given(matrices)
def test_forgetting_is_at_least_what_backward_transfer_lost(matrix):
    """The best since a domain came is at least the accuracy when it came; with two domains they are the same."""
    assert forgetting(matrix) >= -backward_transfer(matrix) - 1e-12
    assert -1 <= backward_transfer(matrix) <= 1 and forgetting(matrix) <= 1
    if len(matrix) == 2:
        assert close(forgetting(matrix), -backward_transfer(matrix))


@given(matrices)
def test_forgetting_is_the_mean_of_drops_where_accuracy_only_falls(matrix):
    falling = [
        [max(matrix[s][j] for s in range(t, len(matrix))) for j in range(len(matrix))] for t in range(len(matrix))
    ]
    assert close(forgetting(falling), -backward_transfer(falling)) and forgetting(falling) >= 0


@given(matrices, share)
def test_adding_a_constant_moves_accuracy_alone(matrix, c):
    moved = [[x + c for x in row] for row in matrix]
    assert close(average_accuracy(moved), average_accuracy(matrix) + c)
    assert close(forgetting(moved), forgetting(matrix)) and close(backward_transfer(moved), backward_transfer(matrix))
    base = [0.1] * len(matrix)
    assert close(forward_transfer(moved, base), forward_transfer(matrix, base) + c)


@given(matrices)
def test_what_is_above_the_diagonal_counts_for_forward_transfer_alone(matrix):
    blank = [[x if j <= t else None for j, x in enumerate(row)] for t, row in enumerate(matrix)]
    base = [0.5] * len(matrix)
    whole, seen = Metrics.of(matrix, base), Metrics.of(blank, base)
    assert math.isnan(seen.forward_transfer) and seen.to_dict()["forward_transfer"] is None
    for name in ("final_accuracy", "incremental_accuracy", "forgetting", "backward_transfer"):
        assert getattr(whole, name) == getattr(seen, name)


def test_by_hand():
    matrix = [[0.9, 0.3, 0.2], [0.7, 0.8, 0.4], [0.8, 0.5, 0.6]]
    assert close(average_accuracy(matrix), 1.9 / 3) and close(average_accuracy(matrix, 1), 0.75)
    assert close(incremental_accuracy(matrix), (0.9 + 0.75 + 1.9 / 3) / 3)
    assert close(forgetting(matrix), ((0.9 - 0.8) + (0.8 - 0.5)) / 2)
    assert close(backward_transfer(matrix), ((0.8 - 0.9) + (0.5 - 0.8)) / 2)
    assert close(forward_transfer(matrix, [0.5, 0.25, 0.5]), ((0.3 - 0.25) + (0.4 - 0.5)) / 2)


def test_rows_that_were_not_evaluated_leave_what_needs_them_open():
    metrics = Metrics.of([[None, None], [0.5, 0.75]], [0.1, 0.1])
    assert metrics.final_accuracy == 0.625
    assert all(math.isnan(x) for x in (metrics.forgetting, metrics.backward_transfer, metrics.incremental_accuracy))


def test_one_experience():
    metrics = Metrics.of([[0.5]], [0.1])
    assert metrics.final_accuracy == 0.5 and math.isnan(metrics.forgetting) and math.isnan(metrics.forward_transfer)


@pytest.mark.parametrize("matrix", [[], [[0.5, 0.5]], [[0.5, None], [None, 0.5]]])
def test_refused(matrix):
    with pytest.raises(LoralloyError, match="accuracy matrix"):
        average_accuracy(matrix)
    with pytest.raises(LoralloyError, match="one a domain"):
        forward_transfer([[0.5]], [0.1, 0.2])
