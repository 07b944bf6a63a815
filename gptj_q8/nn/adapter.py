"""The product of an 8-bit layer with low-rank adapters (LoRA), in as little memory as it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptj_q8 import checks, ops
from gptj_q8.nn.linear import Q8Linear


class Adapter(NamedTuple):
    """down: float [r, K]. up: float [N, r]. Adds `scale * up @ down` to a weight [N, K].

    dropout: the share of x's elements that the adapter does not see, 0 to 1.
    """

    down: Tensor
    up: Tensor
    scale: float
    dropout: float = 0.0


def lora_linear(
    x: Tensor, layer: Q8Linear, adapters: Sequence[Adapter], bias: Tensor | None
) -> Tensor:
    """y[..., N] = x @ w.T + bias + sum of scale * (dropout(x) @ down.T) @ up.T.

    x is float32, bfloat16 or float16, and so is y (under autocast, its dtype); adapters of another
    dtype are rounded to it for the product, while their gradients arrive in their own. Gradients
    flow to x, bias, down and up; the second derivative is refused.

    Backward keeps x itself, x @ down.T (r numbers a token) and, with dropout, a bool for every
    element of x; forward and backward add in place, and make no other copy of x or y than the
    dropped x and, under autocast, the cast one, both gone when the layer returns.
    """
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype in checks.FLOATS:
        dtype = torch.get_autocast_dtype(x.device.type)
    rows = x.reshape(-1, x.shape[-1])
    factors: list[Tensor | None] = []
    for adapter in adapters:
        kept = None
        if adapter.dropout > 0:
            kept = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - adapter.dropout)
        factors += [adapter.down, adapter.up, kept]
    y: Tensor = _LoraLinear.apply(
        rows,
        bias,
        layer.codes,
        layer.absmax,
        layer.codebook,
        layer.block_size,
        dtype,
        tuple(adapter.scale for adapter in adapters),
        # Of dropout 1 nothing is kept, and nothing needs a factor.
        tuple(1 / (1 - adapter.dropout) if adapter.dropout < 1 else 0.0 for adapter in adapters),
        *factors,
    )
    return y.view(*x.shape[:-1], y.shape[-1])


class _LoraLinear(torch.autograd.Function):
    """One function for layer and adapters, so that neither y nor dx exists twice.

    Autograd would add the two parts of dx out of place, and PyTorch's linear would save x in the
    adapter's dtype. Arguments: those of `ops.linear` with x [M, K], the dtype to compute in, the
    scale of each adapter, the factor that makes up for its dropout, then for each adapter
    down [r, K], up [N, r] and the kept elements of x (bool [M, K] or None).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        absmax: Tensor,
        codebook: Tensor,
        block_size: int,
        dtype: torch.dtype,
        scales: tuple[float, ...],
        gains: tuple[float, ...],
        *factors: Tensor | None,
    ) -> Tensor:
        ctx.block_size, ctx.dtype, ctx.scales, ctx.gains = block_size, dtype, scales, gains
        ctx.bias_dtype = bias.dtype if bias is not None else None
        cast = x.to(dtype)
        inner = []  # x @ down.T, before y exists: the dropped x is gone by then
        for gain, (down, _, kept) in zip(gains, _triples(factors), strict=True):
            inner.append(_dropped(cast, kept, gain) @ down.to(dtype).T)
        y = ops.linear(cast, codes, absmax, codebook, bias, block_size)
        for scale, u, (_, up, _) in zip(scales, inner, _triples(factors), strict=True):
            y.addmm_(u, up.to(dtype).T, alpha=scale)
        ctx.save_for_backward(x, codes, absmax, codebook, *inner, *factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        dtype, count = ctx.dtype, len(ctx.scales)
        x, codes, absmax, codebook, *rest = ctx.saved_tensors
        inner, triples = rest[:count], _triples(rest[count:])
        needs_x, needs_bias = ctx.needs_input_grad[:2]
        needs = _triples(ctx.needs_input_grad[9:])
        cast = x.to(dtype)
        d_inner: list[Any] = []
        d_factors: list[Tensor | None] = []
        for i, (down, up, kept) in enumerate(triples):
            needs_down, needs_up, _ = needs[i]
            d_down = d_up = None
            du: Any = None
            if needs_down or needs_x:
                du = (dy @ up.to(dtype)).mul_(ctx.scales[i])
            if needs_down:
                d_down = (du.T @ _dropped(cast, kept, ctx.gains[i])).to(down.dtype)
            if needs_up:
                d_up = (dy.T @ inner[i]).to(up.dtype).mul_(ctx.scales[i])
            d_inner.append(du)
            d_factors += [d_down, d_up, None]
        d_bias = None
        if needs_bias:
            d_bias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        dx = None
        if needs_x:
            dx = ops.linear_grad_input(dy, codes, absmax, codebook, ctx.block_size)
            for du, gain, (down, _, kept) in zip(d_inner, ctx.gains, triples, strict=True):
                if kept is None:
                    dx.addmm_(du, down.to(dtype))
                else:
                    dx.add_((du @ down.to(dtype)).mul_(kept), alpha=gain)
        return (dx, d_bias, *[None] * 7, *d_factors)


def _triples(items: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    return [(items[i], items[i + 1], items[i + 2]) for i in range(0, len(items), 3)]


def _dropped(x: Tensor, kept: Tensor | None, gain: float) -> Tensor:
    return x if kept is None else (x * kept).mul_(gain)
