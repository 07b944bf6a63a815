"""GPT-J's attention, MLP and loss in less memory than Transformers' own, for the same numbers.

- Attention through PyTorch's `scaled_dot_product_attention`: Transformers offers GPT-J only the
  eager kind, which holds float32 scores of T x T for every head.
- GELU as PyTorch's one operation, which keeps its input; Transformers' formula of seven steps keeps
  most of what lies between.
- The loss in chunks (`gptj_q8.nn.loss`): T x 50400 logits never exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import ModelOutput
from transformers.models.gptj.modeling_gptj import (
    GPTJ_ATTENTION_CLASSES,
    GPTJMLP,
    GPTJAttention,
    GPTJForCausalLM,
    GPTJPreTrainedModel,
)

from gptj_q8.nn.loss import linear_cross_entropy

ATTENTION = "gptj_q8"
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
AttentionInterface.register(ATTENTION, sdpa_attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
GPTJ_ATTENTION_CLASSES[ATTENTION] = SdpaAttention


def set_attn_implementation(model: nn.Module, implementation: str) -> None:
    """Switches a GPT-J, loaded and perhaps wrapped by PEFT, to "sdpa" or "eager" attention.

    Any other model gets what its own `set_attn_implementation` does. ValueError for other names.
    """
    attentions = [module for module in model.modules() if isinstance(module, GPTJAttention)]
    if not attentions:
        model.set_attn_implementation(implementation)  # type: ignore[operator]
        return
    kinds = {"sdpa": (ATTENTION, SdpaAttention), "eager": ("eager", GPTJAttention)}
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


def fuse_gelu(model: nn.Module) -> None:
    """Gives every MLP of a GPT-J PyTorch's own GELU where it has Transformers' `gelu_new`.

    The same function (the tanh approximation) with one rounding in place of seven.
    """
    for module in model.modules():
        if isinstance(module, GPTJMLP) and isinstance(module.act, NewGELUActivation):
            module.act = nn.GELU(approximate="tanh")


@dataclass
class LossOutput(ModelOutput):
    """What a model answers when its loss is computed in chunks: all but the logits."""

    loss: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def logits(self) -> Tensor:
        raise AttributeError(
            "the loss was computed in chunks, so there are no logits: call the model without "
            "labels, or gptj_q8.set_chunked_loss(model, False)"
        )


class _ChunkedLoss(GPTJForCausalLM):
    """Given labels, computes the loss in chunks and no logits; else does what it always does."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        if labels is None or hasattr(self, "_loss_function"):  # a loss of the user's own
            inputs |= {"labels": labels, "return_dict": return_dict}
            return super().forward(**inputs, logits_to_keep=logits_to_keep, **kwargs)
        if return_dict is False or not (return_dict or self.config.return_dict):
            raise ValueError(
                "return_dict: a loss in chunks comes without logits, so not as a tuple"
            )
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            raise ValueError("logits_to_keep: a loss in chunks comes without logits")
        if use_cache is None:
            inputs["use_cache"] = past_key_values is not None  # nobody goes on from a loss
        outputs = self.transformer(**inputs, return_dict=True)
        return LossOutput(
            loss=linear_cross_entropy(outputs.last_hidden_state, self.lm_head, labels, **kwargs),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# save_pretrained writes it into config.json; pickle goes by __qualname__.
_ChunkedLoss.__name__ = GPTJForCausalLM.__name__


def set_chunked_loss(model: nn.Module, on: bool = True) -> None:
    """Lets `model(..., labels=...)` compute its loss in chunks of the vocabulary projection.

    For a GPT-J with a language model's head, perhaps wrapped by PEFT, and so for Trainer. What it
    returns has no `logits`: reading them raises. TypeError for other models.
    """
    heads = [module for module in model.modules() if isinstance(module, GPTJForCausalLM)]
    if not heads:
        raise TypeError(f"set_chunked_loss: {type(model).__name__} is no GPT-J language model")
    for head in heads:
        head.__class__ = _ChunkedLoss if on else GPTJForCausalLM


def save_memory(model: nn.Module) -> bool:
    """Lets a GPT-J language model, perhaps wrapped by PEFT, train in less memory, in place.

    Attention through PyTorch's `scaled_dot_product_attention`, GELU as one operation that keeps its
    input alone, and the loss in chunks (`set_chunked_loss`). The numbers stay the same but for
    rounding. Returns whether the model is a GPT-J; another stays as it is.
    """
    if not any(isinstance(module, GPTJForCausalLM) for module in model.modules()):
        return False
    set_attn_implementation(model, "sdpa")
    fuse_gelu(model)
    set_chunked_loss(model)
    return True
