"""Work in threads: in order, bounded, one thread an operation, and as if it were done where it is asked for."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from helpers import factors
from loralloy.errors import LoralloyError
from loralloy.merging import merge_factors
from loralloy.side_by_side import in_order, one_thread_each


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order(three_threads):
    def work(n):
        time.sleep(0.002 * (n % 3))
        return n, torch.get_num_threads(), threading.get_ident()

    found = list(in_order(work, range(30)))
    assert [n for n, _, _ in found] == list(range(30))
    assert {threads for _, threads, _ in found} == {1}
    assert 1 < len({who for _, _, who in found}) <= 3
    assert torch.get_num_threads() == 3


def test_no_more_is_begun_than_is_wanted(three_threads):
    begun = []
    results = in_order(begun.append, range(100), ahead=1)
    next(results)
    time.sleep(0.05)
    assert len(begun) <= 4
    results.close()
    assert len(begun) <= 5 and torch.get_num_threads() == 3


def test_an_error_ends_it(three_threads):
    def work(n):
        if n == 4:
            raise LoralloyError("the fifth is bad")
        return n

    found = []
    with pytest.raises(LoralloyError, match="the fifth is bad"):
        for n in in_order(work, range(1000)):
            found.append(n)
    assert found == [0, 1, 2, 3] and torch.get_num_threads() == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_gradients_are_as_outside(mode, three_threads):
    with mode():
        outside = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        inside = set(in_order(lambda _: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()), range(6)))
    assert inside == {outside}


def test_threads_are_given_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), one_thread_each():
        raise RuntimeError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("rule", ["linear", "ties", "dare_ties", "magnitude_prune"])
def test_a_merge_has_the_same_bytes_with_any_number_of_threads(rule):
    """Modules of several shapes."""
    shapes = {f"m{i}": (8 + 4 * (i % 3), 6 + i % 2) for i in range(24)}
    adapters = [{m: factors(o, i, 3, 100 * a + k) for k, (m, (o, i)) in enumerate(shapes.items())} for a in range(3)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(merge_factors(adapters, [0.5, 0.8, -0.3], rule, "factors"))
    finally:
        torch.set_num_threads(before)
    one, many = found
    assert list(one) == list(many) and set(one) == set(shapes)
    assert all(torch.equal(one[m].A, many[m].A) and torch.equal(one[m].B, many[m].B) for m in shapes)
