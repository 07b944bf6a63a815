"""The `slabs` backend: products of many rows, as PyTorch's own product on decoded slabs of w.

A slab of rows of w is decoded into one workspace, multiplied, and the workspace used again. With
many rows of x that costs less than decoding inside the product: each weight is decoded once, and
cuBLAS multiplies faster than any kernel of ours. `dequantize` comes from whichever backend the
device's table names.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gptj_q8 import backends

# The whole slab should be in the L2 cache when the product reads it, and leave room for x and y.
L2_SHARE = 3
# cuBLAS gives each multiprocessor tiles of about 128 by 128 outputs (estimate, not yet measured).
OUTPUT_TILE = 128
# linear_grad_input adds slabs up in float32 in memory, so it takes few and large ones.
GRAD_SLAB = 1 << 26


def unavailable() -> None:
    """Always usable."""


def linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> Tensor:
    """y[..., N] = x[..., K] @ w[N, K].T + bias[N], a slab of N at a time."""
    N, K = codes.shape
    rows = x.view(-1, K)
    y = torch.empty(len(rows), N, dtype=x.dtype, device=x.device)
    step = linear_rows(len(rows), N, K, x.element_size(), *_l2_and_processors(x.device))
    for n, w in _slabs(codes, absmax, codebook, block_size, x.dtype, step):
        slab_bias = None if bias is None else bias[n]
        if not _has_fast_product(x):
            product = _product(rows, w.T)
            y[:, n] = product if slab_bias is None else product + slab_bias
        elif slab_bias is None:
            torch.mm(rows, w.T, out=y[:, n])
        elif slab_bias.dtype == x.dtype:  # added in float32, before the rounding
            torch.addmm(slab_bias, rows, w.T, out=y[:, n])
        else:
            y[:, n] = torch.mm(rows, w.T, out_dtype=torch.float32) + slab_bias
        del w  # the next slab takes its memory
    return y.view(*x.shape[:-1], N)


def linear_grad_input(
    dy: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int
) -> Tensor:
    """dx[..., K] = dy[..., N] @ w[N, K], slabs of N added up in float32, in their order."""
    N, K = codes.shape
    rows = dy.view(-1, N)
    step = max(1, GRAD_SLAB // K)
    if step >= N and _has_fast_product(dy):
        w = _decode(codes, absmax, codebook, block_size, dy.dtype)
        return torch.mm(rows, w).view(*dy.shape[:-1], K)
    total: Tensor | None = None
    for n, w in _slabs(codes, absmax, codebook, block_size, dy.dtype, step):
        if _has_fast_product(dy):
            product = torch.mm(rows[:, n], w, out_dtype=torch.float32)
        else:
            product = _product(rows[:, n], w)
        total = product if total is None else total.add_(product)
        del w
    assert total is not None, "there is at least one row of w"
    return total.to(dy.dtype).view(*dy.shape[:-1], K)


def linear_rows(M: int, N: int, K: int, itemsize: int, l2: int, processors: int) -> int:
    """Rows of w in a slab: what the L2 cache holds, but enough outputs for every multiprocessor.

    l2: bytes. Slabs are of one size, and a multiple of the output tile, but for the last.
    """
    in_cache = l2 // L2_SHARE // (K * itemsize)
    to_fill = OUTPUT_TILE * math.ceil(processors / math.ceil(M / OUTPUT_TILE))
    slabs = max(1, N // max(in_cache, to_fill))
    return OUTPUT_TILE * math.ceil(math.ceil(N / slabs) / OUTPUT_TILE)


def _product(x: Tensor, w: Tensor) -> Tensor:
    """x @ w with sums in float32 (float64 for float32, which a setting may turn into TF32)."""
    dtype = torch.float64 if x.dtype == torch.float32 else torch.float32
    return x.to(dtype) @ w.to(dtype)


def _has_fast_product(x: Tensor) -> bool:
    """Whether PyTorch multiplies 16-bit tensors on x's device into float32."""
    return x.is_cuda and x.dtype != torch.float32 and torch.version.hip is None


@functools.cache
def _l2_and_processors(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return 1 << 20, 2
    properties = torch.cuda.get_device_properties(device)
    return properties.L2_cache_size, properties.multi_processor_count


def _slabs(
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    dtype: torch.dtype,
    rows: int,
) -> Iterator[tuple[slice, Tensor]]:
    """(slice of N, w[slice] decoded), all but the last of about `rows` rows and whole blocks."""
    N, K = codes.shape
    whole = block_size // math.gcd(K, block_size)  # so many rows end where a block does
    rows = min(N, whole * math.ceil(rows / whole))
    for start in range(0, N, rows):
        n = slice(start, min(start + rows, N))
        blocks = slice(n.start * K // block_size, -(-n.stop * K // block_size))
        yield n, _decode(codes[n], absmax[blocks], codebook, block_size, dtype)


def _decode(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    args = (codes, absmax, codebook, block_size, dtype)
    decode = backends.load(backends.preferred("dequantize", codes.device.type, args)).dequantize
    weight: Tensor = decode(*args)
    return weight
