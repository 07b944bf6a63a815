"""Quantizes and dequantizes a model's layers in place."""

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from gptj_q8 import checks
from gptj_q8.config import Q8Config
from gptj_q8.models.layers import Quantized, stand_in
from gptj_q8.nn.frozen import FrozenWeight

logger = logging.getLogger(__name__)

_NOTHING_TIED: Mapping[str, str] = MappingProxyType({})


def quantize_(model: nn.Module, config: Q8Config | None = None) -> nn.Module:
    """Quantizes every nn.Linear and nn.Embedding of `model` in place, and returns it.

    Of their subclasses and other modules, those that `gptj_q8.models.layers` knows; a warning names
    other matrices that stay in float. Modules that share a weight share its codes. A Transformers
    model saves and loads as an 8-bit one from then on.

    ValueError for NaN or Inf (naming each tensor, with counts), for weights without data (meta
    device), for a model with adapters, for an embedding with max_norm, for a module whose forward
    was replaced, for an entry of modules_to_not_convert that matches no module, for 8-bit layers of
    another block_size or of the old API, and when nothing is left to quantize; TypeError for dtypes
    other than float32, bfloat16 and float16. All are found before anything changes.
    """
    config = config or Q8Config()
    if getattr(model, "peft_config", None):
        # They are layers too, and would be frozen in 8 bits.
        raise ValueError("quantize_: the model has adapters; quantize it before they are added")
    check_exemptions("quantize_", model, config)
    for name, module in model.named_modules():
        if isinstance(module, FrozenWeight):  # its adapter has matrices
            raise ValueError(
                f"quantize_: {name} is in 8 bits, as a {type(module).__name__}; load the model "
                "with gptj_q8.from_pretrained to have it in modules of today"
            )
        if isinstance(module, Quantized) and module.block_size != config.block_size:
            raise ValueError(
                f"quantize_: {name} has block_size {module.block_size} already, and a model has "
                f"one; got {config.block_size}"
            )
    if type(model) in (nn.Linear, nn.Embedding):
        kind = type(model).__name__
        raise ValueError(
            f"quantize_: a bare nn.{kind} cannot be replaced in place, use Q8{kind}.from_float"
        )
    groups = targets(model, config)
    if not groups:
        raise ValueError("quantize_: the model has no nn.Linear or nn.Embedding left to quantize")
    for names in groups:
        module = model.get_submodule(names[0])
        check_convertible("quantize_", names[0], module)
        _check_in_memory(names[0], module)
    refuse_not_finite(
        {f"{names[0]}.weight": model.get_parameter(f"{names[0]}.weight") for names in groups}
    )
    warn_of_float(model, groups, config)
    for names in groups:
        swap(model, names, config)
    _tell_transformers(model, config)
    return model


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turns every 8-bit layer of `model` back into a float one in place; returns it.

    dtype: of the new layers; None takes each layer's own. A Transformers model is an ordinary one
    from then on, all of it in `dtype`.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if isinstance(getattr(quantizer, "quantization_config", None), Q8Config):
        quantizer.dequantize(model, dtype)
        return model
    return decode_layers(model, dtype)


