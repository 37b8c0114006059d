from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloy.errors import LoralloyError
from loralloy.stats import accuracy, holm, majority, paired_bootstrap, paired_p, stratified_bootstrap, wilson


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


# -- several tasks, several tests ---------------------------------------------------------------------------------------


def test_stratified_bootstrap_counts_tasks_alike():
    small, large = ([1, 1, 0, 1], [0, 1, 0, 0]), ([0] * 100, [1] * 10 + [0] * 90)
    d = stratified_bootstrap({"small": small, "large": large})
    assert d.value == pytest.approx((0.5 - 0.1) / 2) and d.n == 104 and d.low < d.value < d.high
    assert stratified_bootstrap({"small": small, "large": large}) == d  # seeded
    one = stratified_bootstrap({"small": small}, seed=3)
    assert (one.value, one.low, one.high) == pytest.approx(
        (lambda x: (x.value, x.low, x.high))(paired_bootstrap(*small, seed=3))
    )
    for wrong in ({}, {"a": ([], [])}, {"a": ([1], [1, 0])}):
        with pytest.raises(LoralloyError):
            stratified_bootstrap(wrong)


def test_stratified_bootstrap_has_the_spread_of_its_tasks():
    """The standard error of a mean over T tasks of n rows: sqrt(sum_t var_t / n) / T."""
    import numpy as np

    rng = np.random.default_rng(0)
    strata = {str(t): (rng.normal(size=200) * (t + 1), np.zeros(200)) for t in range(3)}
    d = stratified_bootstrap(strata)
    error = np.sqrt(sum(a.var() / 200 for a, _ in strata.values())) / 3
    assert (d.high - d.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.05)


def test_paired_p():
    from math import comb

    assert paired_p([1, 0, 1], [1, 0, 1]) == 1.0
    # eight wins, no loss: 2 of 2^8 sign patterns are as far out; the exact sign test
    assert paired_p([1] * 8 + [0] * 5, [0] * 13) == pytest.approx(2 / 2**8, abs=3e-3)
    seven_of_ten = 2 * sum(comb(10, k) for k in range(7, 11)) / 2**10
    assert paired_p([1] * 7 + [0] * 3, [0] * 7 + [1] * 3) == pytest.approx(seven_of_ten, abs=0.02)
    assert paired_p([1] * 60, [0] * 60) == pytest.approx(1 / 10_001)  # never 0
    assert paired_p([0.5, 1], [0, 0.25], seed=1) == paired_p([0.5, 1], [0, 0.25], seed=1)
    for wrong in (([], []), ([1], [])):
        with pytest.raises(LoralloyError, match="two non-empty lists"):
            paired_p(*wrong)


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0} and holm({}) == {}
    with pytest.raises(LoralloyError, match=r"p of 'x' is 1\.5"):
        holm({"x": 1.5})
