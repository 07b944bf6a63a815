"""Q8Conv1D: Transformers' Conv1D, the linear layer of GPT-2, with an 8-bit weight."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from gptj_q8.nn.linear import Q8Linear


class Q8Conv1D(Q8Linear):
    """y[..., N] = x[..., K] @ w[K, N] + bias[N]: Conv1D keeps its weight as w[K, N].

    The codes are those of the transposed weight, [N, K], as in every Q8Linear, so that kernels and
    PEFT know one layout; the weight that this shows is [N, K] too. `to_float` gives a Conv1D with
    its weight [K, N] again. Modules come from `gptj_q8.nn.QuantizedWeight.from_float`, and shells
    for loading from `like`.
    """

    float_class = nn.Module  # Conv1D, which is not imported for this

    @classmethod
    def like(cls, module: Any, block_size: int = 256) -> Self:
        if not (hasattr(module, "nx") and hasattr(module, "nf")):
            kind = type(module).__name__
            raise TypeError(f"{cls.__name__}: must be made of a Conv1D, got a {kind}")
        shell = super().like(module, block_size)
        shell.in_features, shell.out_features = module.nx, module.nf
        return shell

    def to_float(self, weight: nn.Parameter) -> nn.Module:
        made = super().to_float(weight)
        del made.in_features, made.out_features
        return made

    @staticmethod
    def turn(weight: Tensor) -> Tensor:
        return weight.T.contiguous()
