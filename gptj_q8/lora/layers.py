"""PEFT's LoRA layers over Q8Linear and Q8Embedding."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Embedding as PeftEmbedding
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from gptj_q8 import ops
from gptj_q8.checkpoint.stored import PARTS
from gptj_q8.lora.dora import DoraEmbedding, DoraLinear
from gptj_q8.nn import Q8Embedding, Q8Linear
from gptj_q8.nn.adapter import Adapter, lora_linear
from gptj_q8.nn.quantized import FrozenCodes, QuantizedWeight

MERGED_CODEBOOK = "fitted"


class RequantizingLayer(LoraLayer):
    """Merges adapters into an 8-bit base layer by encoding the sum anew, its codebook fitted.

    Encoding rounds (0.6 % of the weights at block 256), so the codes from before are kept, in main
    memory, and unmerging puts them back exactly. `merge_and_unload` drops them layer by layer.
    """

    merged_adapters: list[str]
    _before_merge: dict[str, Tensor] | None = None

    def active_here(self) -> list[str]:
        """The active adapters that this layer has."""
        available = self._get_available_adapters()
        return [name for name in self.active_adapters if name in available]

    def to_add(self, arguments: Any) -> list[str]:
        """The active adapters if nothing but the base layer and plain LoRA is asked for, else none.

        ValueError for DoRA beside another adapter: PEFT would scale what the other added.
        arguments: of forward, beside x.
        """
        names = self.active_here()
        variants = self.lora_variant.keys() & names
        if variants and len(names) > 1 and not self.disable_adapters:
            raise ValueError(f"DoRA goes with no other adapter, but active are {', '.join(names)}")
        if any(arguments) or variants or self.disable_adapters or self.merged:
            return []
        return names

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """P [N, r] and Q [r, K]: the adapter adds scaling * P @ Q to the weight [N, K]."""
        raise NotImplementedError

    def merged_weight(self, adapters: list[str]) -> Tensor:
        """The weight that nothing is merged into plus these adapters, float32 [N, K]."""
        base: Any = self.get_base_layer()
        parts = self._before_merge or {name: getattr(base, name) for name in PARTS}
        codes, absmax, codebook = (parts[name].to(base.codes.device) for name in PARTS)
        weight = ops.dequantize(codes, absmax, codebook, base.block_size, torch.float32)
        for name in adapters:
            p, q = self.factors(name)
            weight.addmm_(p.float(), q.float(), alpha=self.scaling[name])
            if name in self.lora_variant:
                weight = self.lora_variant[name].rescale(self, name, weight)
        return weight

    def merged_bias(self, adapters: list[str]) -> Tensor | None:
        """The bias likewise, in its own dtype; None where no adapter has one."""
        added: list[Tensor] = [
            self.lora_B[name].bias.float() * self.scaling[name]
            for name in adapters
            if self.lora_bias[name]
        ]
        if not added:
            return None
        base: Any = self.get_base_layer()
        if base.bias is None:
            raise RuntimeError("merge: the adapter has a bias (lora_bias) and its layer has none")
        bias = (self._before_merge or {"bias": base.bias})["bias"].to(base.bias.device)
        return (bias.float() + sum(added)).to(base.bias.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges the named adapters (None: the active ones). ValueError for NaN or Inf.

        safe_merge: asks for that check, which is always made.
        """
        base: Any = self.get_base_layer()
        if not isinstance(base, QuantizedWeight):
            # Dequantized since, where Transformers' Conv1D keeps its weight as [K, N].
            self.fan_in_fan_out = not isinstance(base, nn.Linear | nn.Embedding)
            super().merge(safe_merge, adapter_names)
            return
        available = self._get_available_adapters()
        new = [n for n in check_adapters_to_merge(self, adapter_names) if n in available]
        if not new:
            return
        names = [*self.merged_adapters, *new]
        if len(names) > 1 and any(name in self.lora_variant for name in names):
            raise ValueError(f"merge: DoRA goes with no other adapter, got {', '.join(names)}")
        bias = self.merged_bias(names)
        before = self._before_merge or {
            name: tensor.cpu() for name, tensor in base.state_dict().items()
        }
        # All of them into the original weight, so that it is rounded once.
        base._quantize_parts(self.merged_weight(names), MERGED_CODEBOOK)
        if bias is not None:
            base.bias.data = bias
        self._before_merge, self.merged_adapters = before, names

    def unmerge(self) -> None:
        """Takes all merged adapters out again, exactly.

        RuntimeError if the layer was dequantized since: that decoded the rounded sum.
        """
        if self._before_merge is None:
            super().unmerge()
            return
        base: Any = self.get_base_layer()
        if not isinstance(base, QuantizedWeight):
            raise RuntimeError(
                f"unmerge: {', '.join(self.merged_adapters)} were merged into 8 bits and the model "
                "dequantized after that; unmerge first, then dequantize"
            )
        parts = {name: part.to(base.codes.device) for name, part in self._before_merge.items()}
        base.codes = FrozenCodes(parts["codes"], requires_grad=False)
        base.absmax, base.codebook = parts["absmax"], parts["codebook"]
        if "bias" in parts:
            base.bias.data = parts["bias"]
        self._before_merge, self.merged_adapters = None, []


class Q8LoraLinear(RequantizingLayer, PeftLinear):
    """PEFT's LoRA over a Q8Linear, computed by `lora_linear`."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None, ("use_dora",): DoraLinear}

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.lora_B[adapter].weight, self.lora_A[adapter].weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [..., K] -> [..., N]."""
        names, base = self.to_add((args, kwargs)), self.base_layer
        parts = [base, *(part for name in names for part in (self.lora_A[name], self.lora_B[name]))]
        if not names or not isinstance(base, Q8Linear) or any(map(_is_watched, parts)):
            return super().forward(x, *args, **kwargs)
        adapters = [
            Adapter(
                self.lora_A[name].weight,
                self.lora_B[name].weight,
                self.scaling[name],
                _dropout_now(self.lora_dropout[name]),
            )
            for name in names
        ]
        bias = base.bias
        for name in names:
            if self.lora_bias[name]:
                own = self.lora_B[name].bias * self.scaling[name]
                bias = own if bias is None else bias + own
        return lora_linear(x, base, adapters, bias)


class Q8LoraEmbedding(RequantizingLayer, PeftEmbedding):
    """PEFT's LoRA over a Q8Embedding. As in PEFT, it has no dropout."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None, ("use_dora",): DoraEmbedding}

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[adapter].T, self.lora_embedding_B[adapter].T

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: ids [...] -> [..., K]."""
        names = self.to_add((args, kwargs))
        if not names or type(self.base_layer) is not Q8Embedding:  # some scale, as PEFT knows
            return super().forward(x, *args, **kwargs)
        rows = self.base_layer(x.reshape(-1))
        with torch.autocast(rows.device.type, enabled=False):  # it would cast addmm
            for name in names:
                inner = self._embed(x.reshape(-1), self.lora_embedding_A[name].T).to(rows.dtype)
                up = self.lora_embedding_B[name].T.to(rows.dtype)
                # A hook may have made the rows a leaf that requires a gradient.
                add = rows.addmm if rows.requires_grad else rows.addmm_
                rows = add(inner, up, alpha=self.scaling[name])
        return rows.view(*x.shape, rows.shape[-1])


def _dropout_now(module: nn.Module) -> float:
    """The share that a dropout layer drops in its present mode."""
    return module.p if isinstance(module, nn.Dropout) and module.training else 0.0


def _is_watched(module: nn.Module) -> bool:
    """Whether someone replaced or observes the module's forward, so that it has to be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )
