"""One AdamW step in place, moments kept in 8 bits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gptj_q8.backends.triton.configs import ADAM
from gptj_q8.backends.triton.format import (
    EXACT,
    blocks_per_tile,
    levels,
    midpoints,
    nearest,
    normalize,
    on,
)


@triton.jit
def adam_step_kernel(
    param,
    grad,
    m_codes,
    m_absmax,
    v_codes,
    v_absmax,
    m_codebook,
    v_codebook,
    numel,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    decay,
    rate,
    eps,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
    param = param * decay - rate * m / (sqrt(v) + eps), where g^2 is finite.

    decay = 1 - lr * weight_decay; rate = lr / (1 - beta1^step) and eps hold a factor
    sqrt(1 - beta2^step), by which AdamW divides sqrt(v).
    param, grad, m_codes, v_codes: [numel]; *_absmax: float32 [ceil(numel / BLOCK_SIZE)];
    *_codebook: float32 [256]. A program owns BLOCKS whole blocks.
    The host has checked lengths and dtypes.
    One pass over everything: a block's moments are in registers from decoding to encoding.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside = i < numel
    used = block * BLOCK_SIZE < numel
    m_table = tl.load(m_codebook + tl.arange(0, 256))
    v_table = tl.load(v_codebook + tl.arange(0, 256))
    m_scale = tl.load(m_absmax + block, mask=used, other=0)
    v_scale = tl.load(v_absmax + block, mask=used, other=0)
    m = levels(m_table, tl.load(m_codes + i, mask=inside, other=0)) * m_scale[:, None]
    v = levels(v_table, tl.load(v_codes + i, mask=inside, other=0)) * v_scale[:, None]
    g = tl.load(grad + i, mask=inside, other=0).to(tl.float32)
    old = tl.load(param + i, mask=inside, other=0).to(tl.float32)

    finite = g * g < float("inf")  # false for NaN
    m = tl.where(finite, m * beta1 + g * one_minus_beta1, m)
    v = tl.where(finite, v * beta2 + g * g * one_minus_beta2, v)
    update = rate * tl.math.div_rn(m, tl.math.sqrt_rn(v) + eps)
    new = tl.where(finite, old * decay - update, old)
    tl.store(param + i, new.to(param.dtype.element_ty), mask=inside)

    # The elements past the end would enter the scale of the last block.
    m_scale = tl.max(tl.where(inside, tl.abs(m), 0.0), axis=1)
    v_scale = tl.max(tl.where(inside, tl.abs(v), 0.0), axis=1)
    m_code = nearest(midpoints(m_codebook), normalize(m, m_scale[:, None]))
    v_code = nearest(midpoints(v_codebook), normalize(v, v_scale[:, None]))
    # A v above 0 never takes the level 0: beside an m that is not 0 it would make the next step
    # divide by little more than eps.
    smallest_positive = tl.sum((v_table <= 0).to(tl.int32), axis=0)
    v_code = tl.where(v > 0, tl.maximum(v_code, smallest_positive), v_code)
    tl.store(m_codes + i, m_code.to(tl.uint8), mask=inside)
    tl.store(v_codes + i, v_code.to(tl.uint8), mask=inside)
    tl.store(m_absmax + block, m_scale, mask=used)
    tl.store(v_absmax + block, v_scale, mask=used)


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
    blocks = blocks_per_tile(block_size, ADAM.tile)
    grid = (triton.cdiv(param.numel(), blocks * block_size),)
    root = (1 - beta2**step) ** 0.5
    rate = lr * root / (1 - beta1**step)
    with on(param):
        adam_step_kernel[grid](
            param, grad, m_codes, m_absmax, v_codes, v_absmax, m_codebook, v_codebook,
            param.numel(),
            float(beta1), 1.0 - beta1, float(beta2), 1.0 - beta2,
            1.0 - lr * weight_decay, float(rate), float(eps * root),
            block_size, blocks, num_warps=ADAM.num_warps, **EXACT,
        )  # fmt: skip
