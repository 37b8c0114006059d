"""Orthogonal columns by Cholesky: what they are where they are sound, and that they say where they are not."""

from __future__ import annotations

import pytest
import torch

from helpers import generator, relative
from loralloy.merging.cholesky import DEPENDENT, gram_root, orthonormal


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_root_of_the_gram_matrix(scale):
    b = random(3, 12, 4) * torch.tensor([scale, 1.0, 1.0, 1 / scale], dtype=torch.float64)
    r, inverse, good = gram_root(b)
    assert bool(good.all()) and torch.equal(r, r.triu())
    assert relative(r.mT @ r, b.mT @ b) < 1e-14
    q = b @ inverse
    assert relative(q.mT @ q, torch.eye(4).expand(3, 4, 4)) < 1e-12
    assert relative(q @ r, b) < 1e-12


def test_a_column_of_zeros_keeps_one():
    b = random(2, 12, 4)
    b[0, :, 2] = 0
    r, inverse, good = gram_root(b)
    assert bool(good.all()) and float(r[0, :, 2].norm()) == 0
    assert relative((b @ inverse @ r)[0], b[0]) < 1e-12


@pytest.mark.parametrize(("apart", "sound"), [(10 * DEPENDENT, True), (DEPENDENT / 10, False), (0.0, False)])
def test_columns_that_are_nearly_dependent_are_said(apart, sound):
    q = torch.linalg.qr(random(2, 12, 3)).Q
    b = q.clone()
    b[1, :, 2] = b[1, :, 0] + apart * q[1, :, 1]
    assert gram_root(b[:, :, [0, 2]])[2].tolist() == [True, sound]
    basis, pivot = orthonormal(b[:, :, [0, 2]])
    assert (pivot > DEPENDENT).tolist() == [True, sound]
    want = torch.eye(2, dtype=torch.float64)
    assert relative(basis[0].T @ basis[0], want) < 1e-12
    assert (relative(basis[1].T @ basis[1], want) < 1e-3) == sound
