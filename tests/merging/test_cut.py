"""Cuts to a rank, against dense float64 SVDs: low-rank results, dense results, and the eigenvectors they stand on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import generator
from loralloy.merging import RULES, Rule, spaces
from loralloy.merging.cut import _block_powers, cut, cut_dense, dense_spectrum, spectrum, top_eigen, whole
from loralloy.merging.stack import LowRank, Stack

OPTIMAL = 1e-6  # of the norm: what float32 factors can hold
ROUNDING = 2e-6  # of the norm: rounding of the float32 factors themselves
ROUNDING_WIDE = 5e-8  # the same in float64: squared singular values keep 16 digits, so singular values keep 8
SPECTRA = {
    "flat": lambda i: torch.ones_like(i),
    "slow": lambda i: 0.95**i,
    "decaying": lambda i: 0.5**i,
    "steep": lambda i: 0.01**i,
    "repeated": lambda i: 1 / (1 + i.div(3, rounding_mode="floor")),
    "clustered": lambda i: 1 + (i < 3) * 10 + 1e-4 * torch.cos(i),
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def with_spectrum(out: int, inside: int, rank: int, modules: int, values: str, seed: int = 0) -> LowRank:
    """Float32 factors whose product has these singular values, up to rounding; neither factor is orthogonal."""
    small = min(rank, out, inside)
    s = SPECTRA[values](torch.arange(small, dtype=torch.float64))
    u = torch.linalg.qr(random(modules, out, small, seed=seed, dtype=torch.float64)).Q
    v = torch.linalg.qr(random(modules, inside, small, seed=seed + 1, dtype=torch.float64)).Q
    turn = torch.linalg.qr(random(modules, small, small, seed=seed + 2, dtype=torch.float64)).Q
    turn = turn * torch.linspace(1, 3, small, dtype=torch.float64)
    a, b = torch.linalg.solve(turn, s.sqrt()[:, None] * v.mT), (u * s.sqrt()) @ turn
    if rank > small:  # more columns than dimensions: each is a mixture of the others
        mix = torch.linalg.qr(random(modules, rank, small, seed=seed + 3, dtype=torch.float64)).Q
        a, b = mix @ a, b @ mix.mT
    return LowRank(a.float(), b.float())


def check(f: LowRank, rank: int, dtype: torch.dtype = torch.float32, digits: float = 1e-12) -> int:
    """A cut is the optimum, and says what it lost. Returns how many modules fell back.

    `digits`: relative accuracy of squared norms, which is lost where the parts cancel.
    """
    done = cut(f, rank)
    dense, got = (x.B.double() @ x.A.double() for x in (f, done.result))
    s = torch.linalg.svdvals(dense)
    size, optimum = s.norm(dim=1), s[:, rank:].norm(dim=1)
    assert done.result.rank == min(rank, f.rank, *dense.shape[1:]) and done.result.A.dtype == f.A.dtype
    error = torch.linalg.matrix_norm(got - dense)
    within = OPTIMAL * optimum + (ROUNDING if dtype == torch.float32 else ROUNDING_WIDE) * size
    assert bool((error <= optimum + within).all()), (error, optimum)
    assert bool((error >= optimum - within).all())  # Eckart-Young: nothing can be better
    rows, columns = done.result.A.double().norm(dim=2), done.result.B.double().norm(dim=1)
    large = columns > 1e-3 * columns.max()
    assert torch.allclose(
        rows[large], columns[large], rtol=1e-2
    )  # sqrt(s) on each side: 16 bits hold the most that way
    assert done.total.dtype == done.lost.dtype == torch.float64
    assert torch.allclose(done.total, size**2, rtol=digits, atol=0)
    assert bool(((done.lost.sqrt() - optimum).abs() <= OPTIMAL * size).all()), (done.lost.sqrt(), optimum)
    values = spectrum(f)
    assert values.shape == (f.A.shape[0], min(f.rank, *dense.shape[1:])) and bool((values.diff(dim=1) <= 0).all())
    assert bool(((values - s[:, : values.shape[1]] ** 2).abs() <= digits * size[:, None] ** 2).all())
    return done.fallbacks


# -- low-rank results --------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 3), st.sampled_from(sorted(SPECTRA)),
    st.integers(1, 50), st.integers(0, 99),
)  # fmt: skip
def test_a_cut_is_the_optimum(out, inside, rank, modules, values, k, seed):
    fallbacks = check(with_spectrum(out, inside, rank, modules, values, seed), k)
    if rank > out:
        assert fallbacks == modules  # dependent columns: no Cholesky bears that


@settings(max_examples=30)
@given(
    st.integers(2, 4), st.sampled_from([0.0, 1e-8, 1e-7, 1e-6, 1e-5, 3e-5, 1e-4, 1e-3]), st.integers(1, 30),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_near_duplicate_adapters(copies, apart, k, dtype):
    """Columns equal, or equal up to 1e-7: Gram matrices have no digits for that, the fall-back has."""
    a, b = random(2, 6, 30, seed=1), random(2, 40, 6, seed=2)
    a = torch.cat([a.double() + apart * random(2, 6, 30, seed=10 + i).double() for i in range(copies)], 1)
    b = torch.cat([b.double() + apart * random(2, 40, 6, seed=20 + i).double() for i in range(copies)], 2)
    fallbacks = check(LowRank(a.to(dtype), b.to(dtype)), k, dtype)
    if apart <= 1e-6:
        assert fallbacks == 2
    if apart >= 1e-3:
        assert fallbacks == 0


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-5, 1e-6, 1e-7])
def test_near_duplicates_that_cancel(apart):
    """What is left is 1e-7 of the parts: the cut is the optimum for that, not for the parts."""
    a, b = random(2, 6, 30, seed=1), random(2, 40, 6, seed=2)
    other_a, other_b = a + apart * random(2, 6, 30, seed=3), b + apart * random(2, 40, 6, seed=4)
    f = LowRank(torch.cat([a, -other_a], 1), torch.cat([b, other_b], 2))
    for k in (3, 12):
        check(f, k, digits=1e-6)


def test_healthy_modules_do_not_fall_back_and_sick_ones_alone_do():
    a, b = random(5, 8, 30, seed=3), random(5, 20, 8, seed=4)
    assert check(LowRank(a, b), 3) == check(LowRank(a.double(), b.double()), 3, torch.float64) == 0
    b[1, :, 5] = b[1, :, 2]
    b[3, :, :4] = b[3, :, 4:]
    assert check(LowRank(a, b), 3) == 2
    alone = cut(LowRank(a[:1], b[:1]), 3)
    assert torch.allclose(cut(LowRank(a, b), 3).result.dense()[0], alone.result.dense()[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dead", [[0], [1, 2], [0, 1, 2]], ids=str)
def test_adapters_at_their_initialisation(dead):
    """PEFT starts with B = 0: such columns add nothing and are no reason to fall back."""
    a, b = random(2, 12, 30, seed=5), random(2, 20, 12, seed=6)
    for i in dead:
        b[:, :, 4 * i : 4 * i + 4] = 0
    for k in (1, 3, 5, 12):
        assert check(LowRank(a, b), k) == 0
    done = cut(LowRank(a, b), 5)
    assert bool(torch.isfinite(done.result.A).all()) and bool(torch.isfinite(done.result.B).all())
    if len(dead) == 3:
        assert float(done.result.dense().norm()) == float(done.total.sum()) == float(done.lost.sum()) == 0.0
    b[0] = 0  # one module of the two
    assert check(LowRank(a, b), 3) == 0


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e8])
@pytest.mark.parametrize("side", ["A", "B", "both"])
def test_adapters_of_hugely_different_scale(scale, side):
    a, b = random(2, 12, 30, seed=7), random(2, 20, 12, seed=8)
    if side != "B":
        a[:, 6:] *= scale
    if side != "A":
        b[:, :, 6:] *= scale
    for k in (2, 6, 9, 12):
        assert check(LowRank(a, b), k) == 0
        assert check(LowRank(a.double(), b.double()), k, torch.float64) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_factors_far_from_one(scale):
    assert check(LowRank(random(2, 8, 30, seed=9) * scale, random(2, 20, 8, seed=10) / 7), 3) == 0


def test_equal_input_gives_equal_bytes():
    f = with_spectrum(30, 20, 12, 3, "repeated")
    one, two = cut(f, 5).result, cut(f, 5).result
    assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)


# -- eigenvectors ------------------------------------------------------------------------------------------------------


def symmetric(values: Tensor, modules: int = 3, seed: int = 0) -> Tensor:
    q = torch.linalg.qr(random(modules, len(values), len(values), seed=seed, dtype=torch.float64)).Q
    matrix = (q * values) @ q.mT
    return (matrix + matrix.mT) / 2


N = 48
INDEX = torch.arange(N, dtype=torch.float64)
EIGENVALUES = {
    "flat": torch.ones(N, dtype=torch.float64),
    "nearly flat": 1 + 1e-3 * torch.cos(7 * INDEX),
    "decaying": 0.5**INDEX,
    "slow": 0.95**INDEX,
    "polynomial": (1 + INDEX) ** -2,
    "steep": 0.01**INDEX,
    "clustered": 1.0 + 1e-4 * (INDEX < 24) + 99.0 * (INDEX < 8),
    "rank-deficient": (0.5 + torch.cos(INDEX).abs()) * (INDEX < 10),
    "repeated": 3 - INDEX.div(16, rounding_mode="floor"),
    "one giant": 1.0 + 1e8 * (INDEX == 0),
    "adapters 1e8 apart": torch.where(INDEX < 24, 1e16, 1e-16) * 0.9**INDEX,
    "zero": torch.zeros(N, dtype=torch.float64),
}


@pytest.mark.parametrize("k", [1, 5, 16, 32, N - 1])
@pytest.mark.parametrize("values", EIGENVALUES.values(), ids=EIGENVALUES)
def test_block_powers_hold_the_energy(values, k):
    """The path that a GPU takes, here on the CPU."""
    matrix = symmetric(values)
    want = torch.linalg.eigvalsh(matrix).flip(-1)[:, :k].clamp(min=0).sum(-1)
    said, vectors = _block_powers(matrix, k)
    held = ((matrix @ vectors) * vectors).sum((1, 2))
    total = values.sum()
    assert said.shape == (3, k) and vectors.shape == (3, N, k)
    assert float((vectors.mT @ vectors - torch.eye(k)).abs().max()) < 1e-8
    assert bool((want - held <= 1e-6 * total).all()), (want - held) / total
    assert bool((held - want <= 1e-12 * total).all()) and torch.allclose(said.sum(-1), held, rtol=1e-9)
    again, same = _block_powers(matrix, k)
    assert torch.equal(again, said) and torch.equal(same, vectors)


@pytest.mark.parametrize("values", ["rank-deficient", "zero"])
def test_block_powers_that_are_not_sound_fall_back_to_eigh(values, monkeypatch):
    """A subspace larger than what the matrix spans cannot be made orthonormal by Cholesky; its healthy neighbours go on."""
    real, asked = torch.linalg.eigh, []

    def counting(matrix):
        asked.append(matrix.shape)
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counting)
    matrix = torch.cat([symmetric(EIGENVALUES["polynomial"], 2), symmetric(EIGENVALUES[values], 1)])
    said, vectors = _block_powers(matrix, 20)
    assert len(asked) == 1
    want = torch.linalg.eigvalsh(matrix).flip(-1)[:, :20]
    assert torch.allclose(said[2], want[2], rtol=1e-9, atol=1e-12)
    assert float((vectors.mT @ vectors - torch.eye(20)).abs().max()) < 1e-8


@pytest.mark.parametrize("values", EIGENVALUES.values(), ids=EIGENVALUES)
def test_top_eigen(values):
    matrix = symmetric(values)
    said, vectors = top_eigen(matrix, 7)
    want = torch.linalg.eigvalsh(matrix).flip(-1)[:, :7].clamp(min=0)
    assert torch.allclose(said, want, rtol=1e-9, atol=1e-12 * float(values.max()))
    assert bool((said >= 0).all()) and bool((said.diff(dim=1) <= 0).all())
    gap = torch.linalg.matrix_norm(matrix @ vectors - vectors * said[:, None])
    assert float(gap.max()) <= 1e-10 * float(values.norm())
    peak = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    assert bool((peak > 0).all())
    again, same = top_eigen(matrix.clone(), 7)
    assert torch.equal(again, said) and torch.equal(same, vectors)


# -- dense results -----------------------------------------------------------------------------------------------------


def stack(out: int, inside: int, rank: int, adapters: int, decay: float, modules: int = 2) -> Stack:
    size = torch.arange(1, rank + 1) ** -decay
    a = [random(modules, rank, inside, seed=i) * size[:, None] for i in range(adapters)]
    b = [random(modules, out, rank, seed=100 + i) for i in range(adapters)]
    ones = torch.ones(adapters, modules, dtype=torch.float64)
    keys = torch.arange(adapters * modules).reshape(adapters, modules) * 0x9E3779B97F4A7C1
    return Stack(tuple(a), tuple(b), ones, ones / adapters, keys)


RESULTS: dict[str, Rule] = {
    "ties": RULES["ties"],
    "ties by frequency": RULES["ties"](density=0.5, majority="frequency"),
    "dare_linear": RULES["dare_linear"],
    "dare_ties": RULES["dare_ties"],
    "magnitude_prune": RULES["magnitude_prune"](density=0.3),
}


@pytest.mark.parametrize("shape", [(96, 64, 8, 3), (70, 160, 4, 6), (150, 150, 16, 2)], ids=str)
@pytest.mark.parametrize("rule", RESULTS.values(), ids=RESULTS)
def test_cuts_of_dense_results_are_close_to_the_optimum(rule, shape):
    for decay in (0.0, 1.0):
        d = spaces.apply(rule, stack(*shape, decay), "delta")
        assert isinstance(d, Tensor)
        s = torch.linalg.svdvals(d.double())
        size = s.norm(dim=1)
        values = dense_spectrum(d)
        assert bool(((values - s**2).abs() <= 1e-10 * size[:, None] ** 2).all())
        for k in (1, shape[2], 2 * shape[2]):
            done = cut_dense(d, k)
            error = torch.linalg.matrix_norm(done.result.B.double() @ done.result.A.double() - d.double())
            optimum, kept = s[:, k:].norm(dim=1), s[:, :k].norm(dim=1) ** 2
            assert bool((size**2 - error**2 >= 0.99 * kept).all())  # the captured energy
            assert bool((error <= 1.001 * optimum).all()) and bool((error >= optimum * (1 - 1e-6)).all())
            assert torch.allclose(done.total.sqrt(), size, rtol=1e-9)
            assert torch.allclose(done.lost.sqrt(), error, rtol=1e-5)  # what it says it lost, it lost
            assert done.result.rank == k


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20), (1, 40), (40, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_cuts_where_a_side_is_small_are_exact(shape, dtype):
    d = random(2, *shape, dtype=dtype)
    small = min(shape)
    for k in {1, small - 1, small, small + 5} - {0}:
        done = cut_dense(d, k)
        s = torch.linalg.svdvals(d.double())
        got = done.result.B.double() @ done.result.A.double()
        optimum = s[:, k:].norm(dim=1)
        error = torch.linalg.matrix_norm(got - d.double())
        rounding = 1e-6 if dtype == torch.float32 else 1e-12
        assert bool(((error - optimum).abs() <= rounding * s.norm(dim=1)).all())
        if k >= small:
            assert torch.equal(done.result.dense(), d) and float(done.lost.abs().max()) == 0.0
        assert done.result.rank == min(k, small)


def test_dense_cuts_of_what_has_little_rank():
    zeros = cut_dense(torch.zeros(2, 50, 40), 4)
    assert float(zeros.result.dense().abs().max()) == float(zeros.total.max()) == float(zeros.lost.max()) == 0.0
    d = random(2, 70, 6, seed=1) @ random(2, 6, 60, seed=2)  # rank 6
    for k in (6, 9, 20):
        done = cut_dense(d, k)
        error = torch.linalg.matrix_norm(done.result.dense() - d) / torch.linalg.matrix_norm(d)
        assert float(error.max()) < ROUNDING
        assert float((done.lost / done.total).sqrt().max()) < 1e-5  # nothing was lost, and nothing is said to be
        assert bool(torch.isfinite(done.result.A).all()) and bool(torch.isfinite(done.result.B).all())
    again = cut_dense(d, 6).result
    assert torch.equal(again.A, cut_dense(d, 6).result.A) and torch.equal(again.B, cut_dense(d, 6).result.B)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6)], ids=str)
def test_whole_is_the_matrix_itself(shape):
    d = random(2, *shape)
    f = whole(d)
    assert f.rank == min(shape) and torch.equal(f.dense(), d)
