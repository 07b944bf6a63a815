"""w[i] = codebook[codes[i]] * absmax[i // block_size]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_q8.backends.triton.configs import ELEMENTWISE
from gptj_q8.backends.triton.format import blocks_per_tile, levels, on


@triton.jit
def dequantize_kernel(
    codes,
    absmax,
    codebook,
    weight,
    numel,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """weight[i] = codebook[codes[i]] * absmax[i // BLOCK_SIZE], rounded once to weight's dtype.

    codes, weight: [numel]; absmax: float32 [ceil(numel / BLOCK_SIZE)]; codebook: float32 [256].
    A program owns BLOCKS whole blocks. The host has checked lengths and dtypes.
    Memory-bound: one pass, 16-byte loads, each scale read once.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside = i < numel
    scale = tl.load(absmax + block, mask=block * BLOCK_SIZE < numel, other=0)
    table = tl.load(codebook + tl.arange(0, 256))
    w = levels(table, tl.load(codes + i, mask=inside, other=0)) * scale[:, None]
    tl.store(weight + i, w.to(weight.dtype.element_ty), mask=inside)


def dequantize(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    blocks = blocks_per_tile(block_size, ELEMENTWISE.tile)
    grid = (triton.cdiv(codes.numel(), blocks * block_size),)
    with on(codes):
        dequantize_kernel[grid](
            codes, absmax, codebook, weight, codes.numel(), block_size, blocks,
            num_warps=ELEMENTWISE.num_warps,
        )  # fmt: skip
    return weight
