"""Argument checks: one function for each op, and the sentences they share.

The functions named as ops look at metadata only, so that they never wait for a GPU and run under
tracing too; `values` looks inside tensors, where an op promises that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptj_q8 import codebooks

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The float dtypes of weights, activations and gradients."""


class DtypeError(TypeError):
    """A TypeError for a tensor's dtype, which bad input can cause, where others are bugs."""


def quantize(weight: Tensor, codebook: Tensor, block_size: int) -> None:
    one_of_dtypes("quantize", "weight", weight.dtype, *FLOATS)
    _codebook("quantize", "codebook", codebook)
    block_size_is_valid("quantize", block_size)
    _same_device("quantize", weight=weight, codebook=codebook)


def histogram(weight: Tensor, block_size: int, bins: int) -> None:
    one_of_dtypes("histogram", "weight", weight.dtype, *FLOATS)
    block_size_is_valid("histogram", block_size)
    if not 2 <= bins <= 1 << 20 or bins & (bins - 1):
        raise ValueError(f"histogram: bins must be a power of two from 2 to {1 << 20}, got {bins}")


def dequantize(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> None:
    _quantized("dequantize", codes, absmax, codebook, block_size)
    one_of_dtypes("dequantize", "dtype", dtype, *FLOATS)
    _same_device("dequantize", codes=codes, absmax=absmax, codebook=codebook)


def linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> None:
    one_of_dtypes("linear", "x", x.dtype, *FLOATS)
    _matrix("linear", "codes", codes)
    _quantized("linear", codes, absmax, codebook, block_size)
    _last_dim("linear", "x", x, codes.shape[1], "K")
    if bias is not None:
        one_of_dtypes("linear", "bias", bias.dtype, *FLOATS)
        _length("linear", "bias", bias, codes.shape[0], "entries")
    _same_device("linear", x=x, codes=codes, absmax=absmax, codebook=codebook, bias=bias)


def linear_grad_input(
    dy: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int
) -> None:
    one_of_dtypes("linear_grad_input", "dy", dy.dtype, *FLOATS)
    _matrix("linear_grad_input", "codes", codes)
    _quantized("linear_grad_input", codes, absmax, codebook, block_size)
    _last_dim("linear_grad_input", "dy", dy, codes.shape[0], "N")
    _same_device("linear_grad_input", dy=dy, codes=codes, absmax=absmax, codebook=codebook)


def embedding(
    ids: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    dtype: torch.dtype,
) -> None:
    one_of_dtypes("embedding", "ids", ids.dtype, torch.int64, torch.int32)
    _matrix("embedding", "codes", codes)
    _quantized("embedding", codes, absmax, codebook, block_size)
    one_of_dtypes("embedding", "dtype", dtype, *FLOATS)
    _same_device("embedding", ids=ids, codes=codes, absmax=absmax, codebook=codebook)


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
    op = "adam_step_"
    one_of_dtypes(op, "param", param.dtype, *FLOATS)
    one_of_dtypes(op, "grad", grad.dtype, *FLOATS)
    if grad.shape != param.shape:
        raise ValueError(f"{op}: grad must have shape {list(param.shape)}, got {list(grad.shape)}")
    block_size_is_valid(op, block_size)
    state = {"m_codes": m_codes, "m_absmax": m_absmax, "v_codes": v_codes, "v_absmax": v_absmax}
    for name in ("m_codes", "v_codes"):
        one_of_dtypes(op, name, state[name].dtype, torch.uint8)
        if state[name].numel() != param.numel():
            raise ValueError(
                f"{op}: {name} must have {param.numel()} elements, got {state[name].numel()}"
            )
    for name in ("m_absmax", "v_absmax"):
        _scales(op, name, state[name], param.numel(), block_size)
    if any(
        size > 1 and not stride for size, stride in zip(param.shape, param.stride(), strict=True)
    ):
        raise ValueError(f"{op}: param must not be expanded, it is changed in place")
    for name, tensor in state.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, it is changed in place")
    _codebook(op, "m_codebook", m_codebook)
    _codebook(op, "v_codebook", v_codebook)
    _same_device(op, param=param, grad=grad, **state, m_codebook=m_codebook, v_codebook=v_codebook)
    adam_numbers(op, lr, beta1, beta2, eps, weight_decay)
    if step < 1:
        raise ValueError(f"{op}: step counts from 1, got {step}")


def adam_numbers(
    who: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> None:
    """ValueError for a setting of Adam that is out of range."""
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{who}: {name} must be at least 0 and below 1, got {beta}")
    for name, number in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= number < float("inf"):
            raise ValueError(f"{who}: {name} must be finite and not negative, got {number}")


def values(op: str, args: Sequence[Any]) -> None:
    """Looks at the values of the arguments of `op`, if `op` promises that. May wait for a GPU."""
    if op == "quantize":
        weight, codebook, _ = args
        codebooks.check_codebook(codebook, op)
        finite(op, "weight", weight)
    elif op == "histogram":
        finite(op, "weight", args[0])
    elif op == "embedding" and args[0].device.type == "cpu" and args[0].numel():
        low, high = (int(each) for each in args[0].aminmax())
        rows = args[1].shape[0]
        if low < 0 or high >= rows:
            bad = low if low < 0 else high
            raise IndexError(f"embedding: ids must be from 0 to {rows - 1}, got {bad}")


def finite(op: str, name: str, tensor: Tensor) -> None:
    """ValueError that counts the NaN and Inf values of `tensor`, if there are any."""
    if bad := count_not_finite(tensor):
        raise ValueError(f"{op}: {name} has {bad} NaN or Inf values")


def count_not_finite(tensor: Tensor) -> int:
    """How many values are NaN or Inf. One pass when there are none; needs little memory."""
    if tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax()):
        return 0
    return sum(int((~slab.isfinite()).sum()) for slab in tensor.reshape(-1).split(1 << 20))


def block_size_is_valid(op: str, block_size: int) -> None:
    """ValueError unless `block_size` is a power of two from 32 to 4096."""
    if not 32 <= block_size <= 4096 or block_size & (block_size - 1):
        raise ValueError(
            f"{op}: block_size must be a power of two from 32 to 4096, got {block_size}"
        )


def float_dtype(who: str, dtype: torch.dtype, name: str = "dtype") -> None:
    """TypeError unless `dtype`, called `name` in the message, is one of FLOATS."""
    one_of_dtypes(who, name, dtype, *FLOATS)


def one_of_dtypes(op: str, name: str, dtype: torch.dtype | None, *allowed: torch.dtype) -> None:
    """TypeError unless `dtype`, that of `name` (None: unknown to us), is one of `allowed`."""
    if dtype not in allowed:
        names = " or ".join(str(each).removeprefix("torch.") for each in allowed)
        raise DtypeError(f"{op}: {name} must be {names}, got {str(dtype).removeprefix('torch.')}")


def _quantized(op: str, codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int) -> None:
    block_size_is_valid(op, block_size)
    one_of_dtypes(op, "codes", codes.dtype, torch.uint8)
    _codebook(op, "codebook", codebook)
    _scales(op, "absmax", absmax, codes.numel(), block_size)


def _codebook(op: str, name: str, codebook: Tensor) -> None:
    one_of_dtypes(op, name, codebook.dtype, torch.float32)
    _length(op, name, codebook, 256, "entries")


def _scales(op: str, name: str, absmax: Tensor, numel: int, block_size: int) -> None:
    one_of_dtypes(op, name, absmax.dtype, torch.float32)
    _length(op, name, absmax, -(-numel // block_size), "blocks")


def _length(op: str, name: str, tensor: Tensor, length: int, unit: str) -> None:
    if tensor.dim() != 1:
        raise ValueError(f"{op}: {name} must have 1 dimension, got shape {list(tensor.shape)}")
    if tensor.shape[0] != length:
        raise ValueError(f"{op}: {name} must have {length} {unit}, got {tensor.shape[0]}")


def _matrix(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name} must have 2 dimensions, got shape {list(tensor.shape)}")


def _last_dim(op: str, name: str, tensor: Tensor, size: int, side: str) -> None:
    if tensor.dim() == 0 or tensor.shape[-1] != size:
        raise ValueError(
            f"{op}: the last dimension of {name} must be {side} = {size}, "
            f"got shape {list(tensor.shape)}"
        )


def _same_device(op: str, **tensors: Tensor | None) -> None:
    (first, expected), *others = [(name, t) for name, t in tensors.items() if t is not None]
    for name, tensor in others:
        if tensor.device != expected.device:
            raise ValueError(
                f"{op}: {name} must be on {expected.device} as {first} is, got {tensor.device}"
            )
