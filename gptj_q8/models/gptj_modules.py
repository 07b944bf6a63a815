"""GPT-J's attention, MLP and loss in less memory than Transformers' own, for the same numbers.

- Attention through PyTorch's `scaled_dot_product_attention`, which Transformers before 5.24 lacks
  for GPT-J (`gptj_attention`).
- GELU as PyTorch's one operation, which keeps its input; Transformers' formula of seven steps keeps
  most of what lies between.
- The loss in chunks (`gptj_q8.nn.loss`): T x 50400 logits never exist.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import ModelOutput
from transformers.models.gptj.modeling_gptj import GPTJMLP, GPTJForCausalLM

from gptj_q8.models.gptj_attention import set_attn_implementation
from gptj_q8.models.gptj_version import REWRITTEN
from gptj_q8.nn.loss import linear_cross_entropy

# Those of forward's arguments that may be given by place.
_PLACES = [
    name
    for name, parameter in inspect.signature(GPTJForCausalLM.forward).parameters.items()
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
][1:]
# Names that Transformers 5.24 takes as well, though its signature does not tell.
_MORE_NAMES = ("past_key_values", "output_attentions", "output_hidden_states")
CACHE = "cache" if REWRITTEN else "past_key_values"


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
    if REWRITTEN:
        cache: Any = None
    else:
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(_PLACES, args, strict=False))
        labels = inputs.get("labels", kwargs.get("labels"))
        if labels is None or hasattr(self, "_loss_function"):  # a loss of the user's own
            return super().forward(*args, **kwargs)
        return self._loss_alone(**inputs, **kwargs)

    def _loss_alone(
        self,
        labels: Tensor,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LossOutput:
        if return_dict is False or not (return_dict or self.config.return_dict):
            raise ValueError(
                "return_dict: a loss in chunks comes without logits, so not as a tuple"
            )
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            raise ValueError("logits_to_keep: a loss in chunks comes without logits")
        names = (*_PLACES, *_MORE_NAMES)
        inputs = {name: kwargs.pop(name) for name in names if name in kwargs}
        if use_cache is None:  # nobody goes on from a loss
            use_cache = any(inputs.get(name) is not None for name in (CACHE, "past_key_values"))
        outputs = self.transformer(**inputs, use_cache=use_cache, return_dict=True)
        return LossOutput(
            loss=linear_cross_entropy(outputs.last_hidden_state, self.lm_head, labels, **kwargs),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )


# Trainer reads the signature. No functools.wraps: Accelerate unwraps what says that it is wrapped.
_ChunkedLoss.forward.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    GPTJForCausalLM.forward
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
