"""merge: writes a model with an adapter merged into its weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from gptj_q8 import checks, ops
from gptj_q8.checkpoint import adapters, card
from gptj_q8.checkpoint.directory import new_directory
from gptj_q8.checkpoint.shards import Entry, Writer, parse_size, plan
from gptj_q8.checkpoint.source import copy_companions, local_directory
from gptj_q8.checkpoint.stored import PARTS
from gptj_q8.convert import quantize_
from gptj_q8.lora import refusals
from gptj_q8.lora.layers import MERGED_CODEBOOK, RequantizingLayer
from gptj_q8.models.layers import Quantized
from gptj_q8.pretrained import load_as_stored


def merge(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Writes to `output` the model with the adapter's changes in its own weights, tokenizer too.

    model: a folder or Hub id, in 8 bits or float. adapter: a folder or Hub id, in PEFT's format.
    dtype: None writes an 8-bit model: each changed weight is encoded anew, with a codebook fitted
        to it (0.6 % error at block 256); a float model takes `Q8Config()`. A float dtype writes a
        float model, each 8-bit weight rounded once.
    max_shard_size: of a weight file, in bytes or as "5GB". overwrite: replaces a model in `output`,
        but not a card that a person wrote.

    From 8 bits each sum is taken in float32 and rounded once; a float model is summed in its dtype.
    Memory holds the model, in 8 bits if it came so, and one decoded weight.
    `output` comes to be when everything is written; after any failure it is as it was.
    FileExistsError as in `convert_checkpoint`; ValueError for an adapter that does not fit the
    model, lacks tensors or has NaN, and for a model with adapters of its own.
    """
    if dtype is not None:
        checks.float_dtype("merge", dtype)
    shard_bytes = parse_size(max_shard_size)
    target = Path(output).expanduser().resolve()
    sources = [Path(path).resolve() for path in (model, adapter) if Path(path).is_dir()]
    if target in sources:
        raise FileExistsError(f"{target} is what is to be merged; choose another place")
    if Path(adapter).is_dir():
        adapters.read_config(Path(adapter))
    kept_card = card.is_by_a_person(target)
    with new_directory(target, overwrite, [] if kept_card else [card.FILE]) as folder:
        source = local_directory(os.fspath(model))
        base = load_as_stored(os.fspath(source), dtype="auto" if dtype is None else dtype)
        stored_dtype = base.dtype
        quantized = any(isinstance(module, Quantized) for module in base.modules())
        if quantized:  # else trained norms and biases would be rounded on their way in
            base = base.to(torch.float32)
        tuned = _with_adapter(base, os.fspath(adapter))
        refusals.check_merge(tuned.base_model)
        if quantized and dtype is not None:
            _write_float(tuned, dtype, folder, shard_bytes)
        else:
            merged = tuned.merge_and_unload(safe_merge=True)
            if dtype is None and not quantized:
                merged = quantize_(merged)
            merged.to(dtype or stored_dtype)
            if dtype is None:
                # Of the weights that changed; the others keep their tables.
                merged.config.quantization_config.codebook = MERGED_CODEBOOK
            merged.name_or_path = ""  # its card shall not call it a copy of the model before
            merged.save_pretrained(folder, max_shard_size=max_shard_size)
            if kept_card:
                (folder / card.FILE).unlink(missing_ok=True)
        copy_companions(source, folder)


def _with_adapter(base: Any, adapter: str) -> PeftModel:
    """Attaches the adapter. ValueError if it and the model do not fit each other exactly."""
    if getattr(base, "peft_config", None):
        raise ValueError("merge: the model has adapters of its own; merge or unload them first")
    try:
        model = PeftModel.from_pretrained(base, adapter)
    except RuntimeError as error:
        raise ValueError(f"merge: {adapter} does not fit the model: {error}") from error
    # PEFT only warns of these.
    stored = set(load_peft_weights(adapter, device="cpu"))
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if missing := sorted(wanted - stored):
        raise ValueError(f"merge: {adapter} lacks {len(missing)} tensors, such as {missing[0]}")
    surplus = sorted(name for name in stored - wanted if ".base_layer." not in name)
    if surplus:
        raise ValueError(
            f"merge: {adapter} holds {len(surplus)} tensors that the model has no place for, "
            f"such as {surplus[0]}"
        )
    return model


def _write_float(model: PeftModel, dtype: torch.dtype, folder: Path, shard_bytes: int) -> None:
    """Writes the merged float model tensor by tensor, never holding it."""
    base = model.get_base_model()
    # Of tied weights the second is not stored.
    tied = {f"{name.removesuffix('.codes')}.weight" for name in base.all_tied_weights_keys}
    tensors = {made.name: made for made in _tensors(base, "", dtype) if made.name not in tied}
    entries = {name: Entry(made.dtype, tuple(made.shape), "") for name, made in tensors.items()}
    writer = Writer(folder, entries, plan(entries, shard_bytes), {})
    with torch.no_grad():
        for name, made in tensors.items():
            writer.write(name, made.make().detach().to("cpu", made.dtype))
    writer.close()
    config = copy.deepcopy(base.config)
    del config.quantization_config
    config.dtype = dtype
    config.save_pretrained(folder)


class _Made(NamedTuple):
    """A tensor of the merged model, named as in its state dict, that `make` gives."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    make: Callable[[], Tensor]


def _tensors(module: Any, prefix: str, dtype: torch.dtype) -> Iterator[_Made]:
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.unload_and_optionally_merge_module(False, False, None)
    layer = None
    if isinstance(module, RequantizingLayer) and isinstance(module.get_base_layer(), Quantized):
        layer, module = module, module.get_base_layer()
    elif isinstance(module, BaseTunerLayer):
        module.merge(safe_merge=True)
        module = module.get_base_layer()
    own = {**module._parameters, **module._buffers}
    if isinstance(module, Quantized):
        for part in PARTS:
            del own[part]
        active = layer.active_here() if layer else []
        shape = torch.empty(module.codes.shape, device="meta")
        yield _Made(
            f"{prefix}weight", dtype, module.turn(shape).shape, partial(_weight, module, layer)
        )
        if layer and (bias := layer.merged_bias(active)) is not None:
            own["bias"] = bias
    for name, tensor in own.items():
        if tensor is not None and name not in module._non_persistent_buffers_set:
            kept = dtype if tensor.is_floating_point() else tensor.dtype
            yield _Made(f"{prefix}{name}", kept, tensor.shape, partial(_same, tensor))
    for name, child in module._modules.items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.", dtype)


def _weight(module: Any, layer: RequantizingLayer | None) -> Tensor:
    """The decoded weight with the active adapters in it, in the float module's layout."""
    if layer is not None:
        weight = layer.merged_weight(layer.active_here())
    else:
        weight = ops.dequantize(
            module.codes, module.absmax, module.codebook, module.block_size, torch.float32
        )
    turned: Tensor = module.turn(weight)
    return turned


def _same(tensor: Tensor) -> Tensor:
    return tensor
