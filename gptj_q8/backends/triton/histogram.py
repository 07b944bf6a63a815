"""Integer histogram of w / absmax over [-1, 1], each element counted by its squared scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_q8.backends.triton.configs import ELEMENTWISE
from gptj_q8.backends.triton.format import EXACT, blocks_per_tile, normalize, on


@triton.jit
def absmax_kernel(weight, absmax, numel, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """absmax[b] = max |w| over block b.

    weight: [numel]; absmax: float32 [ceil(numel / BLOCK_SIZE)]. A program owns BLOCKS blocks.
    The host has checked that all values are finite. Memory-bound: one pass.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    w = tl.load(weight + i, mask=i < numel, other=0).to(tl.float32)
    tl.store(absmax + block, tl.max(tl.abs(w), axis=1), mask=block * BLOCK_SIZE < numel)


@triton.jit
def histogram_kernel(
    weight,
    absmax,
    largest,
    counts,
    numel,
    bins,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """counts[bin of w / absmax[b]] += rint(2^30 * (absmax[b] / largest)^2) for each w of block b.

    weight: [numel]; absmax: float32 [ceil(numel / BLOCK_SIZE)]; largest: float32 [1], the greatest
    absmax; counts: int64 [bins], zeros. A program owns BLOCKS whole blocks.
    The host has checked that all values are finite and bins is a power of two up to 2^20.
    Integer atomics, so that no order of additions changes a count. They spread over many bins,
    and a tensor is fitted once, so no private copies.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    scale = tl.load(absmax + block, mask=block * BLOCK_SIZE < numel, other=0)
    relative = normalize(scale, tl.load(largest))
    # A whole number of 2^-30 up to 1; added and taken away, 2^23 leaves the nearest (even) one.
    # At or above 2^23 a float32 is whole already.
    exact = relative * relative * 1073741824.0
    rounded = tl.where(exact < 8388608.0, (exact + 8388608.0) - 8388608.0, exact)
    added = rounded.to(tl.int64)
    w = tl.load(weight + i, mask=i < numel, other=0).to(tl.float32)
    position = (normalize(w, scale[:, None]) + 1.0) * (bins // 2).to(tl.float32)
    index = tl.minimum(position.to(tl.int32), bins - 1)
    added = tl.where(i < numel, added[:, None], 0)
    tl.atomic_add(counts + index, added, mask=added > 0, sem="relaxed")


def histogram(weight: Tensor, block_size: int, bins: int) -> Tensor:
    numel, device = weight.numel(), weight.device
    counts = torch.zeros(bins, dtype=torch.int64, device=device)
    absmax = torch.empty(triton.cdiv(numel, block_size), dtype=torch.float32, device=device)
    blocks = blocks_per_tile(block_size, ELEMENTWISE.tile)
    grid = (triton.cdiv(numel, blocks * block_size),)
    options = {"num_warps": ELEMENTWISE.num_warps, **EXACT}
    with on(weight):
        absmax_kernel[grid](weight, absmax, numel, block_size, blocks, **options)
        histogram_kernel[grid](
            weight, absmax, absmax.max(), counts, numel, bins, block_size, blocks, **options
        )
    return counts
