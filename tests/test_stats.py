from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloy.errors import LoralloyError
from loralloy.stats import accuracy, majority, paired_bootstrap, wilson


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I (method 3): 81/263, 15/148, 0/20, 1/29
    for k, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_proportion_and_is_symmetric(case: tuple[int, int]) -> None:
    k, n = case
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low))


def test_accuracy_and_majority() -> None:
    found = accuracy([True, False, True, True])
    assert (found.value, found.n) == (0.75, 4) and found.low < 0.75 < found.high
    assert majority(["b", "a", "b", "a", "c"]) == ("a", 0.4)
    for call in (lambda: accuracy([]), lambda: wilson(3, 2), lambda: majority([])):
        with pytest.raises(LoralloyError):
            call()


def test_paired_bootstrap_is_seeded_and_pairs() -> None:
    a = [i % 3 != 0 for i in range(300)]
    same = paired_bootstrap(a, a)
    assert (same.value, same.low, same.high) == (0, 0, 0)  # what both find hard cancels
    b = [x and i % 5 != 0 for i, x in enumerate(a)]
    first = paired_bootstrap(a, b, seed=1)
    assert first == paired_bootstrap(a, b, seed=1)
    scores = [i * 0.37 % 1 for i in range(300)]
    assert paired_bootstrap(scores, a, seed=1) != paired_bootstrap(scores, a, seed=2)
    assert first.value == pytest.approx(sum(a) / 300 - sum(b) / 300)
    # the normal approximation of a mean of 0/1 differences
    half = 1.96 * (first.value * (1 - first.value) / 300) ** 0.5
    assert (first.low, first.high) == pytest.approx((first.value - half, first.value + half), abs=0.01)
    with pytest.raises(LoralloyError, match="3 and 2"):
        paired_bootstrap([1, 0, 1], [1, 0])
