"""Exact selection against numpy's stable argsort, and random masks against what independent draws would give."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loralloy.merging import select
from loralloy.merging.entries import random_mask
from loralloy.merging.select import Blocks, GlobalLimits, Limits, largest

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def top(x: Tensor, k: int) -> Tensor:
    """The k largest magnitudes of a vector, the lowest index first among equals; the rest 0."""
    order = np.argsort(-np.abs(x.double().numpy()), kind="stable")[:k]
    result = torch.zeros_like(x)
    result[order] = x[order]
    return result


def tops(x: Tensor, k: int) -> Tensor:
    return torch.stack([top(row, k) for row in x])


def in_blocks(x: Tensor, width: int) -> Blocks:
    return lambda: iter(x.split(width, 1))


def kept(limits: Limits, blocks: Blocks) -> Tensor:
    return torch.cat([limits.keep(x) for x in blocks()], 1)


def values(kind: str, rows: int, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Rows of distinct numbers, of few numbers with many equals, of one number, of zeros, and of a long tail."""
    g = torch.Generator().manual_seed(seed)
    if kind == "few":
        x = torch.randint(-3, 4, (rows, n), generator=g).double()
    elif kind == "tail":
        x = torch.randn(rows, n, generator=g).double() ** 5
    else:
        x = torch.randn(rows, n, generator=g).double() * {"distinct": 1, "constant": 0, "zeros": 0}[kind]
        x = x + (kind == "constant") * 2.5 * torch.randn(rows, n, generator=g).sign()
    return x.to(dtype)


KINDS = ["distinct", "few", "constant", "zeros", "tail"]
rows, sizes, seeds = st.integers(1, 4), st.integers(1, 90), st.integers(0, 2**20)


