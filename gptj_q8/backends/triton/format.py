"""The arithmetic of the format inside Triton kernels, and what every launcher needs.

w[i] = codebook[codes[i]] * absmax[i // block_size], i the flat row-major index.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""Launch options of kernels whose results are the same bit for bit on every backend: a * b + c
rounds twice, and subnormal numbers are kept."""
if torch.version.hip is None:  # Triton refuses the option for AMD, where they are kept anyway
    EXACT["enable_reflect_ftz"] = False


@triton.jit
def levels(table, codes):
    """table[codes] for codes of any shape. table: [256].

    A gather from a tensor goes through shared memory. A load from a pointer would be pipelined as
    one 4-byte copy for each element.
    """
    flat = tl.reshape(codes, [codes.numel])
    return tl.reshape(tl.gather(table, flat.to(tl.int32), 0), codes.shape)


@triton.jit
def copied(table, COPIES: tl.constexpr):
    """[256 * COPIES]: copy c of level l at l * COPIES + c. table: [256]."""
    return tl.reshape(tl.broadcast_to(table[:, None], [256, COPIES]), [256 * COPIES])


@triton.jit
def decoded_tile(
    table, codes, absmax, row, start, K, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr
):
    """float32 weights of a tile of rows whose first columns are `start`. codes: [rows, columns].

    row: int64 [rows], the flat index at which each row of w begins. GROUP neighbours along a row
    share a scale; it divides the number of columns.
    """
    ROWS: tl.constexpr = codes.shape[0]
    GROUPS: tl.constexpr = codes.shape[1] // GROUP
    column = start + tl.arange(0, GROUPS) * GROUP
    block = (row[:, None] + column[None, :]) // BLOCK_SIZE
    scale = tl.load(absmax + block, mask=(column < K)[None, :], other=0)
    each = tl.broadcast_to(scale[:, :, None], [ROWS, GROUPS, GROUP])
    return levels(table, codes) * tl.reshape(each, codes.shape)


@triton.jit
def normalize(w, absmax):
    """w / absmax rounded as IEEE 754 asks, and 0 in a block of zeros."""
    zero = absmax == 0
    return tl.where(zero, 0.0, tl.math.div_rn(w, tl.where(zero, 1.0, absmax)))


@triton.jit
def midpoints(codebook):
    """float32 [256]: the boundary above each level, infinite above the last. codebook: pointer."""
    i = tl.arange(0, 256)
    upper = tl.load(codebook + i + 1, mask=i < 255, other=float("inf"))
    return (tl.load(codebook + i) + upper) * 0.5


@triton.jit
def nearest(boundaries, r):
    """Codes (int32) of normalized values: how many of the boundaries lie below r.

    boundaries: float32 [256], ascending, as `midpoints` gives them. At a boundary the lower level
    wins; NaN takes the last level, as in the reference.
    """
    code = tl.zeros([r.numel], tl.int32)
    flat = tl.reshape(r, [r.numel])
    for power in tl.static_range(8):
        half = 128 >> power
        at_or_below = flat <= tl.gather(boundaries, code + (half - 1), 0)
        code += tl.where(at_or_below, 0, half)
    return tl.reshape(code, r.shape)


def on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches within go to the tensor's GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def blocks_per_tile(block_size: int, tile: int) -> int:
    """How many blocks one program takes so that it has `tile` elements, and at least one block."""
    return max(1, tile // block_size)
