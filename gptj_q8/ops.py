"""The ops `torch.ops.gptj_q8.*`, each declared once, and a typed function for each.

A quantized tensor is `codes` (uint8, the tensor's shape), `absmax` (float32, one for each block of
`block_size` elements along the flattened tensor) and `codebook` (float32[256], sorted ascending):
`w[i] = codebook[codes[i]] * absmax[i // block_size]`. `block_size` is a power of two, 32 to 4096.

An op checks its arguments (`checks.py`: ValueError for values and lengths, TypeError for dtypes,
IndexError for ids), answers empty cases and hands the rest, made contiguous, to the backend that
`gptj_q8.backends` picks. `linear`, `linear_grad_input`, `dequantize` and `embedding` look at
metadata only and never wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gptj_q8 import backends, checks
from gptj_q8.backends.forked import on_one_thread_if_forked

_QUANTIZED = "Tensor codes, Tensor absmax, Tensor codebook"
SCHEMAS = {
    "quantize": "(Tensor weight, Tensor codebook, int block_size) -> (Tensor codes, Tensor absmax)",
    "histogram": "(Tensor weight, int block_size, int bins) -> Tensor counts",
    "dequantize": f"({_QUANTIZED}, int block_size, ScalarType dtype) -> Tensor weight",
    "linear": f"(Tensor x, {_QUANTIZED}, Tensor? bias, int block_size) -> Tensor y",
    "linear_grad_input": f"(Tensor dy, {_QUANTIZED}, int block_size) -> Tensor dx",
    "embedding": f"(Tensor ids, {_QUANTIZED}, int block_size, ScalarType dtype) -> Tensor rows",
    "adam_step_": (
        "(Tensor(a!) param, Tensor grad, Tensor(b!) m_codes, Tensor(c!) m_absmax,"
        " Tensor(d!) v_codes, Tensor(e!) v_absmax, Tensor m_codebook, Tensor v_codebook,"
        " float lr, float beta1, float beta2, float eps, float weight_decay, int step,"
        " int block_size) -> ()"
    ),
}
"""Name and schema of every op."""


def quantize(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Encodes a weight of any shape (float32, bfloat16 or float16) by the nearest levels.

    Returns codes (uint8, the weight's shape) and absmax (float32). The boundary between two levels
    is their midpoint rounded to float32; a value at it takes the lower level. A block of zeros gets
    absmax 0. ValueError for NaN or Inf in the weight and for an unsorted codebook.
    """
    return torch.ops.gptj_q8.quantize.default(weight, codebook, block_size)


def histogram(weight: Tensor, block_size: int, bins: int) -> Tensor:
    """Histogram of w / absmax over [-1, 1], weighted by the squared scale: int64[bins].

    An element of block b adds rint((absmax[b] / max(absmax))^2 * 2^30) to its bin, of equal widths.
    Integers, so that every device gives the same. `bins` is a power of two from 2 to 2^20.
    ValueError for NaN or Inf in the weight.
    """
    return torch.ops.gptj_q8.histogram.default(weight, block_size, bins)


