"""The GPU's kernels against the rules as every other device runs them, in Triton's interpreter (no GPU needed, but Triton)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

COMPARE = """
import torch
from loralloy.merging import get_rule, kernels, spaces
from loralloy.merging.stack import Stack

g = torch.Generator().manual_seed(0)
rules = [
    get_rule("linear"), get_rule("ties")(density=0.37),
    get_rule("ties")(density=0.37, majority="frequency", normaliser="weights"), get_rule("ties")(vote="weighted"),
    get_rule("ties")(density=0.0), get_rule("ties")(density=1.0), get_rule("magnitude_prune")(density=0.5),
    get_rule("dare_linear")(density=0.3, seed=5), get_rule("dare_ties")(density=0.61),
]
for dtype in (torch.bfloat16, torch.float16):
    def draw(*shape):  # coarse, so that many magnitudes are equal
        return [(torch.randn(*shape, generator=g) * 4).round().div(4).to(dtype) for _ in range(3)]
    a, b = draw(2, 3, 70), draw(2, 50, 3)
    weights = torch.randn(3, 2, dtype=torch.float64, generator=g)
    scaling = torch.rand(3, 2, dtype=torch.float64, generator=g)
    keys = torch.randint(-(2**62), 2**62, (3, 2), generator=g)
    for rule in rules:
        found = []
        for fused in (True, False):
            kernels.fits = lambda values, dtype: fused
            wide = (lambda x: x) if fused else (lambda x: x.float())
            stack = Stack(tuple(map(wide, a)), tuple(map(wide, b)), scaling, weights, keys)
            found.append(spaces.apply(rule, stack, "factors"))
        for x, y in ((found[0].A, found[1].A), (found[0].B, found[1].B)):
            assert torch.allclose(x, y, rtol=1e-6, atol=1e-6), (str(rule), dtype, float((x - y).abs().max()))
            assert bool(((x == 0) == (y == 0)).all()), str(rule)
print("same")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with torch's CUDA builds only")
def test_kernels_are_the_rules():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same"
