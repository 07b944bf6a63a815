"""dx = dy @ w, decoding w inside the product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_q8.backends.triton.configs import (
    DOT_32,
    GRAD_16,
    family_of,
    pick,
    programs_wanted,
)
from gptj_q8.backends.triton.format import decoded_tile, on
from gptj_q8.backends.triton.linear import group
from gptj_q8.backends.triton.splits import Launch, launch


@triton.jit(do_not_specialize=["M"])
def linear_grad_input_kernel(
    dy,
    codes,
    absmax,
    codebook,
    dx,
    M,
    N,
    K,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """dx[m, k] = sum over n of dy[m, n] * codebook[codes[n, k]] * absmax[(n*K + k) // BLOCK_SIZE]

    dy: [M, N]; codes: [N, K]; absmax: float32 [ceil(N * K / BLOCK_SIZE)]; codebook: float32 [256].
    With SPLITS 1, dx: [M, K] of dy's dtype; else float32 [SPLITS, M, K], partial sums. GROUP: that
    many neighbours along k share a scale, a power of two up to TILE_K. A program owns
    dx[TILE_M, TILE_K] over one of SPLITS stretches of n.
    The host has checked lengths and dtypes, and that GROUP divides K and BLOCK_SIZE.

    Every row of w has its own scales, and rows are what is summed over: so the scales multiply the
    decoded tile, in float32, before its one rounding.
    """
    k_start = tl.program_id(0) * TILE_K
    k = k_start + tl.arange(0, TILE_K)
    m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    split = tl.program_id(2)
    m_row = tl.minimum(m, M - 1).to(tl.int64) * N
    k_inside = (k < K)[None, :]
    steps = tl.cdiv(N, TILE_N)
    first = split * steps // SPLITS * TILE_N
    last = tl.minimum((split + 1) * steps // SPLITS * TILE_N, N)
    dtype = dy.dtype.element_ty
    table = tl.load(codebook + tl.arange(0, 256))

    total = tl.zeros([TILE_M, TILE_K], tl.float32)
    for start in range(first, last, TILE_N):
        n = start + tl.arange(0, TILE_N)
        # Rows past the end repeat the last one, against a dy of 0.
        n_row = tl.minimum(n, N - 1).to(tl.int64) * K
        code = tl.load(codes + n_row[:, None] + k[None, :], mask=k_inside, other=0)
        rows = tl.load(dy + m_row[:, None] + n[None, :], mask=(n < N)[None, :], other=0)
        w = decoded_tile(table, code, absmax, n_row, k_start, K, BLOCK_SIZE, GROUP)
        total = tl.dot(rows, w.to(dtype), total, input_precision="ieee")

    place = split.to(tl.int64) * M * K + m.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dx + place, total.to(dx.dtype.element_ty), mask=(m < M)[:, None] & k_inside)


def linear_grad_input(
    dy: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int
) -> Tensor:
    N, K = codes.shape
    M = dy.numel() // N
    dx = torch.empty(*dy.shape[:-1], K, dtype=dy.dtype, device=dy.device)
    wanted = programs_wanted(dy.device)
    plan = plan_linear_grad_input(dy.dtype, M, N, K, block_size, family_of(dy.device), wanted)
    with on(dy):
        plan.run((dy, codes, absmax, codebook), dx, (M, N, K), None)
    return dx


def plan_linear_grad_input(
    dtype: torch.dtype, M: int, N: int, K: int, block_size: int, family: str, wanted: int
) -> Launch:
    """The tiles for a product; here n is the step of the sum, and k what a program owns."""
    tile = pick(DOT_32 if dtype == torch.float32 else GRAD_16[family], M)
    programs = triton.cdiv(K, tile.k), triton.cdiv(M, tile.m)
    constants = {"BLOCK_SIZE": block_size, "GROUP": group(K, block_size, tile.k)}
    return launch(linear_grad_input_kernel, tile, programs, N, tile.n, wanted, **constants)
