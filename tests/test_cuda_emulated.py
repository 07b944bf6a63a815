"""The CUDA kernels on the CPU, and that the emulation notices what would be wrong on a GPU."""

from __future__ import annotations

import pytest
import torch
from cases import BLOCK_SIZES, DTYPES, random_quantized
from cuda_emulation import emulator

from gptj_q8.backends import cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantize(block_size: int, dtype: torch.dtype) -> None:
    w = random_quantized(65, 100, block_size, "arbitrary")
    with emulator().force():
        for order in range(4):
            emulator().set_order(order)
            out = cuda.dequantize(*w.parts, block_size, dtype)
            assert torch.equal(out, w.truth.float().to(dtype))
