"""What PEFT would do wrong with 8-bit layers, refused before anything changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gptj_q8.models.layers import Quantized
from gptj_q8.nn import Q8Embedding

# Of the ways to initialize LoRA, those that leave the base weight as it is.
_INITS = (True, False, "gaussian", "orthogonal", "eva")


def check_name(
    tuner: Any, model: Any, config: Any, adapter_name: str, *args: Any, **_: Any
) -> None:
    """ValueError for an adapter under the name of one that the model was loaded with.

    PEFT would put its weights in the place of those, and keep what only those have.
    """
    own = getattr(model, "_hf_peft_config_loaded", False) and getattr(model, "peft_config", {})
    if own and adapter_name in own and any(_layers(model)):
        raise ValueError(
            f"the model was loaded with an adapter named {adapter_name!r}, which is attached and "
            "trainable; take it off (model.delete_adapter) or give the new one another name"
        )


def check_adapter(tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **_: Any) -> None:
    """ValueError for an adapter that an 8-bit model cannot have."""
    layers = [name for name, _ in _layers(model)]
    config = tuner.peft_config[adapter_name]
    for wanted in getattr(config, "modules_to_save", None) or ():
        # PEFT takes every module whose name ends so, and would train what is float in it.
        for name in (name for name, _ in model.named_modules() if name.endswith(wanted)):
            inside = [layer for layer in layers if f"{layer}.".startswith(f"{name}.")]
            if inside:
                raise ValueError(
                    f"modules_to_save: {inside[0]} is in 8 bits and cannot be trained itself; "
                    "name it in target_modules, or in Q8Config(modules_to_not_convert=...)"
                )
    if layers and config.peft_type == "LORA":
        _check_lora(config)


def check_target(layer: Any, details: dict[str, Any]) -> None:
    """ValueError for an 8-bit layer that LoRA cannot extend."""
    name = details.get("target_name")
    if details.get("parameter_name") is not None:
        raise ValueError(
            f"target_parameters: {name} is in 8 bits and its weight is no Parameter; name the "
            "module in target_modules"
        )
    subclass = isinstance(layer, Q8Embedding) and type(layer) is not Q8Embedding
    if subclass and not hasattr(layer, "embed_scale"):
        raise ValueError(
            f"target_modules: {name} computes its ids itself, so LoRA cannot add to it"
        )


def _check_lora(config: Any) -> None:
    if config.init_lora_weights not in _INITS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights, which are "
            f"in 8 bits and frozen; choose one of {', '.join(map(repr, _INITS))}"
        )
    variants = [
        field.name
        for field in dataclasses.fields(config)
        if field.metadata.get("is_lora_variant") and getattr(config, field.name)
    ]
    for name in variants:
        if name != "use_dora":
            raise ValueError(f"{name}: only plain LoRA and DoRA work with 8-bit layers")


def check_saved_module(wrapper: Any, module: nn.Module, *args: Any, **_: Any) -> None:
    """ValueError for modules_to_save that hold 8-bit layers.

    `check_adapter` is earlier and names more; this is for methods that inject nothing.
    """
    for name, _ in _layers(module):
        raise ValueError(
            f"modules_to_save: {name or 'a module'} is in 8 bits and cannot be trained"
        )


def check_prompt(model: Any, *args: Any, **_: Any) -> None:
    """ValueError for prompt learning, where PEFT looks for a float embedding and finds codes."""
    embedding = getattr(model.base_model, "get_input_embeddings", lambda: None)()
    if isinstance(embedding, Quantized):
        raise ValueError(
            "prompt learning needs a float embedding; quantize with "
            "Q8Config(modules_to_not_convert=[...]) naming it"
        )


def check_merge(tuner: Any) -> None:
    """ValueError for merging NaN or Inf, or into one of several layers that share their codes."""
    holders: dict[int, list[str]] = {}
    for name, module in _layers(tuner.model):
        holders.setdefault(id(module.codes), []).append(name.removesuffix(".base_layer"))
    for name, layer in tuner.model.named_modules():
        if not isinstance(getattr(layer, "base_layer", None), Quantized):
            continue
        tied = holders[id(layer.base_layer.codes)]
        if len(tied) > 1:
            raise ValueError(f"merge: {' and '.join(tied)} share their codes; dequantize first")
        for own, parameter in layer.named_parameters():
            if not own.startswith("base_layer.") and not torch.isfinite(parameter).all():
                raise ValueError(f"merge: {name}.{own} has NaN or Inf values")


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            yield name, module
