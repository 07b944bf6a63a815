"""The API that came with hivemind/gpt-j-6B-8bit, on today's Transformers and our kernels.

Every user of that model had a copy of it, so names, signatures, attributes and state dicts are as
they were: what is saved here is in the old layout, which `gptj_q8.from_pretrained` and `gptj-q8
convert` read. Mended are what the copies were known for: adapters come back with a state dict or
checkpoint that holds them, `.half()` leaves scales alone, checkpointing works in evaluation mode.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.gptj import modeling_gptj

from gptj_q8 import convert
from gptj_q8.checkpoint import adapters, naming, old, stored
from gptj_q8.checkpoint.source import faults_named, refuse_unsafe
from gptj_q8.models import LEFTOVERS
from gptj_q8.nn.frozen import (
    ADAPTER_DROPOUT,
    DequantizeAndLinear,
    FrozenBNBEmbedding,
    FrozenBNBLinear,
    FrozenWeight,
    check_values,
    quantize_blockise_lowmemory,
)
from gptj_q8.nn.parts import HIVEMIND_BLOCK_SIZE

__all__ = [
    "DequantizeAndLinear",
    "FrozenBNBEmbedding",
    "FrozenBNBLinear",
    "GPTJBlock",
    "GPTJForCausalLM",
    "GPTJModel",
    "add_adapters",
    "bnbfy_",
    "convert_to_int8",
    "quantize_blockise_lowmemory",
]


def convert_to_int8(model: nn.Module) -> None:
    """Replaces every nn.Linear and nn.Embedding inside `model` by an empty shell to load into.

    Subclasses of the two, which may compute something else, stay as they are.
    """
    _replace(model, _shell)


def bnbfy_(model: nn.Module, adapter_dim: int = 0) -> None:
    """Quantizes every nn.Linear and nn.Embedding inside `model` in place; subclasses stay.

    adapter_dim: rank of the adapters that each of them gets; 0 for none. ValueError for NaN, Inf
    and max_norm, TypeError for float64; they name the weights, and nothing is changed.
    """
    found = dict(_replaceable(model))
    for name, module in found.items():
        convert.check_convertible("bnbfy_", name, module)
    convert.refuse_not_finite({f"{name}.weight": module.weight for name, module in found.items()})

    def quantized(module: nn.Module) -> FrozenWeight:
        made: FrozenWeight
        if isinstance(module, nn.Linear):
            made = FrozenBNBLinear.from_linear(module)
        else:
            assert isinstance(module, nn.Embedding)
            made = FrozenBNBEmbedding.from_embedding(module)
        if adapter_dim:
            made.add_adapter(adapter_dim)
        return made

    _replace(model, quantized)


def add_adapters(model: nn.Module, adapter_dim: int = 16, p: float = 0.0) -> None:
    """Gives every FrozenBNB module of `model` a new adapter, on its device and in float32.

    adapter_dim: its rank. p: of the dropout between its two parts, 0 for none (some copies of the
        old code had 4 and 0.1).

    It changes nothing until it is trained. ValueError for a rank below 1, and for a model without
    FrozenBNB modules.
    """
    if adapter_dim <= 0:
        raise ValueError(f"add_adapters: adapter_dim must be positive, got {adapter_dim}")
    modules = [module for module in model.modules() if isinstance(module, FrozenWeight)]
    if not modules:
        raise ValueError(
            "add_adapters: the model has no FrozenBNB modules; 8-bit ones of today are for PEFT"
        )
    for module in modules:
        module.add_adapter(adapter_dim, p)


def _shell(module: nn.Module) -> FrozenWeight:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    blocks, device = -(-weight.numel() // HIVEMIND_BLOCK_SIZE), weight.device
    parts = (
        torch.zeros(weight.shape, dtype=torch.uint8, device=device),
        torch.zeros(blocks, dtype=torch.float32, device=device),
        torch.zeros(256, dtype=torch.float32, device=device),
    )
    made: FrozenWeight
    if isinstance(module, nn.Linear):
        made = FrozenBNBLinear(*parts, module.bias)
    else:
        made = FrozenBNBEmbedding(*parts, dtype=weight.dtype)
    return made.train(module.training)


def _replaceable(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of what there is to replace; parts of adapters are not."""
    modules = list(model.named_modules(remove_duplicate=False))
    frozen = tuple(f"{name}." for name, module in modules if isinstance(module, FrozenWeight))
    for name, module in modules:
        if type(module) in (nn.Linear, nn.Embedding) and name and not name.startswith(frozen):
            yield name, module


