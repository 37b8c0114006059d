"""Casts on the way to disk: what overflows is named, and the way out is one."""

from __future__ import annotations

import pytest
import torch

from helpers import adapter, factors
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.saving import cast


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_only_what_fits_fp32_is_told_to_be_stored_as_such(dtype):
    assert cast(torch.tensor([1.5], dtype=torch.float64), dtype, "x").dtype == dtype
    with pytest.raises(LoralloyError, match=r"^x overflows .*for fp32 too$"):
        cast(torch.tensor([1.0, 1e300], dtype=torch.float64), dtype, "x")
    if dtype == torch.float16:
        with pytest.raises(LoralloyError, match=r"^x overflows fp16; store it as bf16 or fp32 \(--dtype\)$"):
            cast(torch.tensor([1.0, 1e6]), dtype, "x")


def test_saving_names_the_tensor(tmp_path):
    f = factors(dtype=torch.float64)
    for scale, says in ((1e6, "store it as bf16 or fp32"), (1e60, "for fp32 too")):
        with pytest.raises(LoralloyError, match=rf"tensor '.*m.lora_A.weight' overflows fp16; .*{says}"):
            adapter({"m": LoraFactors(f.A * scale, f.B)}).save(tmp_path / "a", dtype=torch.float16)
        assert list(tmp_path.iterdir()) == []
