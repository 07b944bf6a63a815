"""Every op in plain PyTorch: the specification that all other backends are compared with.

Runs on any device that PyTorch knows. It works in slabs, so that a call needs a few MB beyond its
output. `gptj_q8.ops` has checked the arguments: contiguous, not empty, on one device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

SLAB = 1 << 18
"""Elements handled at a time: 1 MB of float32, and a multiple of every block size."""

HISTOGRAM_SCALE = 1 << 30
"""What an element of the block with the largest scale adds to its bin."""


def unavailable() -> None:
    """Always usable."""


def quantize(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """codes[i] = index of the level nearest to w[i] / absmax[i // block_size]."""
    flat = weight.view(-1)
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=weight.device)
    blocks = -(-flat.numel() // block_size)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    for start in range(0, flat.numel(), SLAB):
        slab = _blocks(flat[start : start + SLAB], block_size)
        slab_codes, slab_absmax = _encode(slab, codebook)
        codes[start : start + SLAB] = slab_codes.view(-1)[: flat.numel() - start]
        absmax[start // block_size :][: len(slab_absmax)] = slab_absmax
    return codes.view(weight.shape), absmax


def histogram(weight: Tensor, block_size: int, bins: int) -> Tensor:
    """Integer histogram of w / absmax over [-1, 1], each element counted by its squared scale.

    An element of block b adds rint((absmax[b] / max(absmax))^2 * 2^30): integers, so that the
    order of the additions does not matter.
    """
    flat = weight.view(-1)
    slabs = range(0, flat.numel(), SLAB)
    largest = max(flat[start : start + SLAB].abs().max().float() for start in slabs)
    counts = torch.zeros(bins, dtype=torch.int64, device=weight.device)
    if largest == 0:
        return counts
    for start in slabs:
        blocks = _blocks(flat[start : start + SLAB], block_size)
        absmax = blocks.abs().amax(dim=1, keepdim=True)
        relative = absmax / largest
        weights = (relative * relative * HISTOGRAM_SCALE).round().long().expand_as(blocks)
        index = ((_normalize(blocks, absmax) + 1) * (bins / 2)).int().clamp_(max=bins - 1)
        used = slice(0, flat.numel() - start)  # leaves out the padding of the last block
        counts.index_add_(0, index.view(-1)[used], weights.reshape(-1)[used])
    return counts


def dequantize(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    """w[i] = codebook[codes[i]] * absmax[i // block_size], rounded once to `dtype`."""
    weight = torch.empty(codes.numel(), dtype=dtype, device=codes.device)
    for start in range(0, codes.numel(), SLAB):
        stop = min(start + SLAB, codes.numel())
        weight[start:stop] = _decode(codes, absmax, codebook, block_size, start, stop)
    return weight.view(codes.shape)


def linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> Tensor:
    """y[..., N] = x[..., K] @ w[N, K].T + bias[N]."""
    N, K = codes.shape
    rows = x.view(-1, K)
    y = torch.empty(len(rows), N, dtype=x.dtype, device=x.device)
    for n, w in _row_slabs(codes, absmax, codebook, block_size, _sum_dtype(x)):
        for m in _row_ranges(len(rows), max(len(w), K)):
            product = rows[m].to(w.dtype) @ w.T
            if bias is not None:
                product += bias[n].float()
            y[m, n] = product.to(x.dtype)
    return y.view(*x.shape[:-1], N)


def linear_grad_input(
    dy: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int
) -> Tensor:
    """dx[..., K] = dy[..., N] @ w[N, K]."""
    N, K = codes.shape
    rows = dy.view(-1, N)
    dx = torch.empty(len(rows), K, dtype=dy.dtype, device=dy.device)
    for m in _row_ranges(len(rows), max(N, K)):
        total = torch.zeros(len(rows[m]), K, dtype=_sum_dtype(dy), device=dy.device)
        for n, w in _row_slabs(codes, absmax, codebook, block_size, total.dtype):
            total += rows[m, n].to(w.dtype) @ w
        dx[m] = total.to(dy.dtype)
    return dx.view(*dy.shape[:-1], K)


def embedding(
    ids: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """rows[..., K] = w[ids], decoding only these rows."""
    K = codes.shape[1]
    flat = ids.view(-1).long()
    rows = torch.empty(len(flat), K, dtype=dtype, device=codes.device)
    columns = torch.arange(K, device=codes.device)
    for m in _row_ranges(len(flat), K):
        # index_select, for [...] would count ids below 0 from the end where nobody checks them.
        levels = codebook[codes.index_select(0, flat[m]).int()]
        scales = absmax[(flat[m, None] * K + columns) // block_size]
        rows[m] = (levels * scales).to(dtype)
    return rows.view(*ids.shape, K)


def adam_step_(
    param: Tensor,
    grad: Tensor,
    m_codes: Tensor,
    m_absmax: Tensor,
    v_codes: Tensor,
    v_absmax: Tensor,
    m_codebook: Tensor,
    v_codebook: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    block_size: int,
) -> None:
    """One AdamW step in place (Loshchilov and Hutter, 2019), moments kept in 8 bits.

    The parameter moves by the moments before they are rounded to 8 bits. A second moment that is
    not 0 is never rounded to 0: beside a first moment that is not 0 either, the next step would
    divide by little more than eps.
    """
    smallest_positive = (v_codebook <= 0).sum().to(torch.uint8)
    flat_param, flat_grad = param.view(-1), grad.view(-1)
    flat_m, flat_v = m_codes.view(-1), v_codes.view(-1)
    for start in range(0, param.numel(), SLAB):
        stop = min(start + SLAB, param.numel())
        here = slice(start, stop)
        g, p = flat_grad[here].float(), flat_param[here].float()
        m = _decode(m_codes, m_absmax, m_codebook, block_size, start, stop)
        v = _decode(v_codes, v_absmax, v_codebook, block_size, start, stop)
        p, m, v = adamw(p, g, m, v, lr, beta1, beta2, eps, weight_decay, step)
        flat_param[here] = p.to(param.dtype)

        blocks = slice(start // block_size, -(-stop // block_size))
        codes, m_absmax[blocks] = _encode(_blocks(m, block_size), m_codebook)
        flat_m[here] = codes.view(-1)[: stop - start]
        codes, v_absmax[blocks] = _encode(_blocks(v, block_size), v_codebook)
        codes = codes.view(-1)[: stop - start]
        flat_v[here] = torch.where(v > 0, codes.maximum(smallest_positive), codes)


def adamw(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The new parameter and moments of an AdamW step. All tensors float32 and of one shape.

    Gradients whose square overflows are left out as NaN and Inf are: an infinite second moment
    would spoil the scale of its block.
    """
    finite = (g * g).isfinite()
    m = torch.where(finite, m * beta1 + g * (1 - beta1), m)
    v = torch.where(finite, v * beta2 + g * g * (1 - beta2), v)
    update = (lr / (1 - beta1**step)) * m / (v.sqrt() / (1 - beta2**step) ** 0.5 + eps)
    p = torch.where(finite, p * (1 - lr * weight_decay) - update, p)
    return p, m, v


def _blocks(flat: Tensor, block_size: int) -> Tensor:
    """float32 [blocks, block_size] of a flat stretch, its last block padded with zeros."""
    return F.pad(flat.float(), (0, -flat.numel() % block_size)).view(-1, block_size)


def _normalize(blocks: Tensor, absmax: Tensor) -> Tensor:
    """blocks / absmax, and 0 where absmax is 0. absmax: [blocks, 1]."""
    return torch.where(absmax > 0, blocks / absmax, 0.0)


def _encode(blocks: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 codes [blocks, block_size] and float32 absmax [blocks]."""
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    midpoints = (codebook[:-1] + codebook[1:]) * 0.5
    # Counts the midpoints below the value: at a midpoint the lower level wins.
    codes = torch.searchsorted(midpoints, _normalize(blocks, absmax), out_int32=True)
    return codes.to(torch.uint8), absmax.squeeze(1)


def _decode(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, start: int, stop: int
) -> Tensor:
    """float32 weights [stop - start] of the flat stretch start..stop."""
    first, last = start // block_size, -(-stop // block_size)
    levels = codebook[codes.view(-1)[first * block_size : last * block_size].int()]
    scales = absmax[first:last].repeat_interleave(block_size)[: len(levels)]
    return (levels * scales)[start - first * block_size : stop - first * block_size]


def _row_slabs(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Decoded stretches of rows: (slice of N, w[rows, K])."""
    N, K = codes.shape
    for n in _row_ranges(N, K):
        w = _decode(codes, absmax, codebook, block_size, n.start * K, n.stop * K)
        yield n, w.view(-1, K).to(dtype)


def _row_ranges(rows: int, width: int) -> Iterator[slice]:
    """Slices over `rows` rows of `width` elements, a slab each."""
    step = max(1, SLAB // width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype products are summed in.

    float64 for float32: `torch.set_float32_matmul_precision` may turn a float32 product into
    TensorFloat32 or bfloat16, which the 16-bit dtypes can bear and float32 cannot.
    """
    return torch.float64 if x.dtype == torch.float32 else torch.float32