def dequantize(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    """The weight, in the shape of codes, rounded once to float32, bfloat16 or float16."""
    return torch.ops.gptj_q8.dequantize.default(codes, absmax, codebook, block_size, dtype)


def linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> Tensor:
    """y[..., N] = x[..., K] @ w[N, K].T + bias[N], decoding w inside the product.

    x is float32, bfloat16 or float16, and so is y; bias is any of these and is added in float32
    before the one rounding. Has gradients for x and bias. Autocast casts x and bias only.
    """
    return torch.ops.gptj_q8.linear.default(x, codes, absmax, codebook, bias, block_size)


def linear_grad_input(
    dy: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int
) -> Tensor:
    """dx[..., K] = dy[..., N] @ w[N, K]: the gradient of `linear` for x. Has a gradient for dy."""
    return torch.ops.gptj_q8.linear_grad_input.default(dy, codes, absmax, codebook, block_size)


def embedding(
    ids: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """rows[..., K] = w[ids[...]] in `dtype`, decoding only the rows asked for.

    ids are int64 or int32. IndexError for ids out of range; on a GPU a device-side assertion.
    """
    return torch.ops.gptj_q8.embedding.default(ids, codes, absmax, codebook, block_size, dtype)


def adam_step_(
    param: Tensor,
    grad: Tensor,
    m_codes: Tensor,
    m_absmax: Tensor,
    v_codes: Tensor,
    v_absmax: Tensor,
    m_codebook: Tensor,
    v_codebook: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    block_size: int,
) -> None:
    """One AdamW step in place, with decoupled weight decay and both moments in 8 bits.

    param and grad have one shape and are float32, bfloat16 or float16; codes have as many
    elements; step counts from 1. All arithmetic is in float32. Elements whose gradient, or its
    square, is not finite keep their parameter and moments. A positive second moment is never
    rounded to 0.
    """
    state = (m_codes, m_absmax, v_codes, v_absmax, m_codebook, v_codebook)
    numbers = (lr, beta1, beta2, eps, weight_decay, step, block_size)
    torch.ops.gptj_q8.adam_step_.default(param, grad, *state, *numbers)


# What each op returns, uninitialized.


def _empty_quantize(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    blocks = -(-weight.numel() // block_size)
    return codes, torch.empty(blocks, dtype=torch.float32, device=weight.device)


def _empty_histogram(weight: Tensor, block_size: int, bins: int) -> Tensor:
    return torch.empty(bins, dtype=torch.int64, device=weight.device)


def _empty_dequantize(codes: Tensor, *rest: Any) -> Tensor:
    return torch.empty(codes.shape, dtype=rest[-1], device=codes.device)


def _empty_linear(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _empty_linear_grad_input(dy: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], codes.shape[1])


def _empty_embedding(ids: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return torch.empty(*ids.shape, codes.shape[1], dtype=rest[-1], device=codes.device)


def _empty_adam_step_(*args: Any) -> None:
    return None


def _kernel(op: str) -> Callable[..., Any]:
    """What runs on real tensors: checks, empty cases, then the backend."""
    empty = globals()[f"_empty_{op}"]
    differentiable = op in ("linear", "linear_grad_input")

    @on_one_thread_if_forked
    def kernel(*args: Any) -> Any:
        getattr(checks, op)(*args)  # not looked up before: it may be what began this import
        checks.values(op, args)
        if differentiable and forward_ad._current_level >= 0:
            # PyTorch gives custom ops no forward derivative, and would go on with zeros.
            raise NotImplementedError(f"{op}: has no forward-mode derivative, use reverse mode")
        contiguous = list(args)
        for i, arg in enumerate(args):
            if isinstance(arg, Tensor):
                if arg.numel() == 0:
                    return _nothing_to_sum(op, empty(*args), args)
                contiguous[i] = arg.contiguous()
        # A backend may use PyTorch's products, which autocast would round to 16 bits.
        with torch._C._DisableAutocast():
            result = backends.call(op, args[0].device.type, contiguous)
        if op == "adam_step_" and contiguous[0] is not args[0]:
            args[0].copy_(contiguous[0])
        return result

    return kernel


def _fake(op: str) -> Callable[..., Any]:
    """What runs under tracing: the same checks, no values."""
    empty = globals()[f"_empty_{op}"]

    def fake(*args: Any) -> Any:
        getattr(checks, op)(*args)
        return empty(*args)

    return fake


def _nothing_to_sum(op: str, result: Any, args: tuple[Any, ...]) -> Any:
    """The result where an argument is empty: no elements at all, or sums of nothing."""
    if isinstance(result, Tensor):
        result.zero_()
        bias = args[4] if op == "linear" else None
        if bias is not None:
            result += bias
    return result


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, absmax, codebook, bias, ctx.block_size = inputs
    _refuse_scale_gradients("linear", ctx.needs_input_grad)
    ctx.bias_dtype = bias.dtype if bias is not None else None
    ctx.save_for_backward(codes, absmax, codebook)


@on_one_thread_if_forked
def _backward_linear(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        codes, absmax, codebook = ctx.saved_tensors
        dx = linear_grad_input(dy, codes, absmax, codebook, ctx.block_size)
    if ctx.needs_input_grad[4]:
        rows = tuple(range(dy.dim() - 1))  # sum(()) would sum over all of one row's elements
        dbias = (dy.sum(rows, dtype=torch.float32) if rows else dy).to(ctx.bias_dtype)
    return dx, None, None, None, dbias, None


def _setup_linear_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, absmax, codebook, ctx.block_size = inputs
    _refuse_scale_gradients("linear_grad_input", ctx.needs_input_grad)
    ctx.save_for_backward(codes, absmax, codebook)


def _backward_linear_grad_input(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    codes, absmax, codebook = ctx.saved_tensors
    dy = linear(ddx, codes, absmax, codebook, None, ctx.block_size)
    return dy, None, None, None, None


def _refuse_scale_gradients(op: str, needs_input_grad: tuple[bool, ...]) -> None:
    for name, needs in zip(("absmax", "codebook"), needs_input_grad[2:4], strict=True):
        if needs:
            raise ValueError(f"{op}: {name} must not require a gradient, the weight is frozen")


def _autocast_linear(device_type: str, key: str) -> Callable[..., Tensor]:
    """`linear` under autocast on a device type: casts x and bias, leaves the scales alone."""
    without_autocast = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(
        x: Tensor,
        codes: Tensor,
        absmax: Tensor,
        codebook: Tensor,
        bias: Tensor | None,
        block_size: int,
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        x = x.to(dtype) if x.dtype in checks.FLOATS else x
        bias = bias.to(dtype) if bias is not None and bias.dtype in checks.FLOATS else bias
        with torch._C._ExcludeDispatchKeyGuard(without_autocast):
            return linear(x, codes, absmax, codebook, bias, block_size)

    return kernel


_library = torch.library.Library("gptj_q8", "DEF")
for _op, _schema in SCHEMAS.items():
    _library.define(_op + _schema)
    _library.impl(_op, _kernel(_op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"gptj_q8::{_op}", _fake(_op), lib=_library)
torch.library.register_autograd(
    "gptj_q8::linear", _backward_linear, setup_context=_setup_linear, lib=_library
)
torch.library.register_autograd(
    "gptj_q8::linear_grad_input",
    _backward_linear_grad_input,
    setup_context=_setup_linear_grad_input,
    lib=_library,
)
for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("linear", _autocast_linear(_device_type, _key), _key)
