"""Scaled-dot-product attention for the GPT-J of Transformers before 5.24, which has eager only."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gptj.modeling_gptj import GPTJ_ATTENTION_CLASSES, GPTJAttention

NAME = "gptj_q8"
"""What Transformers' configurations call it. Transformers refuses GPT-J the name `sdpa`, and would
make it the default of every GPT-J in the process if it did not."""


class SdpaAttention(GPTJAttention):
    """GPT-J's attention through `torch.nn.functional.scaled_dot_product_attention`.

    Without a mask, which is Transformers' sign for a plain causal one, none is made.
    """

    def forward(self, *args: Any, output_attentions: bool | None = False, **kwargs: Any) -> Any:
        """Does what the eager one does, but for the attention weights: ValueError."""
        if output_attentions:
            raise ValueError(
                "output_attentions: scaled_dot_product_attention gives no weights; call "
                'gptj_q8.set_attn_implementation(model, "eager") first'
            )
        return super().forward(*args, **kwargs)

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """query, key, value: [B, H, T, D]. Returns [B, H, T, D] and no weights."""
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(query.dtype)  # one that the user made
        dropout = self.attn_dropout.p if self.training else 0.0
        output, _ = sdpa_attention_forward(self, query, key, value, attention_mask, dropout=dropout)
        return output.transpose(1, 2), None


# Additions to tables that Transformers keeps for that: no other model changes.
AttentionInterface.register(NAME, sdpa_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
GPTJ_ATTENTION_CLASSES[NAME] = SdpaAttention
