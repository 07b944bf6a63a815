"""codes[i] = index of the level nearest to w[i] / absmax[i // block_size]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_q8.backends.triton.configs import ELEMENTWISE
from gptj_q8.backends.triton.format import EXACT, blocks_per_tile, midpoints, nearest, normalize, on


@triton.jit
def quantize_kernel(
    weight,
    codebook,
    codes,
    absmax,
    numel,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """absmax[b] = max |w| over block b; codes[i] = level nearest to w[i] / absmax[b].

    weight, codes: [numel]; codebook: float32 [256], ascending; absmax: float32
    [ceil(numel / BLOCK_SIZE)]. A program owns BLOCKS whole blocks.
    The host has checked lengths, dtypes, and that all values are finite.
    One pass: a block is in registers when its scale is known. The search is eight dependent
    reads of a 1 KB table in shared memory, whatever the codebook.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside = i < numel
    w = tl.load(weight + i, mask=inside, other=0).to(tl.float32)
    scale = tl.max(tl.abs(w), axis=1)
    code = nearest(midpoints(codebook), normalize(w, scale[:, None]))
    tl.store(codes + i, code.to(tl.uint8), mask=inside)
    tl.store(absmax + block, scale, mask=block * BLOCK_SIZE < numel)


def quantize(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    numel, device = weight.numel(), weight.device
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=device)
    absmax = torch.empty(triton.cdiv(numel, block_size), dtype=torch.float32, device=device)
    blocks = blocks_per_tile(block_size, ELEMENTWISE.tile)
    grid = (triton.cdiv(numel, blocks * block_size),)
    with on(weight):
        quantize_kernel[grid](
            weight, codebook, codes, absmax, numel, block_size, blocks,
            num_warps=ELEMENTWISE.num_warps, **EXACT,
        )  # fmt: skip
    return codes, absmax