def _replace(model: nn.Module, made_of: Callable[[nn.Module], FrozenWeight]) -> None:
    for name, module in list(_replaceable(model)):
        model.set_submodule(name, made_of(module))


class GPTJBlock(modeling_gptj.GPTJBlock):
    """Takes the place of Transformers' block, as `modeling_gptj.GPTJBlock = GPTJBlock`.

    Built with data it is 8-bit at once, so that a model never is in floats as a whole. Without (on
    the meta device, as when loading) that is left to the model around it, which may be another's.
    """

    training: bool

    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        """Takes what Transformers' block takes."""
        super().__init__(config, layer_idx)
        if not self.ln_1.weight.is_meta:
            convert_to_int8(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.gradient_checkpointing or self.training or not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        # Transformers checkpoints in training mode only, and from_pretrained gives models in
        # evaluation mode, which most copies of the old code left on: set this flag, not the parts'.
        self.training = True
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.training = False


class _InOldLayout(nn.Module):
    """How the models below are built and loaded; mixed in before Transformers' class."""

    _keys_to_ignore_on_load_unexpected: ClassVar = list(LEFTOVERS)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        with _own_blocks():
            super().__init__(config, *args, **kwargs)
        convert_to_int8(self)
        self.register_load_state_dict_pre_hook(_drop_leftovers)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As Transformers'; reads checkpoints in the old layout, and no other."""
        refuse_unsafe(kwargs)
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                f"{cls.__name__}.from_pretrained: takes 8 bits as they are stored, so there is "
                "nothing to configure; quantization_config is for gptj_q8.from_pretrained"
            )
        with faults_named(pretrained_model_name_or_path):
            return super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *args, **kwargs
            )

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Sequence[str] | None, *rest: Any, **kw: Any
    ) -> Any:
        """Does what Transformers does, after a look at what there is to load."""
        if state_dict is None:
            entries = stored.entries(checkpoint_files or ())
        else:
            entries = stored.in_memory(state_dict)
        if not old.quantized_names(entries):
            file = next((entry.file for entry in entries.values()), "the checkpoint")
            raise ValueError(
                f"{file}: holds no 8-bit weights as the old code has them; other models are for "
                "gptj_q8.from_pretrained"
            )
        old.check(entries)
        old.check_model(entries, model, FrozenWeight)
        found = adapters.find(entries, model)
        for adapter in found:
            has_dropout = adapter.second.endswith(".2.weight")
            module = model.get_submodule(adapter.module)
            module.add_adapter(adapter.rank, ADAPTER_DROPOUT if has_dropout else 0.0)
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, *rest, **kw
        )
        known = {name: name for name in entries}
        for name, module in model.named_modules():
            if isinstance(module, FrozenWeight):
                base = naming.base_name(name, model.base_model_prefix, "absmax", known)
                where = f"{entries[f'{base}.absmax'].file}: {base}"
                check_values(where, module.weight, module.absmax, module.code)
                module.code = module.code.clone()  # one table may serve all modules of a pickle
        for adapter in found:
            parts = model.get_submodule(adapter.module).adapter
            for part, tensor in ((adapter.first, parts[0]), (adapter.second, parts[-1])):
                adapters.refuse_not_finite(entries[part], part, tensor.weight)
        return loaded


@contextmanager
def _own_blocks() -> Iterator[None]:
    before = modeling_gptj.GPTJBlock
    modeling_gptj.GPTJBlock = GPTJBlock
    try:
        yield
    finally:
        modeling_gptj.GPTJBlock = before


def _drop_leftovers(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix) and old.is_leftover(name)]:
        del state_dict[name]


class GPTJModel(_InOldLayout, modeling_gptj.GPTJModel):
    """Transformers' GPTJModel of FrozenBNB modules."""


class GPTJForCausalLM(_InOldLayout, modeling_gptj.GPTJForCausalLM):
    """Transformers' GPTJForCausalLM of FrozenBNB modules."""
