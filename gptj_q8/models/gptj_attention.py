"""Whether a GPT-J's attention is eager or through PyTorch's `scaled_dot_product_attention`.

The eager kind holds float32 scores of T x T for every head. The other is Transformers' own from
5.24 on, as for other families; before that it is that of `gptj_sdpa`.
"""

from __future__ import annotations

from torch import nn
from transformers.models.gptj.modeling_gptj import GPTJAttention, GPTJPreTrainedModel

from gptj_q8.models.gptj_version import REWRITTEN

if REWRITTEN:
    SDPA = "sdpa"
else:
    from gptj_q8.models.gptj_sdpa import NAME as SDPA
    from gptj_q8.models.gptj_sdpa import SdpaAttention


def set_attn_implementation(model: nn.Module, implementation: str) -> None:
    """Switches a GPT-J, loaded and perhaps wrapped by PEFT, to "sdpa" or "eager" attention.

    Any other model, and with Transformers 5.24 GPT-J too, gets what its own
    `set_attn_implementation` does. ValueError for other names.
    """
    attentions = [module for module in model.modules() if isinstance(module, GPTJAttention)]
    if REWRITTEN or not attentions:
        model.set_attn_implementation(implementation)  # type: ignore[operator]
        return
    kinds = {"sdpa": (SDPA, SdpaAttention), "eager": ("eager", GPTJAttention)}
    if implementation not in kinds:
        raise ValueError(
            f'set_attn_implementation: GPT-J has "sdpa" and "eager", got {implementation!r}'
        )
    name, kind = kinds[implementation]
    for attention in attentions:
        attention.__class__ = kind  # they differ in what they compute, not in what they hold
    for module in model.modules():
        if isinstance(module, GPTJPreTrainedModel):
            module.config._attn_implementation = name
