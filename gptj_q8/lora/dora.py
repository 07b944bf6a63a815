"""DoRA (weight-decomposed LoRA, https://arxiv.org/abs/2402.09353) over an 8-bit weight.

The layer's weight is m / norm(W + s B A) * (W + s B A): each of its outputs has a norm of its own
that is trained. PEFT decodes W and multiplies B A out in every call. Here the squared norm comes
from products that need neither, norm(W)^2 + 2 s B . (W A^T) + s^2 B . (B A A^T), of which the first
term never changes.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn import functional as F

from gptj_q8 import ops
from gptj_q8.nn.quantized import QuantizedWeight


class Magnitude(nn.Module):
    """weight: m, float [outputs]. PEFT saves it by this name."""

    def __init__(self, outputs: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, device=device))
        self.base_squares: Tensor | None = None


class Dora(LoraVariant):
    """What DoRA on a linear layer and on an embedding share.

    outputs_at: the dimension of the base weight along which the outputs lie.
    """

    outputs_at: int

    def factors(self, module: Any, adapter: str) -> tuple[Tensor, Tensor]:
        """A [r, inputs] and B [outputs, r]."""
        raise NotImplementedError

    def project(self, base: Any, down: Tensor) -> Tensor:
        """A W^T, float32 [r, outputs], W the matrix from inputs to outputs."""
        raise NotImplementedError

    def init(self, module: Any, adapter_name: str, **kwargs: Any) -> None:
        _, up = self.factors(module, adapter_name)
        magnitude = Magnitude(len(up), up.device)
        module.lora_magnitude_vector[adapter_name] = magnitude
        if not up.is_meta:  # else loading fills it
            magnitude.weight.data = self.norm(module, adapter_name)

    @torch.no_grad()
    def norm(self, module: Any, adapter: str) -> Tensor:
        """norm(W + s B A), float32 [outputs]; a constant to the gradient, as the paper has it."""
        base, magnitude = module.get_base_layer(), module.lora_magnitude_vector[adapter]
        down, up = (factor.float() for factor in self.factors(module, adapter))
        scale = module.scaling[adapter]
        squares = magnitude.base_squares
        if squares is None or squares.device != up.device:
            squares = _decoded(base).square().sum(1 - self.outputs_at)
            magnitude.base_squares = squares
        with torch.autocast(up.device.type, enabled=False):
            cross = (up * self.project(base, down).T).sum(1)
            own = (up * (up @ (down @ down.T))).sum(1)
        return (squares + 2 * scale * cross + scale**2 * own).clamp_min(0).sqrt()

    def gain(self, module: Any, adapter: str) -> Tensor:
        """m / norm(W + s B A), float32 [outputs]."""
        magnitude: Tensor = module.lora_magnitude_vector[adapter].weight.float()
        return magnitude / self.norm(module, adapter)

    def rescale(self, module: Any, adapter: str, weight: Tensor) -> Tensor:
        """Gives W + s B A, float32 in the base weight's layout, its norms."""
        gain = self.gain(module, adapter)
        return weight.mul_(gain[:, None] if self.outputs_at == 0 else gain)


class DoraLinear(Dora):
    outputs_at = 0

    def factors(self, module: Any, adapter: str) -> tuple[Tensor, Tensor]:
        return module.lora_A[adapter].weight, module.lora_B[adapter].weight

    def project(self, base: Any, down: Tensor) -> Tensor:
        return _product(base, down)

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """result: of the base layer, [..., N]. Where x is dropped, PEFT drops it for W too."""
        base, dropout = module.get_base_layer(), module.lora_dropout[active_adapter]
        if isinstance(dropout, nn.Identity) or not module.training:
            plain = result if base.bias is None else result - base.bias
        else:
            x = dropout(x)
            plain = _product(base, x.to(result.dtype))
        added = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        gain = self.gain(module, active_adapter)
        return result + (gain - 1) * plain + gain * (added * module.scaling[active_adapter])


class DoraEmbedding(Dora):
    outputs_at = 1

    def factors(self, module: Any, adapter: str) -> tuple[Tensor, Tensor]:
        return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]

    def project(self, base: Any, down: Tensor) -> Tensor:
        if isinstance(base, QuantizedWeight):
            return ops.linear_grad_input(
                down, base.codes, base.absmax, base.codebook, base.block_size
            )
        return down @ base.weight.float()

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """x: ids [...]; result: their rows of the base table, [..., K]."""
        down, up = self.factors(module, active_adapter)
        added = module._embed(x, down.T) @ up.T * module.scaling[active_adapter]
        scale = module._get_embed_scale()  # in `result` already
        if scale is not None:
            added = added * scale
        return self.gain(module, active_adapter) * (result + added)


def _product(base: Any, x: Tensor) -> Tensor:
    """x @ W^T, no bias."""
    if isinstance(base, QuantizedWeight):
        return ops.linear(x, base.codes, base.absmax, base.codebook, None, base.block_size)
    return F.linear(x, _decoded(base).to(x.dtype))


def _decoded(base: Any) -> Tensor:
    """The weight of a layer, 8-bit or float, as float32 [N, K]."""
    if isinstance(base, QuantizedWeight):
        return ops.dequantize(
            base.codes, base.absmax, base.codebook, base.block_size, torch.float32
        )
    weight: Tensor = base.weight.float()
    # Dequantized since, where Transformers' Conv1D keeps its weight as [K, N].
    return weight if isinstance(base, nn.Linear | nn.Embedding) else weight.T