def decode_layers(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Does what `dequantize_` does to the layers, and leaves the rest of the model alone."""
    shared: dict[int, nn.Parameter] = {}
    made: dict[int, nn.Module] = {}
    layers = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Quantized)
    ]
    for name, layer in layers:
        if id(layer) not in made:
            # The same codes mean a tied weight.
            weight = shared.get(id(layer.codes))
            if weight is None:
                weight = nn.Parameter(layer.turn(layer.dequantize()).to(dtype or layer.dtype))
                shared[id(layer.codes)] = weight
            made[id(layer)] = layer.to_float(weight).to(dtype=dtype)
        model.set_submodule(name, made[id(layer)])
    return model


def targets(
    model: nn.Module, config: Q8Config, tied: Mapping[str, str] = _NOTHING_TIED
) -> list[list[str]]:
    """Returns the names of the modules to quantize; those that share a weight stand in one list.

    tied: parameter names that will share the weight of another once loaded, as Transformers'
    `all_tied_weights_keys` has them; weights that are one object already need no mention.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    holders: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        weight = parameters.get(tied.get(name, name), parameter)
        holders.setdefault(id(weight), []).append(name)
    groups = []
    for names in holders.values():
        wanted = [name for name in names if _is_target(model, name, config)]
        if wanted and len(wanted) < len(names):
            others = ", ".join(sorted(set(names) - set(wanted)))
            logger.warning("%s stays as it is, for it shares its weight with %s", wanted[0], others)
        elif wanted:
            groups.append([name.removesuffix(".weight") for name in wanted])
    return groups


def _is_target(model: nn.Module, parameter_name: str, config: Q8Config) -> bool:
    module_name, _, own_name = parameter_name.rpartition(".")
    if own_name != "weight" or not module_name or exempt(module_name, config):
        return False
    return stand_in(type(model.get_submodule(module_name))) is not None


def left_in_float(model: nn.Module, groups: Iterable[Iterable[str]]) -> list[str]:
    """Returns the modules that hold a matrix (two or more dimensions) and are in none of `groups`.

    Such as an exempt nn.Linear, or the experts of a mixture, three-dimensional parameters.
    """
    taken = {name for names in groups for name in names}
    return [
        name
        for name, module in model.named_modules()
        if name not in taken
        and any(
            parameter.is_floating_point() and parameter.dim() > 1
            for parameter in module.parameters(recurse=False)
        )
    ]


def warn_of_float(model: nn.Module, groups: Sequence[Sequence[str]], config: Q8Config) -> None:
    """Warns of matrices that stay in float though `config` does not say so."""
    names = [name for name in left_in_float(model, groups) if not exempt(name, config)]
    if names:
        sizes = [p.numel() for n in names for p in model.get_submodule(n).parameters(recurse=False)]
        logger.warning(
            "%d modules of kinds that gptj_q8 does not know stay in float, "
            "with %.2g parameters: %s%s",
            len(names),
            sum(sizes),
            ", ".join(names[:3]),
            ", ..." if len(names) > 3 else "",
        )


def exempt(name: str, config: Q8Config) -> bool:
    """Whether `modules_to_not_convert` names this module: an entry is whole components of it."""
    return any(f".{entry}." in f".{name}." for entry in config.modules_to_not_convert or ())


def unmatched_exemptions(model: nn.Module, config: Q8Config) -> list[str]:
    """Returns the entries of `modules_to_not_convert` that name no module of `model`."""
    names = [f".{name}." for name, _ in model.named_modules()]
    entries = config.modules_to_not_convert or ()
    return [entry for entry in entries if not any(f".{entry}." in name for name in names)]


def check_exemptions(who: str, model: nn.Module, config: Q8Config) -> None:
    """ValueError for entries of `modules_to_not_convert` that name no module of `model`."""
    if unmatched := unmatched_exemptions(model, config):
        raise ValueError(f"{who}: modules_to_not_convert matches no module: {', '.join(unmatched)}")


def check_convertible(who: str, name: str, module: nn.Module) -> None:
    """TypeError for a weight's dtype, ValueError for max_norm, that 8-bit layers cannot have."""
    assert isinstance(module.weight, torch.Tensor)
    checks.float_dtype(who, module.weight.dtype, f"{name}.weight")
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(
            f"{who}: {name} has max_norm, which changes its weight; "
            "name it in modules_to_not_convert"
        )


def _check_in_memory(name: str, module: nn.Module) -> None:
    assert isinstance(module.weight, torch.Tensor)
    if module.weight.is_meta:
        raise ValueError(
            f"quantize_: {name}.weight has no data (meta device); load the model first"
        )
    if "forward" in vars(module):
        # accelerate does this to move data between devices.
        raise ValueError(
            f"quantize_: {name} has had its forward replaced; quantize the model before that, "
            "or while loading: from_pretrained(quantization_config=Q8Config())"
        )


def refuse_not_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """ValueError that names every weight with NaN or Inf in it and counts them."""
    bad = {name: checks.count_not_finite(weight.detach()) for name, weight in weights.items()}
    found = [f"{name} has {count} NaN or Inf values" for name, count in bad.items() if count]
    if found:
        raise ValueError("; ".join(found))


def swap(model: nn.Module, names: Iterable[str], config: Q8Config) -> Quantized:
    """Puts 8-bit modules in the place of float ones that share one weight; returns the first."""
    first: Quantized | None = None
    made: dict[int, Quantized] = {}
    old = {name: model.get_submodule(name) for name in names}
    for name, module in old.items():
        if first is None:
            first = made[id(module)] = from_float(module, config)
        elif id(module) not in made:
            made[id(module)] = sharing(module, first)
        model.set_submodule(name, made[id(module)])
    assert first is not None
    return first


def from_float(module: nn.Module, config: Q8Config) -> Quantized:
    """Returns the 8-bit module with the values of `module`."""
    return stand_in_of(module).from_float(module, config.codebook, config.block_size)


def shell(module: nn.Module, block_size: int) -> Quantized:
    """Returns an empty 8-bit module for `module`, on the meta device (see `like`)."""
    return stand_in_of(module).like(module, block_size)


def stand_in_of(module: nn.Module) -> type[Quantized]:
    """Returns the 8-bit class for `module`, which is a target."""
    found = stand_in(type(module))
    assert found is not None
    return found


def sharing(module: nn.Module, other: Quantized) -> Quantized:
    """Returns `module` in 8 bits with the codes, absmax and codebook of `other`, not copies."""
    twin = shell(module, other.block_size)
    twin.tie(other)
    return twin


def _tell_transformers(model: nn.Module, config: Q8Config) -> None:
    """Lets a Transformers model know that it is quantized, so that it saves and loads as one."""
    if "transformers.modeling_utils" not in sys.modules:
        return
    from transformers import PreTrainedModel
    from transformers.quantizers.auto import AutoHfQuantizer

    if isinstance(model, PreTrainedModel):
        # Through Transformers' own table, for gptj_q8.hf stands above this module.
        AutoHfQuantizer.from_config(config, pre_quantized=True).attach(model)
