"""The `cuda` backend: the ops in CUDA C++ (csrc/cuda), for NVIDIA GPUs."""

from __future__ import annotations

import functools

import torch

from gptj_q8.backends.compiled import Compiled

_library = Compiled("cuda", "where nvcc and a GPU are")
quantize = _library.quantize
histogram = _library.histogram
dequantize = _library.dequantize
embedding = _library.embedding
linear = _library.linear
linear_grad_input = _library.linear_grad_input
adam_step_ = _library.adam_step_


def unavailable() -> str | None:
    """Why the compiled library cannot be used and what to do; None when it can."""
    return _library.unavailable


@functools.cache
def has_wgmma(device: torch.device) -> bool:
    """Whether `linear` has Hopper's tensor cores there: the library is compiled for sm_90a."""
    if unavailable() is not None:
        return False
    found: bool = _library.ops.has_wgmma(torch.empty(0, device=device))
    return found
