"""A compiled library of ours, and its ops as a backend offers them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Compiled:
    """The library `_<name>.abi3.so`, whose ops are `torch.ops.gptj_q8_<name>`.

    ops: where the ops are looked up. unavailable: why they cannot be used and what to do, None
    when they can; `needs` says with what the library is built.
    """

    def __init__(self, name: str, needs: str) -> None:
        self.ops: Any = getattr(torch.ops, f"gptj_q8_{name}")
        self.unavailable = _load(f"_{name}.abi3.so", needs)

    def quantize(self, weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        return self.ops.quantize(weight, codebook, block_size)

    def histogram(self, weight: Tensor, block_size: int, bins: int) -> Tensor:
        return self.ops.histogram(weight, block_size, bins)

    def dequantize(
        self,
        codes: Tensor,
        absmax: Tensor,
        codebook: Tensor,
        block_size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        return self.ops.dequantize(codes, absmax, codebook, block_size, dtype)

    def embedding(
        self,
        ids: Tensor,
        codes: Tensor,
        absmax: Tensor,
        codebook: Tensor,
        block_size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        return self.ops.embedding(ids, codes, absmax, codebook, block_size, dtype)

    def linear(
        self,
        x: Tensor,
        codes: Tensor,
        absmax: Tensor,
        codebook: Tensor,
        bias: Tensor | None,
        block_size: int,
    ) -> Tensor:
        return self.ops.linear(x, codes, absmax, codebook, bias, block_size)

    def linear_grad_input(
        self,
        dy: Tensor,
        codes: Tensor,
        absmax: Tensor,
        codebook: Tensor,
        block_size: int,
    ) -> Tensor:
        return self.ops.linear_grad_input(dy, codes, absmax, codebook, block_size)

    def adam_step_(
        self,
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
        self.ops.adam_step_(
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


def _load(file: str, needs: str) -> str | None:
    path = Path(__file__).parent.parent / file
    if not path.exists():
        return (
            f"the compiled library {file} was not built;"
            f" reinstall gptj_q8 {needs}, where pip install -v says what failed"
        )
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"the compiled library {file} does not load: {error}"
    return None
