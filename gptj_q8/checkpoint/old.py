"""Checkpoints of the hivemind/gpt-j-6B-8bit family: what their headers hold and must hold.

An 8-bit weight stands there as `weight` (uint8), `absmax` and `code` (float32 or float16), in
blocks of 4096; everything else has its usual name. There are causal masks among the tensors, and
adapters where the model was fine-tuned (see `adapters.py`).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from gptj_q8.checkpoint import adapters, naming, stored
from gptj_q8.checkpoint.shards import Entry
from gptj_q8.checks import FLOATS
from gptj_q8.models import LEFTOVERS
from gptj_q8.models.layers import stand_in
from gptj_q8.nn.parts import HIVEMIND_BLOCK_SIZE, HIVEMIND_NAMES

CODEBOOK = "dynamic"
"""The family's map, for config.json; each weight keeps the table that it is stored with."""


def quantized_names(names: Iterable[str]) -> list[str]:
    """Returns the modules whose weights are stored in the old way; none for other checkpoints."""
    there = set(names)
    found = {name.rpartition(".")[0] for name in there if name.endswith((".absmax", ".code"))}
    ours = {name for name in found if {f"{name}.codes", f"{name}.codebook"} & there}
    return sorted(found - ours)


def check(entries: Mapping[str, Entry]) -> None:
    """ValueError unless the parts of every 8-bit weight are there and fit each other.

    TypeError for a part of another dtype. Both name the tensor and its file.
    """
    names = quantized_names(entries)
    where = f"in blocks of {HIVEMIND_BLOCK_SIZE}"
    stored.check_parts(entries, names, HIVEMIND_NAMES, HIVEMIND_BLOCK_SIZE, where, FLOATS)
    for name in names:
        if len((codes := entries[f"{name}.weight"]).shape) != 2:
            raise ValueError(
                f"{codes.file}: {name}.weight must have 2 dimensions, got {list(codes.shape)}"
            )


def renamed(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Returns what today's model takes of a checked checkpoint, under our names and dtypes."""
    kept = {name: entry for name, entry in entries.items() if not is_dropped(name)}
    for name in quantized_names(entries):
        for ours, theirs in HIVEMIND_NAMES.items():
            entry = kept.pop(f"{name}.{theirs}")
            dtype = torch.uint8 if ours == "codes" else torch.float32
            kept[f"{name}.{ours}"] = Entry(dtype, entry.shape, entry.file, f"{name}.{theirs}")
    return kept


def is_dropped(name: str) -> bool:
    """Whether a tensor is a causal mask, its fill value, or part of an adapter."""
    return adapters.is_part(name) or is_leftover(name)


def is_leftover(name: str) -> bool:
    """Whether a tensor is a causal mask or its fill value."""
    return any(re.search(pattern, name) for pattern in LEFTOVERS)


def check_model(
    entries: Mapping[str, Entry], model: Any, shells: type[nn.Module] | None = None
) -> None:
    """ValueError unless the checkpoint is one of this model.

    entries: as stored. model: a Transformers model without data; what of it is neither there nor
    in the body, such as another head, is for Transformers to make. shells: the class of the
    model's modules that hold 8 bits or nothing, so that all of them must be there.
    """

    def is_layer(module: nn.Module) -> bool:
        return isinstance(module, shells) if shells else stand_in(type(module)) is not None

    prefix = model.base_model_prefix
    modules = dict(model.named_modules())
    quantized = set(quantized_names(entries))
    for name in sorted(quantized):
        own_name = naming.module_name(name, prefix, modules)
        is_head = own_name is None and not name.startswith(f"{prefix}.")
        if not is_head and (own_name is None or not is_layer(modules[own_name])):
            raise ValueError(
                f"{entries[f'{name}.weight'].file}: holds 8-bit {name}.weight, which "
                f"{type(model).__name__} has no place for"
            )
    in_model = f"{prefix}." if hasattr(model, prefix) else ""
    known = naming.model_names(model, entries)
    for name, module in modules.items():
        if not is_layer(module):
            continue
        base = naming.base_name(name, prefix, "weight", known)
        if base in quantized:
            stored.check_shape(entries, f"{base}.weight", module.weight.shape)
        elif shells or (base is None and name.startswith(in_model)):
            file = entries[f"{base}.weight"].file if base else next(iter(entries.values())).file
            raise ValueError(
                f"{file}: lacks {'8-bit ' if shells else ''}{name}.weight, "
                f"which {type(model).__name__} needs"
            )
