"""The `cpu` backend: the ops in C++ (csrc/cpu), for each instruction set this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

_LIBRARY = Path(__file__).parent.parent / "_cpu.abi3.so"


def _load() -> str | None:
    if not _LIBRARY.exists():
        return (
            f"the compiled library {_LIBRARY.name} was not built;"
            " reinstall gptj_q8 with a C++ compiler present, its output says what failed"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the compiled library {_LIBRARY.name} does not load: {error}"
    return None


_unavailable = _load()
_ops = torch.ops.gptj_q8_cpu


def unavailable() -> str | None:
    """Why the compiled library cannot be used and what to do; None when it can."""
    return _unavailable


def instruction_set() -> str:
    """The instruction set that serves calls now, such as "avx512" or "portable"."""
    return _ops.isa()


def instruction_sets() -> list[str]:
    """The instruction sets that this build has and this CPU can run, best first."""
    return _ops.usable_isas().split()


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Within it one instruction set serves all calls of the process: for tests and timing."""
    before = _ops.isa()
    _ops.set_isa(name)
    try:
        yield
    finally:
        _ops.set_isa(before)


def quantize(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return _ops.quantize(weight, codebook, block_size)


def histogram(weight: Tensor, block_size: int, bins: int) -> Tensor:
    return _ops.histogram(weight, block_size, bins)


def dequantize(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    return _ops.dequantize(codes, absmax, codebook, block_size, dtype)


def embedding(
    ids: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return _ops.embedding(ids, codes, absmax, codebook, block_size, dtype)


def linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> Tensor:
    return _ops.linear(x, codes, absmax, codebook, bias, block_size)


def linear_grad_input(
    dy: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int
) -> Tensor:
    return _ops.linear_grad_input(dy, codes, absmax, codebook, block_size)


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
    _ops.adam_step_(
        param,
        grad,
        m_codes,
        m_absmax,
        v_codes,
        v_absmax,
        m_codebook,
        v_codebook,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        block_size,
    )
