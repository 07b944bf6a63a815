"""rows[...] = w[ids[...]], decoding only these rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_q8.backends.triton.configs import ELEMENTWISE
from gptj_q8.backends.triton.format import levels, on


@triton.jit
def embedding_kernel(
    ids,
    codes,
    absmax,
    codebook,
    rows,
    N,
    K,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """rows[i, k] = codebook[codes[ids[i], k]] * absmax[(ids[i] * K + k) // BLOCK_SIZE].

    ids: int32 or int64 [grid 0]; codes: [N, K]; rows: [grid 0, K].
    A program owns TILE columns of one row. The host has checked lengths and dtypes; that ids are
    in range is asserted here, since the host must not wait for them.
    Memory-bound, and small: 4096 bytes for a token of GPT-J.
    """
    i = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    token = tl.load(ids + i).to(tl.int64)
    known = (token >= 0) & (token < N)
    tl.device_assert(known, "embedding: an id is out of range")
    inside = (k < K) & known
    flat = token * K + k
    scale = tl.load(absmax + flat // BLOCK_SIZE, mask=inside, other=0)
    table = tl.load(codebook + tl.arange(0, 256))
    w = levels(table, tl.load(codes + flat, mask=inside, other=0)) * scale
    tl.store(rows + i * K + k, w.to(rows.dtype.element_ty), mask=k < K)


def embedding(
    ids: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    N, K = codes.shape
    rows = torch.empty(*ids.shape, K, dtype=dtype, device=codes.device)
    tile = min(ELEMENTWISE.tile, triton.next_power_of_2(K))
    grid = (ids.numel(), triton.cdiv(K, tile))
    with on(codes):
        # debug keeps the assertion in the kernel.
        embedding_kernel[grid](
            ids, codes, absmax, codebook, rows, N, K, block_size, tile,
            num_warps=ELEMENTWISE.num_warps, debug=True, sanitize_overflow=False,
        )  # fmt: skip
    return rows
