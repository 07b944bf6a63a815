"""Times the Triton kernels' tile sizes on the GPU at hand and keeps the fastest."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptj_q8 import backends, codebooks

if TYPE_CHECKING:  # Triton may be missing
    from gptj_q8.backends.triton.configs import Tiles

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
SIDES = ((4096, 4096), (16384, 4096), (4096, 16384), (50400, 4096))
"""N, K of the matrices tuned for unless others are named: those of the 6B model."""

Measure = Callable[[Callable[[int], object], int], float]
"""Seconds that a call takes, given the call (of the number of a weight) and how many there are."""


def tune(
    device: torch.device,
    sides: Sequence[tuple[int, int]] = SIDES,
    rows: Sequence[int] = ROWS,
    dtype: torch.dtype = torch.float16,
    block_size: int = 256,
    say: Callable[[str], object] = print,
    measure: Measure | None = None,
    seconds: float = float("inf"),
) -> Path:
    """Times every candidate for each product, stores the winners and returns their file.

    A candidate that does not compile or does not fit is passed over.

    sides, rows: N, K of the matrices, and the rows of x; few rows, which decoding has, come first.
    dtype: of x. say(line): is told of each product. measure: None times on the GPU.
    seconds: after so many, no further candidate is timed.

    Raises RuntimeError where the Triton backend is unavailable.
    """
    if reason := backends.unavailable("triton"):
        raise RuntimeError(f"tune: the triton backend is unavailable: {reason}")
    from gptj_q8.backends.triton import configs, linear_with, tuned

    measure = measure or _graph_seconds
    best = dict(tuned.tuned_tiles(device))
    end = time.monotonic() + seconds
    for M, (N, K) in itertools.product(rows, sides):
        if time.monotonic() > end:
            say(f"tune: stops before {N}x{K}, {M} rows: {seconds:.0f} s are over")
            break
        weights = _weights(N, K, block_size, device)
        x = torch.randn(M, K, device=device).to(dtype)
        times: dict[configs.Tiles, float] = {}
        for tile in _candidates(configs.family_of(device), M):
            if time.monotonic() > end:
                break
            call = functools.partial(_run, linear_with, tile, x, weights, block_size)
            try:
                times[tile] = measure(call, len(weights))
            except Exception as error:  # a compiler or a launch may fail in any way
                say(f"tune: passes over {tile}: {type(error).__name__}")
        if times:
            fastest = min(times, key=lambda tile: times[tile])
            best[tuned.tuning_key(dtype, M, N, K)] = fastest
            slowest = max(times.values()) / times[fastest]
            say(
                f"tune: {N}x{K}, {M} rows: {times[fastest] * 1e6:.1f} us with {fastest}, the "
                f"slowest of {len(times)} takes {slowest:.2f} times that"
            )
    return tuned.store_tuned(device, best)


def _run(
    linear_with: Callable[..., Tensor],
    tile: Tiles,
    x: Tensor,
    weights: Sequence[tuple[Tensor, Tensor, Tensor]],
    block_size: int,
    i: int,
) -> Tensor:
    return linear_with(tile, x, *weights[i], None, block_size)


def _candidates(family: str, M: int) -> Iterator[Tiles]:
    """Tiles worth timing for M rows: this family's, others', each with one codebook or many."""
    from gptj_q8.backends.triton.configs import BANKS, GEMV_32, LINEAR_16

    seen: set[Tiles] = set()
    for table in (LINEAR_16[family], *LINEAR_16.values(), GEMV_32):
        for tile in table:
            fits = M <= tile.m < max(4 * M, 17) or tile == table[-1]
            for copies in (tile.copies, BANKS):
                candidate = dataclasses.replace(tile, copies=copies)
                if fits and 4 * tile.m >= M and candidate not in seen:
                    seen.add(candidate)
                    yield candidate


def _weights(
    N: int, K: int, block_size: int, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Weights enough that none is still in the L2 cache when its turn comes again."""
    cached = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    codebook = codebooks.dynamic().to(device)
    return [
        (
            torch.randint(0, 256, (N, K), dtype=torch.uint8, device=device),
            torch.rand(-(-N * K // block_size), device=device),
            codebook,
        )
        for _ in range(2 + 2 * cached // (N * K))
    ]


def _graph_seconds(call: Callable[[int], object], weights: int) -> float:
    """Seconds a call, as a replayed CUDA graph of one call for each weight; a median of nine."""
    call(0)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(weights):
            call(i)
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / weights)
    return statistics.median(times)
