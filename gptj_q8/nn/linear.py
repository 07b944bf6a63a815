"""Q8Linear: nn.Linear with an 8-bit weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptj_q8 import ops
from gptj_q8.nn.quantized import QuantizedWeight


class Q8Linear(QuantizedWeight, nn.Linear):
    """y[..., N] = x[..., K] @ w[N, K].T + bias[N], w stored in 8 bits and decoded in the product.

    x is float32, bfloat16 or float16, and y has x's dtype. The weight is frozen; gradients flow
    to x and bias. A fresh module is an empty shell for loading;
    `gptj_q8.nn.QuantizedWeight.from_float` quantizes one of PyTorch's.
    """

    float_class: type[nn.Module] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 256,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty shell. dtype: of bias and weight, None for PyTorch's default."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._make_parts((out_features, in_features), block_size, dtype, device)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=self.dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        return ops.linear(x, self.codes, self.absmax, self.codebook, self.bias, self.block_size)

    def extra_repr(self) -> str:
        """nn.Linear's, with block_size and dtype."""
        return f"{nn.Linear.extra_repr(self)}, block_size={self.block_size}, dtype={self.dtype}"
