"""Adapters on tiny 8-bit models, for the tests of LoRA."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import IDS, relative
from torch import nn

SIX = ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]
EVERYTHING = [*SIX, "lm_head", "wte"]
EXACT = 1e-6  # float32 sums in another order


def lora(**options: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": EVERYTHING, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **options})


def attach(model: nn.Module, config: Any, name: str = "default") -> PeftModel:
    """PEFT's own function, on a copy, then every trained tensor moved so that it matters."""
    torch.manual_seed(0)
    made = get_peft_model(copy.deepcopy(model), config, adapter_name=name)
    scramble(made)
    return made


def scramble(model: nn.Module, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, dtype=parameter.dtype)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_trains_alike(a: PeftModel, b: PeftModel) -> None:
    """The same loss and gradients, on a model that the adapter has moved far."""
    losses = [model(IDS, labels=IDS).loss for model in (a, b)]
    for loss in losses:
        loss.backward()
    assert relative(*losses) < EXACT
    right = trained(b)
    assert trained(a).keys() == right.keys()
    for name, parameter in trained(a).items():
        if right[name].grad is None:
            assert parameter.grad is None
        else:
            assert relative(parameter.grad, right[name].grad) < 1e-5, name