@given(st.sampled_from(KINDS), rows, sizes, seeds, st.sampled_from(DTYPES), st.data())
def test_in_memory(kind, rows, n, seed, dtype, data):
    x = values(kind, rows, n, seed, dtype)
    k = data.draw(st.sampled_from([0, 1, n // 3, n // 2, n - 1, n]))
    limits = largest(in_blocks(x, n), n, k, True)
    assert torch.equal(limits.keep(x), tops(x, k))
    assert torch.equal(limits.rewind().keep(x), tops(x, k))  # and again from the first block


@given(st.sampled_from(KINDS), rows, sizes, seeds, st.sampled_from(DTYPES), st.integers(1, 90), st.data())
def test_in_blocks(kind, rows, n, seed, dtype, width, data):
    """The same survivors from any blocks, whether a sample brackets the limit or not."""
    x = values(kind, rows, n, seed, dtype)
    k = data.draw(st.sampled_from([0, 1, n // 3, n // 2, n - 1, n]))
    blocks = in_blocks(x, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "_SMALL", 1)
        patch.setattr(select, "_SAMPLE", 8)
        limits = largest(blocks, n, k, width >= n)
    assert torch.equal(kept(limits, blocks), tops(x, k))
    assert torch.equal(kept(limits.rewind(), blocks), tops(x, k))


@pytest.fixture
def attempts(monkeypatch) -> list[bool]:
    """What each attempt to select inside a bracket came to; samples are small."""
    monkeypatch.setattr(select, "_SMALL", 1)
    monkeypatch.setattr(select, "_SAMPLE", 500)
    said: list[bool] = []
    inside = select._inside

    def watched(*args: object) -> Limits | None:
        found = inside(*args)  # type: ignore[arg-type]
        said.append(found is not None)
        return found

    monkeypatch.setattr(select, "_inside", watched)
    return said


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.999])
def test_a_fair_sample_brackets_the_limit_at_once(density, attempts):
    x = values("distinct", 2, 20_000, 1, torch.float32)
    blocks = in_blocks(x, 3_000)
    assert torch.equal(
        kept(largest(blocks, 20_000, int(20_000 * density), False), blocks), tops(x, int(20_000 * density))
    )
    assert attempts == [True]


@pytest.mark.parametrize("loud", [True, False])
def test_a_sample_that_misleads_is_seen_through(loud, attempts):
    """Every 41st entry of a block, which is what is sampled, is far larger (or smaller) than the rest."""
    x = values("distinct", 3, 20_000, 1, torch.float32)
    for start in range(0, 20_000, 4_000):
        x[1, start : start + 4_000 : 41] *= 1e4 if loud else 1e-4  # one row is enough
    blocks = in_blocks(x, 4_000)
    assert torch.equal(kept(largest(blocks, 20_000, 8_000, False), blocks), tops(x, 8_000))
    assert attempts == [False, True]


def test_columns_of_one_size_do_not_mislead(attempts):
    """A width that the step would divide: every row is sampled at other columns, although columns differ much in size."""
    x = values("distinct", 2, 20_000, 1, torch.float32).reshape(2, 100, 200) * torch.logspace(0, 3, 200)
    blocks = in_blocks(x.flatten(1), 4_000)
    assert torch.equal(kept(largest(blocks, 20_000, 8_000, False), blocks), tops(x.flatten(1), 8_000))
    assert attempts == [True]


@given(st.lists(st.tuples(st.sampled_from(KINDS), rows, sizes), min_size=1, max_size=6), seeds, st.floats(0, 1))
def test_over_all_tensors(tensors, seed, density):
    """Global limits of two adapters, tensors of any shape given in the engine's order: as one long vector."""
    of = [[values(*t, seed + 31 * i + 7 * j, torch.float32) for i, t in enumerate(tensors)] for j in range(2)]
    limits = GlobalLimits(2, density, torch.device("cpu"))
    for take in limits.passes():
        for i in range(len(tensors)):
            limits.begin([str(i)])
            for j in range(2):
                take(j, of[j][i])
    for j in range(2):
        whole = torch.cat([x.flatten() for x in of[j]])
        got = torch.cat([limits.keeper(j, [str(i)]).keep(x).flatten() for i, x in enumerate(of[j])])
        assert torch.equal(got, top(whole, int(density * whole.numel())))


@pytest.mark.parametrize("x", [torch.tensor([1e-45, -2e-45, 0.0, 3e-39]), torch.tensor([3e38, -3.4e38, 1.0, 3.3e38])])
@pytest.mark.parametrize("k", range(5))
def test_over_all_tensors_at_the_ends_of_float32(x, k):
    limits = GlobalLimits(1, k / 4, torch.device("cpu"))
    for take in limits.passes():
        take(0, x[None])
    assert torch.equal(limits.keeper(0, ()).keep(x[None])[0], top(x, k))


# -- random masks ------------------------------------------------------------------------------------------------------

N = 1 << 20
LIMIT = 4.5  # standard errors; a fair hash passes a check with probability 1 - 7e-6


def key(*numbers: int) -> Tensor:
    """64-bit keys as a sha256 gives them."""
    rng = np.random.default_rng(numbers)
    return torch.from_numpy(rng.integers(-(2**63), 2**63, size=1))


def z(x: Tensor, y: Tensor) -> float:
    """The correlation of two masks in standard errors."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    return float((x * y).sum() / (x.norm() * y.norm())) * math.sqrt(x.numel())


@pytest.mark.parametrize("density", [0.001, 0.1, 0.37, 0.5, 0.9])
def test_density_is_right(density):
    drawn = random_mask(torch.cat([key(i) for i in range(4)]), 0, N, density, 0)
    off = (drawn.double().mean(1) - density) * math.sqrt(N / density / (1 - density))
    assert float(off.abs().max()) < LIMIT


def test_densities_0_and_1():
    keys = torch.cat([key(1), key(2)])
    assert not bool(random_mask(keys, 0, N, 0.0, 3).any()) and bool(random_mask(keys, 0, N, 1.0, 3).all())
    assert random_mask(keys, 0, 7, 1.0, 3).shape == (2, 7)


def test_masks_of_densities_nest():
    """What survives at a density survives at every higher one: curves over density are smooth."""
    drawn = [random_mask(key(5), 0, 4096, d, 0) for d in (0.1, 0.3, 0.8)]
    assert all(bool((small <= large).all()) for small, large in itertools.pairwise(drawn))


@given(seeds, st.integers(0, 10**6), st.integers(1, 500), st.integers(0, 2**31))
def test_a_block_is_a_slice_of_the_whole(k, start, n, seed):
    keys = torch.cat([key(k), key(k, 1)])
    whole = random_mask(keys, max(0, start - 300), n + 300, 0.4, seed)
    assert torch.equal(random_mask(keys, start, n, 0.4, seed), whole[:, start - max(0, start - 300) :][:, :n])
    assert torch.equal(random_mask(keys[1:], start, n, 0.4, seed)[0], random_mask(keys, start, n, 0.4, seed)[1])


def test_entries_beyond_32_bits_have_masks():
    """Embeddings have more than 2^31 entries; a block that crosses the border is a slice like any other."""
    across = random_mask(key(1), 2**31 - 50, 100, 0.5, 0)[0]
    assert torch.equal(across[:50], random_mask(key(1), 2**31 - 50, 50, 0.5, 0)[0])
    assert torch.equal(across[50:], random_mask(key(1), 2**31, 50, 0.5, 0)[0])
    far = random_mask(key(1), 2**32 + 2**31 - 50, 100, 0.5, 0)[0]
    assert 20 < int(far.sum()) < 80


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_nothing_is_correlated(density):
    """Adapters and modules (keys), A and B, seeds, keys that differ in a bit, and entries at distances that shapes have."""

    def draw(k: Tensor, seed: int = 0) -> Tensor:
        return random_mask(k, 0, N // 4, density, seed)[0]

    one = draw(key(1))
    others = [draw(key(i)) for i in range(2, 8)]
    others += [draw(key(1), seed) for seed in (1, 2, 3, 1 << 16, 2**31 - 1, 2**31)]
    others += [draw(key(1) ^ bit) for bit in (1, 1 << 15, 1 << 31, 1 << 32, 1 << 47, 1 << 62, 0x0B << 56)]
    assert max(abs(z(one, other)) for other in others) < LIMIT
    assert max(abs(z(a, b)) for i, a in enumerate(others) for b in others[:i]) < LIMIT
    lags = [
        *range(1, 18),
        31,
        32,
        33,
        64,
        100,
        128,
        192,
        256,
        576,
        1000,
        1024,
        1536,
        2048,
        4096,
        1 << 15,
        1 << 16,
        1 << 17,
    ]
    apart = [z(one[lag:], one[:-lag]) for lag in lags]
    assert max(map(abs, apart)) < LIMIT and 0.4 < float(np.mean(np.square(apart))) < 2


def test_patterns_are_uniform():
    """Bytes of neighbouring entries, and of one entry over eight seeds or eight keys: chi-square with 255 degrees."""
    powers = 2 ** torch.arange(8)
    neighbours = random_mask(key(1), 0, N, 0.5, 0)[0].reshape(-1, 8)
    by_seed = torch.stack([random_mask(key(1), 0, N // 8, 0.5, s)[0] for s in range(8)], 1)
    by_key = torch.stack([random_mask(key(k), 0, N // 8, 0.5, 0)[0] for k in range(8)], 1)
    for bits in (neighbours, by_seed, by_key):
        counts = torch.bincount((bits * powers).sum(1), minlength=256).double()
        expected = len(bits) / 256
        chi = float(((counts - expected) ** 2).sum() / expected)
        assert abs(chi - 255) < LIMIT * math.sqrt(2 * 255), chi


def test_rows_and_columns_are_as_independent_draws():
    """Row and column counts of 300 masks of a [16, 576] factor have a binomial's variance."""
    drawn = torch.cat([random_mask(key(i), 0, 16 * 576, 0.2, 0) for i in range(300)]).double().reshape(300, 16, 576)
    by_column, by_row = drawn.sum(1).var() / (16 * 0.16), drawn.sum(2).var() / (576 * 0.16)
    assert abs(float(by_column) - 1) < LIMIT * math.sqrt(2 / (300 * 576))
    assert abs(float(by_row) - 1) < LIMIT * math.sqrt(2 / (300 * 16))


def test_zeros_are_counted_and_not_collected(attempts):
    """A bracket of one number: dW of an adapter whose B is zero, beside one that has entries."""
    x = values("distinct", 3, 20_000, 1, torch.float32)
    x[1] = 0.0
    x[2, 4_000:] = 0.0
    blocks = in_blocks(x, 4_000)
    for k in (3_000, 8_000):
        limits = largest(blocks, 20_000, k, False)
        assert torch.equal(kept(limits, blocks), tops(x, k))
    assert int(limits.equal[1]) == 20_000
