"""A LayerNorm to train where activations have 16 bits."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F


class Float32LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with float32 parameters that answers in x's dtype.

    A step of 1e-4 on a weight near 1 is lost in bfloat16, and PyTorch's own LayerNorm wants
    parameters of x's dtype on GPUs.
    """

    @classmethod
    def like(cls, norm: nn.LayerNorm) -> Self:
        """The same with its parameters in float32; they require gradients where they did."""
        made = cls(
            list(norm.normalized_shape),
            norm.eps,
            norm.elementwise_affine,
            norm.bias is not None,
            device="meta",
        )
        for name, parameter in norm.named_parameters():
            value = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
            made.register_parameter(name, value)
        return made.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., *normalized_shape] of any float dtype -> the same."""
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
