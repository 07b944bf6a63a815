"""GPT-J's attention, MLP and loss in less memory than Transformers' own, for the same numbers.

- Attention through PyTorch's `scaled_dot_product_attention`: Transformers before 5.24 offers GPT-J
  only the eager kind, which holds float32 scores of T x T for every head (`gptj_attention`).
- GELU as PyTorch's one operation, which keeps its input; Transformers' formula of seven steps keeps
  most of what lies between.
- The loss in chunks (`gptj_q8.nn.loss`): T x 50400 logits never exist.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import ModelOutput
from transformers.models.gptj import modeling_gptj
from transformers.models.gptj.modeling_gptj import (
    GPTJMLP,
    GPTJAttention,
    GPTJForCausalLM,
    GPTJPreTrainedModel,
)

from gptj_q8.nn.loss import linear_cross_entropy

HAS_OWN_SDPA = not hasattr(modeling_gptj, "GPTJ_ATTENTION_CLASSES")
"""Whether Transformers' GPT-J has scaled-dot-product attention itself: from 5.24 on."""


def set_attn_implementation(model: nn.Module, implementation: str) -> None:
    """Switches a GPT-J, loaded and perhaps wrapped by PEFT, to "sdpa" or "eager" attention.

    Any other model gets what its own `set_attn_implementation` does. ValueError for other names.
    """
    attentions = [module for module in model.modules() if isinstance(module, GPTJAttention)]
    if HAS_OWN_SDPA or not attentions:
        model.set_attn_implementation(implementation)  # type: ignore[operator]
        return
    from gptj_q8.models.gptj_attention import ATTENTION, SdpaAttention

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
    past_key_values: Any = None  # before Transformers 5.24
    cache: Any = None  # from then on
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

    @functools.wraps(GPTJForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        named, others = _arguments(self, args, kwargs)
        if named.get("labels") is None or hasattr(
            self, "_loss_function"
        ):  # a loss of the user's own
            return super().forward(*args, **kwargs)
        labels, to_keep = named.pop("labels"), named.pop("logits_to_keep", 0)
        return_dict = named.pop("return_dict", None)
        if return_dict is False or not (return_dict or self.config.return_dict):
            raise ValueError(
                "return_dict: a loss in chunks comes without logits, so not as a tuple"
            )
        if isinstance(to_keep, Tensor) or to_keep:
            raise ValueError("logits_to_keep: a loss in chunks comes without logits")
        if named.get("use_cache") is None:
            named["use_cache"] = named.get(_CACHE) is not None  # nobody goes on from a loss
        outputs = self.transformer(**named, return_dict=True)
        return LossOutput(
            loss=linear_cross_entropy(outputs.last_hidden_state, self.lm_head, labels, **others),
            **{_CACHE: outputs.get(_CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


_FORWARD = inspect.signature(GPTJForCausalLM.forward)
# What Transformers 5.24 takes among the other keywords.
_OUTPUTS = ("return_dict", "output_attentions", "output_hidden_states")
# What it calls the keys and values.
_CACHE = "cache" if "cache" in _FORWARD.parameters else "past_key_values"


def _arguments(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of forward by name, and those keywords that are for the loss."""
    kwargs = dict(kwargs)
    if (
        _CACHE != "past_key_values" and "past_key_values" in kwargs
    ):  # the old name still works there
        kwargs[_CACHE] = kwargs.pop("past_key_values")
    named = dict(_FORWARD.bind(model, *args, **kwargs).arguments)
    others = named.pop("kwargs", {})
    named |= {name: others.pop(name) for name in _OUTPUTS if name in others}
    named.pop("self")
    return named, others


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
    """Applies all of this to a GPT-J language model, perhaps wrapped by PEFT, before training.

    Returns whether it is one; another model stays as it is.
    """
    if not any(isinstance(module, GPTJForCausalLM) for module in model.modules()):
        return False
    set_attn_implementation(model, "sdpa")
    fuse_gelu(model)
    set_chunked_loss(model)
    return True
