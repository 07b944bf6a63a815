"""y = x @ w.T for a few rows of x: the decoding of one token, where reading w is all the work."""

from __future__ import annotations

import triton
import triton.language as tl

from gptj_q8.backends.triton.format import copied


@triton.jit(do_not_specialize=["M"])
def linear_gemv_kernel(
    x,
    words,
    absmax,
    codebook,
    bias,
    y,
    M,
    N,
    K,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    COPIES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """y[m, n] = sum over k of x[m, k] * codebook[codes[n, k]] * absmax[(n * K + k) // BLOCK_SIZE]

    x: [M, K], M up to TILE_M; words: int32 [N, K / 4], the codes four by four, lowest byte first;
    absmax: float32 [N * K / BLOCK_SIZE]; codebook: float32 [256]; bias: [N] or None.
    With SPLITS 1, y: [M, N] of x's dtype, bias added. Else y: float32 [SPLITS, M, N], partial sums
    without bias. A program owns y[:, TILE_N] over one of SPLITS stretches of k.
    The host has checked lengths and dtypes, and that BLOCK_SIZE divides K.

    No tensor cores: with so few rows they save less than moving w to their registers costs. Every
    weight is one lookup and M multiply-adds in float32, straight from registers.
    The table stands in shared memory COPIES times, copy c of level l at l * COPIES + c. With as
    many copies as there are memory banks, and neighbouring threads (which hold runs of 8 columns)
    at neighbouring copies, no two threads of a warp ever meet in a bank; from a single copy, a
    lookup by 32 threads at random codes takes 2.8 turns.

    Budget for M = 1 in float16 at block 256: codes for each clock and multiprocessor. Estimates,
    not measured, with Triton 3.7 (`python -m benchmarks.triton_budget`; a test compares):
                 needed at full bandwidth   issued at most   through shared memory at most
        T4                            5.0             16.6                            16.5
        A100-80                      13.2             16.7                            16.5
        H100                         14.3             16.8                            19.0
    So each is bound by its memory, if enough loads are in flight: two programs (T4: one) of 256
    threads (H100: 512) with 64 bytes each are 32 KB for each multiprocessor (16, 64).
    """
    RUN: tl.constexpr = 8
    RUNS: tl.constexpr = TILE_K // RUN
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    split = tl.program_id(2)
    # Rows past the end repeat the last one, so that loads need no mask; the store has one.
    n_row = tl.minimum(n, N - 1).to(tl.int64) * K
    m = tl.arange(0, TILE_M)
    m_row = tl.minimum(m, M - 1).to(tl.int64) * K
    steps = tl.cdiv(K, TILE_K)
    first = split * steps // SPLITS * TILE_K
    last = tl.minimum((split + 1) * steps // SPLITS * TILE_K, K)

    k = tl.arange(0, TILE_K)
    run = tl.arange(0, RUNS) * RUN
    word = tl.arange(0, TILE_K // 4)
    copy = word // (RUN // 4) % COPIES
    byte = tl.arange(0, 4) * 8
    # Two words to a thread, the run that it has of x: no exchange between threads.
    place = tl.max_contiguous((n_row // 4)[:, None] + word[None, :], [1, RUN // 4])
    scales = absmax + (n_row // BLOCK_SIZE)[:, None]
    table = copied(tl.load(codebook + tl.arange(0, 256)), COPIES)

    total = tl.zeros([TILE_M, TILE_N, RUNS], tl.float32)
    for start in range(first, last, TILE_K):
        group = start + run
        column = start + k
        inside = (start // 4 + word < K // 4)[None, :]
        four = tl.load(words + start // 4 + place, mask=inside)
        inside = (group < K)[None, :]
        scale = tl.load(scales + (group // BLOCK_SIZE)[None, :], mask=inside, other=0)
        inside = (column < K)[None, :]
        rows = tl.load(x + m_row[:, None] + column[None, :], mask=inside, other=0)
        index = (four[:, :, None] >> byte[None, None, :] & 255) * COPIES | copy[None, :, None]
        w = tl.gather(table, tl.reshape(index, [TILE_N * TILE_K]), 0)
        w = tl.reshape(w, [1, TILE_N, RUNS, RUN])
        rows = tl.reshape(rows.to(tl.float32), [TILE_M, 1, RUNS, RUN])
        total += tl.sum(w * rows, axis=3) * scale[None, :, :]

    out = tl.sum(total, axis=2)
    if SPLITS == 1 and bias is not None:
        out += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    place = (split * M + m)[:, None].to(tl.int64) * N + n[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
