"""The `cuda` backend: the ops in CUDA C++ (csrc/cuda), for NVIDIA GPUs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

_LIBRARY = Path(__file__).parent.parent / "_cuda.abi3.so"


def _load() -> str | None:
    if not _LIBRARY.exists():
        return (
            f"the compiled library {_LIBRARY.name} was not built;"
            " reinstall gptj_q8 with nvcc present, its output says what failed"
        )
    if not torch.cuda.is_available():
        return "PyTorch sees no NVIDIA GPU here"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the compiled library {_LIBRARY.name} does not load: {error}"
    return None


_unavailable = _load()
_ops = torch.ops.gptj_q8_cuda


def unavailable() -> str | None:
    """Why the compiled library cannot be used and what to do; None when it can."""
    return _unavailable


def dequantize(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    return _ops.dequantize(codes, absmax, codebook, block_size, dtype)


def linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> Tensor:
    if bias is not None and bias.dtype == torch.float64:
        bias = bias.float()
    return _ops.linear(x, codes, absmax, codebook, bias, block_size)


def linear_grad_input(
    dy: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int
) -> Tensor:
    return _ops.linear_grad_input(dy, codes, absmax, codebook, block_size)
