"""prepare_for_finetuning: everything that must be set before a training loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, _set_trainable
from torch import nn

from gptj_q8.lora.allocator import return_large_blocks
from gptj_q8.memory import estimate_loaded, knows
from gptj_q8.models.gptj_modules import save_memory
from gptj_q8.models.layers import Quantized
from gptj_q8.nn.norm import Float32LayerNorm


def prepare_for_finetuning(
    model: Any, train_1d: bool = False, *, checkpointing: bool = True, verbose: bool = True
) -> Any:
    """Sets a Transformers model up for training, in place, and returns it.

    Train mode; gradients from the embedding's output on; non-reentrant checkpointing, which keeps
    one activation a block and recomputes the rest (not without `checkpointing`: faster where memory
    is plenty); all frozen but the active adapter. With
    `train_1d` the norms and biases train too, in float32 (other norms than LayerNorm in their own
    dtype); a PeftModel saves and loads them with its adapter, as modules_to_save and bias="all".
    Prints what trains, and of a GPT-J what a step on a full context takes of memory, unless not
    `verbose`.

    A GPT-J also gets what `gptj_q8.save_memory` does: attention through PyTorch's
    `scaled_dot_product_attention`, and a loss in chunks, beside which there are no `logits`.

    On a CPU under glibc, memory of large tensors goes back to the system when they are freed
    (`gptj_q8.lora.allocator`), for the whole process.

    In distributed training (DDP) the scales of 8-bit layers then stay out of the broadcast of
    buffers before each forward; the ranks must have loaded the same model.

    TypeError for a model without checkpointing. ValueError if nothing would train, and for
    `train_1d` with adapters other than one PeftModel's active one. Nothing has changed then.
    """
    tuned = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    is_peft = isinstance(model, PeftModel)
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise TypeError(
            f"prepare_for_finetuning: {type(model).__name__} has no gradient_checkpointing_enable, "
            "so it is no Transformers model"
        )
    if not (is_peft or tuned or train_1d):
        raise ValueError(
            "prepare_for_finetuning: nothing would train; add an adapter (gptj_q8.add_lora), or "
            "set train_1d=True"
        )
    if train_1d and (is_peft or tuned):
        _check_one_adapter(model)

    if is_peft and isinstance(model.base_model, BaseTuner):
        model.base_model.set_adapter(model.active_adapters)  # loaded for inference it is frozen
    elif tuned and not is_peft:
        model.set_adapter(model.active_adapters())
    elif not is_peft:
        model.requires_grad_(False)
    if train_1d:
        _train_1d(model)
    save_memory(model)
    if any(parameter.device.type == "cpu" for parameter in model.parameters()):
        return_large_blocks()
    if not getattr(_base(model), "_require_grads_hooks", None):
        model.enable_input_require_grads()
    if checkpointing:
        _enable_checkpointing(model)
    model._ddp_params_and_buffers_to_ignore = [
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, Quantized)
        for part in ("absmax", "codebook")
    ]
    model.train()
    if verbose:
        print(summary(model))
    return model


def summary(model: Any, tokens: int | None = None, batch: int = 1) -> str:
    """Says in a few lines what of `model` trains and what it costs.

    Of a GPT-J also what a step on `batch` sequences of `tokens` takes (None: its whole context).
    """
    kinds: dict[tuple[str, torch.dtype], int] = {}
    frozen = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            adapter = any(part.startswith("lora_") for part in name.split("."))
            kind = "adapter" if adapter else "norm or bias" if parameter.dim() == 1 else "other"
            key = (kind, parameter.dtype)
            kinds[key] = kinds.get(key, 0) + parameter.numel()
        else:
            frozen += parameter.numel()
    total = sum(kinds.values())
    lines = [f"{total:,} parameters train, {frozen:,} are frozen:"]
    for (kind, dtype), count in sorted(kinds.items(), key=lambda item: -item[1]):
        note = ""
        if dtype.itemsize < 4:
            note = "; small steps on these are lost in rounding"
        lines.append(f"  {kind}: {count:,} in {str(dtype).removeprefix('torch.')}{note}")
    gradients = sum(count * dtype.itemsize for (_, dtype), count in kinds.items())
    lines.append(
        f"  gradients take {gradients / 1e6:.1f} MB, Adam's state in 8 bits about "
        f"{total * (2 + 8 / 256) / 1e6:.1f} MB"
    )
    if knows(model.config):
        tokens = tokens or model.config.n_positions
        again = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        total = estimate_loaded(model, tokens, batch, checkpointing=again).total
        lines.append(
            f"  a step on {batch} x {tokens} tokens takes about {total / 1e9:.2f} GB in all, "
            f"{'keeping one activation a block' if again else 'keeping all activations'}"
        )
    return "\n".join(lines)


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_one_adapter(model: Any) -> None:
    if not isinstance(model, PeftModel):
        raise ValueError("prepare_for_finetuning: for train_1d add the adapter with add_lora")
    if len(model.active_adapters) != 1 or not isinstance(model.base_model, BaseTuner):
        raise ValueError(
            "prepare_for_finetuning: train_1d needs one active adapter to be saved with, active: "
            f"{', '.join(model.active_adapters) or 'none'}"
        )


def _enable_checkpointing(model: Any) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # Transformers 5.23
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _train_1d(model: Any) -> None:
    base = _base(model)
    norms = [name for name, _ in _norms(base)]
    if isinstance(model, PeftModel):
        (adapter,) = model.active_adapters
        config = model.peft_config[adapter]
        config.bias = "all"
        config.modules_to_save = [*(config.modules_to_save or []), *norms]
        _set_trainable(base, adapter, module_names=norms, inference_mode=False)
        norms = [  # those that were saved with the adapter and have come with it, too
            f"{name}.modules_to_save.{adapter}"
            for name, module in base.named_modules()
            if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
        ]
    for name in norms:
        norm = base.get_submodule(name)
        norm.requires_grad_(True)
        if type(norm) is nn.LayerNorm and norm.weight.dtype != torch.float32:
            base.set_submodule(name, Float32LayerNorm.like(norm))
    for name, module in base.named_modules():
        if not isinstance(module, nn.Linear) or module.bias is None or "lora_" in name:
            continue
        if isinstance(module, Quantized):
            module.bias.data = module.bias.data.float()  # the op takes any dtype
        module.bias.requires_grad_(True)


def _norms(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules whose own parameters are all 1-D, outside of adapters, and that are no linear."""
    for name, child in model.named_children():
        if isinstance(child, BaseTunerLayer | AuxiliaryTrainingWrapper | nn.Linear):
            continue
        own = list(child.parameters(recurse=False))
        if own and all(parameter.dim() == 1 for parameter in own):
            yield f"{prefix}{name}", child
        yield from _norms(child, f"{prefix}{name}.")
