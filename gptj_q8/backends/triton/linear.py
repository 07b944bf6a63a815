"""y = x @ w.T + bias, decoding w inside the product."""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_q8.backends.triton.configs import (
    DOT_32,
    FEW,
    LINEAR_16,
    Tiles,
    family_of,
    few_rows,
    pick,
    programs_wanted,
)
from gptj_q8.backends.triton.format import copied, decoded_tile, levels, on
from gptj_q8.backends.triton.linear_gemv import linear_gemv_kernel
from gptj_q8.backends.triton.splits import Launch, launch
from gptj_q8.backends.triton.tuned import tuned_tiles, tuning_key


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x,
    codes,
    absmax,
    codebook,
    bias,
    y,
    M,
    N,
    K,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    COPIES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """y[m, n] = sum over k of x[m, k] * codebook[codes[n, k]] * absmax[(n * K + k) // BLOCK_SIZE]

    x: [M, K]; codes: [N, K]; absmax: float32 [ceil(N * K / BLOCK_SIZE)]; codebook: float32 [256];
    bias: [N] or None. With SPLITS 1, y: [M, N] of x's dtype, bias added. Else y: float32
    [SPLITS, M, N], partial sums without bias. GROUP: that many neighbours along k share a scale,
    a power of two up to TILE_K. A program owns y[TILE_M, TILE_N] over one of SPLITS stretches of k.
    The host has checked lengths and dtypes, and that GROUP divides K and BLOCK_SIZE.

    w is the left operand (y.T = w @ x.T), so that TILE_N fills the 64 rows of a Hopper
    tensor-core instruction however few rows x has. Where a whole tile of k shares its scales
    (GROUP == TILE_K), levels go into the product as they are, and the scales multiply the sums.
    Then the codebook may stand in shared memory COPIES times, in float32, so that threads (which
    hold runs of 16 columns) find their levels in banks of their own: fewer turns of shared memory,
    more instructions. Which is faster, only a GPU can tell.
    """
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    split = tl.program_id(2)
    # Rows past the end repeat the last one, so that loads need no mask; stores have one.
    n_row = tl.minimum(n, N - 1).to(tl.int64) * K
    m_row = tl.minimum(m, M - 1).to(tl.int64) * K
    steps = tl.cdiv(K, TILE_K)
    first = split * steps // SPLITS * TILE_K
    last = tl.minimum((split + 1) * steps // SPLITS * TILE_K, K)
    dtype = x.dtype.element_ty
    table = tl.load(codebook + tl.arange(0, 256))
    if COPIES > 1:
        table = copied(table, COPIES)
        column, row = tl.arange(0, TILE_K)[None, :], tl.arange(0, TILE_N)[:, None]
        copy = (column // 16 + TILE_K // 16 * row) % COPIES
    elif GROUP == TILE_K:
        table = table.to(dtype)

    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    for start in range(first, last, TILE_K):
        k = start + tl.arange(0, TILE_K)
        if GROUP == TILE_K:  # divides K: no tail
            code = tl.load(codes + n_row[:, None] + k[None, :])
            rows = tl.load(x + m_row[:, None] + k[None, :])
            scale = tl.load(absmax + (n_row + start) // BLOCK_SIZE)
            if COPIES > 1:
                w = levels(table, code.to(tl.int32) * COPIES | copy).to(dtype)
            else:
                w = levels(table, code)
            product = tl.dot(w, tl.trans(rows), input_precision="ieee")
            total += product * scale[:, None]
        else:
            inside = (k < K)[None, :]
            code = tl.load(codes + n_row[:, None] + k[None, :], mask=inside, other=0)
            rows = tl.load(x + m_row[:, None] + k[None, :], mask=inside, other=0)
            w = decoded_tile(table, code, absmax, n_row, start, K, BLOCK_SIZE, GROUP)
            total = tl.dot(w.to(dtype), tl.trans(rows), total, input_precision="ieee")

    if SPLITS == 1 and bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
    place = split.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + place, tl.trans(total).to(y.dtype.element_ty), mask=inside)


def linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> Tensor:
    N, K = codes.shape
    tile = tuned_tiles(x.device).get(tuning_key(x.dtype, x.numel() // K, N, K))
    return linear_with(tile, x, codes, absmax, codebook, bias, block_size)


def linear_with(
    tile: Tiles | None,
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> Tensor:
    """`linear` with the tiles named, if they can serve, else with the table's."""
    N, K = codes.shape
    M = x.numel() // K
    aligned = codes.storage_offset() % 4 == 0
    if tile is None or not serves(tile, M, K, block_size, aligned):
        tile = table_tile(x.dtype, family_of(x.device), M, K, block_size, aligned)
    plan = plan_linear(tile, M, N, K, block_size, programs_wanted(x.device))
    # The kernel for a few rows reads codes four by four.
    source = codes.view(torch.int32) if plan.kernel is linear_gemv_kernel else codes
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    with on(x):
        plan.run((x, source, absmax, codebook, bias), y, (M, N, K), bias)
    return y


def serves(tile: Tiles, M: int, K: int, block_size: int, aligned: bool) -> bool:
    """Whether a product can use these tiles. aligned: codes can be read four by four."""
    return tile.m > FEW or (tile.m >= M and K % block_size == 0 and aligned)


def table_tile(
    dtype: torch.dtype, family: str, M: int, K: int, block_size: int, aligned: bool = True
) -> Tiles:
    """The tables' tiles for a product."""
    few = pick(few_rows(dtype, family), M)
    if serves(few, M, K, block_size, aligned):
        return few
    return pick(DOT_32 if dtype == torch.float32 else LINEAR_16[family], M)


def plan_linear(tile: Tiles, M: int, N: int, K: int, block_size: int, wanted: int) -> Launch:
    """The kernel and its launch; the tests compile what this gives for GPT-J's shapes."""
    constants = {"BLOCK_SIZE": block_size, "COPIES": tile.copies}
    if tile.m <= FEW:
        tile = narrowed(tile, K)
        programs = triton.cdiv(N, tile.n), 1
        return launch(linear_gemv_kernel, tile, programs, K, tile.k, wanted, **constants)
    programs = triton.cdiv(N, tile.n), triton.cdiv(M, tile.m)
    constants["GROUP"] = group(K, block_size, tile.k)
    if constants["GROUP"] < tile.k:
        constants["COPIES"] = 1  # the scaled levels of a tile have one table
    return launch(linear_kernel, tile, programs, K, tile.k, wanted, **constants)


def narrowed(tile: Tiles, K: int) -> Tiles:
    """A tile of the kernel for a few rows with no more threads than a short row needs."""
    k = min(tile.k, max(256, triton.next_power_of_2(K)))
    # A thread has 8 columns of a row.
    return dataclasses.replace(tile, k=k, num_warps=k // 256)


def group(K: int, block_size: int, tile_k: int) -> int:
    """How many neighbours along k surely share a scale, up to a tile."""
    return min(tile_k, math.gcd(K, block_size))
