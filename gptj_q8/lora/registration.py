"""Teaches PEFT about 8-bit layers: which of its layers to build over them, and what to refuse.

PEFT looks layers up in a fixed list and offers a registry only for a config at hand, which is not
saved with the adapter. So methods of its are wrapped here, and every way to an adapter
(`get_peft_model`, `PeftModel.from_pretrained`, `AutoPeftModel`, `model.add_adapter`) goes through
them. Importing this module registers; AttributeError for a PEFT without them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import peft
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import other
from torch import nn

from gptj_q8._register import guard
from gptj_q8.lora import refusals
from gptj_q8.lora.layers import Q8LoraEmbedding, Q8LoraLinear
from gptj_q8.models.layers import Quantized
from gptj_q8.nn import Q8Linear


def register() -> None:
    """Wraps PEFT's methods, once. ImportError for a PEFT that is too old."""
    if tuple(map(int, peft.__version__.split(".")[:2])) < (0, 20):
        raise ImportError(f"PEFT 0.20 or newer is needed, this is {peft.__version__}")
    if hasattr(LoraModel._create_new_module, "__wrapped__"):
        return
    LoraModel._create_new_module = staticmethod(_creating(LoraModel._create_new_module))
    for owner, method, check in (
        (BaseTuner, "__init__", refusals.check_name),
        (BaseTuner, "inject_adapter", refusals.check_adapter),
        (LoraModel, "_check_merge_allowed", refusals.check_merge),
        (other.ModulesToSaveWrapper, "__init__", refusals.check_saved_module),
        (peft.PeftModel, "_setup_prompt_encoder", refusals.check_prompt),
    ):
        guard(owner, method, check)
    peft.PeftModel.save_pretrained = _saving(peft.PeftModel.save_pretrained)
    prepare = _preparing(other.prepare_model_for_kbit_training)
    for module in (peft, peft.utils, other):
        module.prepare_model_for_kbit_training = prepare


def _creating(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, Quantized) or lora_config._custom_modules:
            return original(lora_config, adapter_name, target, **kwargs)
        refusals.check_target(base, kwargs)
        layer = Q8LoraLinear if isinstance(base, Q8Linear) else Q8LoraEmbedding
        return layer(target, adapter_name, config=lora_config, **kwargs)

    return create


def _saving(original: Callable[..., None]) -> Callable[..., None]:
    """Keeps 8-bit embeddings out of adapter files.

    PEFT would put the base layer under an adapter on lm_head there (207 MB of GPT-J-6B), and the
    file would fit no model of another block size and no float model.
    """

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> None:
        ends = (
            getattr(self.get_base_model(), method, lambda: None)()
            for method in ("get_input_embeddings", "get_output_embeddings")
        )
        given = len(args) > 2 or "save_embedding_layers" in kwargs
        if not given and any(isinstance(getattr(end, "base_layer", 0), Quantized) for end in ends):
            kwargs["save_embedding_layers"] = False
        original(self, save_directory, *args, **kwargs)

    return save_pretrained


def _preparing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Lets `prepare_model_for_kbit_training` switch checkpointing on, as for methods it knows.

    The mark that it goes by is taken away again: elsewhere it means bitsandbytes.
    """

    @functools.wraps(original)
    def prepare(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(module, Quantized) for module in model.modules()):
            return original(model, *args, **kwargs)
        model.is_loaded_in_8bit = True
        try:
            return original(model, *args, **kwargs)
        finally:
            del model.is_loaded_in_8bit

    return prepare


register()
