"""add_lora: LoRA with sensible defaults."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from gptj_q8.models import RULES

# Modules that PEFT's LoRA can extend.
_WITH_MATRIX = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention, Conv1D)
ALL = "all"
"""As a target: every matrix of every block, but neither embedding nor output head."""


def add_lora(
    model: nn.Module,
    r: int = 16,
    alpha: float = 32,
    targets: str | Iterable[str] = ALL,
    *,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    adapter_name: str = "default",
    **options: Any,
) -> PeftModel:
    """Freezes `model` and adds a trainable low-rank adapter to its matrices, in place, by PEFT.

    Each target's weight becomes W + alpha / r * B A, with A [r, inputs] random and B [outputs, r]
    zero at first (Hu et al., arXiv 2106.09685).

    model: Transformers' or any other; given a PeftModel, adds one more adapter, not yet active.
    r, alpha: rank and weight of the adapter.
    targets: "all" (the matrices of each block), or names of modules as their last components, such
        as ["all", "lm_head", "wte"].
    dropout: of the adapter's input. rslora: weighs by alpha / sqrt(r) instead. dora: the norms of
        W + alpha / r * B A train apart from its directions.
    options: PEFT's for `LoraConfig`. Unless they say otherwise the adapter's weights are float32.

    Returns the PeftModel to train; save it with its `save_pretrained`, load it with
    `PeftModel.from_pretrained`. ValueError, before anything changes, for r, alpha or dropout out of
    range, for a target that matches no module or one without a matrix, and for an adapter_name that
    is taken.
    """
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"add_lora: r must be a positive whole number, got {r!r}")
    if not alpha > 0:
        raise ValueError(f"add_lora: alpha must be positive, got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"add_lora: dropout must be at least 0 and below 1, got {dropout}")
    taken = isinstance(model, PeftModel) and adapter_name in model.peft_config
    if taken:
        raise ValueError(f"add_lora: the model has an adapter named {adapter_name!r} already")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    can_generate = getattr(base, "can_generate", lambda: False)()
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=_target_modules(base, targets),
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        **{"task_type": "CAUSAL_LM" if can_generate else None, **options},
    )
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        return model
    return get_peft_model(model, config, adapter_name=adapter_name)


def _target_modules(model: nn.Module, targets: str | Iterable[str]) -> list[str] | str:
    """Returns what PEFT takes as target_modules."""
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise ValueError("add_lora: targets is empty")
    rule = RULES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if ALL in wanted:
        if rule is None and wanted == [ALL]:
            return "all-linear"  # PEFT knows the output heads of many families
        if rule is None:
            raise ValueError(
                'add_lora: "all" together with other targets needs a family whose matrices are '
                f"known ({', '.join(RULES)}); name all targets instead"
            )
        matrices = [name.rpartition(".")[2] for name in rule.matrices]
        wanted = [*matrices, *(name for name in wanted if name != ALL)]
    layers = [
        (f".{name}", module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
        for name, module in model.named_modules()
    ]
    for target in wanted:
        named = [module for name, module in layers if name.endswith(f".{target}")]
        if not named:
            raise ValueError(f"add_lora: targets: the model has no module named {target!r}")
        for module in named:
            if not isinstance(module, _WITH_MATRIX):  # PEFT finds out with some layers replaced
                raise ValueError(
                    f"add_lora: targets: {target!r} is a {type(module).__name__} and has no matrix "
                    "to adapt; name linear layers or embeddings"
                )
    return wanted
