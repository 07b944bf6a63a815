"""The adapters in checkpoints of the hivemind family, and what they are to PEFT.

A module's adapter is a Sequential of two matrices without biases, y = module(x) + B(A(x)): of an
nn.Linear A is (r, in) and B (out, r), of an nn.Embedding A is a table (V, r) and B (d, r). They
are stored as `adapter.0.weight` and `adapter.1.weight`, or `adapter.2.weight` where dropout stands
between them. That is LoRA with a scaling of 1: PEFT's with alpha = r.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from gptj_q8 import convert
from gptj_q8.checkpoint import naming
from gptj_q8.checkpoint.shards import Entry, Shard
from gptj_q8.checks import FLOATS, one_of_dtypes

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
"""The files of an adapter, as PEFT names them."""

# What PEFT puts before the names of the model that it wraps.
_WRAPPED = "base_model.model."
_PICKLED_WEIGHTS = "adapter_model.bin"
# In their metadata, the sign that nobody trained them since they were converted.
_ORIGIN = "gptj_q8"
_PART = re.compile(r"(.+)\.adapter\.(\d+)\.weight")


@dataclass(frozen=True)
class Adapter:
    """One module's adapter.

    module: its name in the model; embeds: whether it is an nn.Embedding; first, second: names of
    A and B in the checkpoint.
    """

    module: str
    embeds: bool
    rank: int
    first: str
    second: str


def is_part(name: str) -> bool:
    """Whether a tensor of this name belongs to an adapter."""
    return ".adapter." in name


def find(entries: Mapping[str, Entry], model: Any) -> list[Adapter]:
    """Returns the adapters that a checkpoint holds for the modules of `model`.

    ValueError or TypeError, naming file and tensor, for one of another form or shape. Those of
    modules that the model lacks, such as another head, are left out.
    """
    found = []
    modules = dict(model.named_modules())
    for owner, (first, second) in _pairs(entries).items():
        name = naming.module_name(owner, model.base_model_prefix, modules)
        if name is None:
            logger.warning(
                "%s: %s has no module for it, so it is left out", first, type(model).__name__
            )
            continue
        embeds = hasattr(modules[name], "num_embeddings")
        rank = _check(entries, first, second, modules[name].weight.shape, embeds)
        found.append(Adapter(name, embeds, rank, first, second))
    return found


def _pairs(entries: Mapping[str, Entry]) -> dict[str, tuple[str, str]]:
    """Returns the names of A and B by the module's name in the checkpoint."""
    parts: dict[str, dict[int, str]] = {}
    for name in filter(is_part, entries):
        match = _PART.fullmatch(name)
        if match is None:
            raise ValueError(f"{entries[name].file}: {name} is no part of an adapter known here")
        parts.setdefault(match[1], {})[int(match[2])] = name
    for owner, numbered in parts.items():
        if sorted(numbered) not in ([0, 1], [0, 2]):
            there = ", ".join(numbered.values())
            raise ValueError(
                f"{entries[next(iter(numbered.values()))].file}: the adapter of {owner} must be "
                f"the weights 0 and 1, or 0 and 2, got {there}"
            )
    return {owner: (numbered[0], numbered[max(numbered)]) for owner, numbered in parts.items()}


def _check(
    entries: Mapping[str, Entry], first: str, second: str, shape: Sequence[int], embeds: bool
) -> int:
    """Returns the rank; ValueError or TypeError unless A and B fit a weight of this shape."""
    for name in (first, second):
        one_of_dtypes(entries[name].file, name, entries[name].dtype, *FLOATS)
    if len(entries[second].shape) != 2 or 0 in entries[second].shape:
        raise ValueError(
            f"{entries[second].file}: {second} must have 2 dimensions above 0, "
            f"got {list(entries[second].shape)}"
        )
    rank = entries[second].shape[1]
    (rows, columns) = shape
    wanted = {
        first: (rows, rank) if embeds else (rank, columns),
        second: (columns if embeds else rows, rank),
    }
    for name, expected in wanted.items():
        if entries[name].shape != expected:
            raise ValueError(
                f"{entries[name].file}: {name} must have shape {list(expected)} for this model, "
                f"got {list(entries[name].shape)}"
            )
    return rank


def peft_config(adapters: Sequence[Adapter], model: Any, base: str) -> Any:
    """Returns the LoraConfig that gives `model` such adapters; base: where the model is stored."""
    from peft import LoraConfig

    ranks = {adapter.module: adapter.rank for adapter in adapters}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=_short_names(ranks, model),
        lora_dropout=0.0,  # of the old adapters' dropout nothing is stored
        task_type="CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        base_model_name_or_path=base,
    )


def _short_names(names: Iterable[str], model: Any) -> list[str]:
    """Returns last components that match the modules of these names only, or else the names."""
    names = set(names)
    short = {name.rpartition(".")[2] for name in names}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if matched == names else names)


def refuse_not_finite(entry: Entry, name: str, tensor: Tensor) -> None:
    """ValueError, naming file and tensor, for NaN or Inf in a part of an adapter.

    A tensor without data (meta) passes.
    """
    if not tensor.is_meta:
        convert.refuse_not_finite({f"{entry.file}: {name}": tensor})


def peft_state(
    adapters: Iterable[Adapter], entries: Mapping[str, Entry], shards: Mapping[str, Shard]
) -> dict[str, Tensor]:
    """Returns the tensors of the adapters under PEFT's names; shards: the files of the entries.

    ValueError for NaN or Inf.
    """

    def read(name: str) -> Tensor:
        tensor = shards[entries[name].file].read(name)
        refuse_not_finite(entries[name], name, tensor)
        return tensor

    state = {}
    for adapter in adapters:
        name = f"{_WRAPPED}{adapter.module}"
        first, second = read(adapter.first), read(adapter.second)
        if adapter.embeds:
            state[f"{name}.lora_embedding_A"] = first.T
            state[f"{name}.lora_embedding_B"] = second
        else:
            state[f"{name}.lora_A.weight"] = first
            state[f"{name}.lora_B.weight"] = second
    return state


def save(directory: Path, config: Any, state: Mapping[str, Tensor]) -> None:
    """Writes an adapter as PEFT does: adapter_config.json and adapter_model.safetensors."""
    directory.mkdir()
    config.inference_mode = True
    config.save_pretrained(str(directory))
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt", _ORIGIN: "converted"})


def read_config(directory: Path) -> dict[str, Any]:
    """Returns what adapter_config.json says, having checked that PEFT can load what lies there.

    FileNotFoundError without weights; ValueError, naming the file, for one that is damaged.
    """
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: truncated or damaged: {error}") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ValueError(f"{path}: is no adapter's configuration, for it has no peft_type")
    if (directory / WEIGHTS).exists():
        Shard(directory / WEIGHTS)
    elif not (directory / _PICKLED_WEIGHTS).exists():
        raise FileNotFoundError(f"{directory}: the adapter's weights, {WEIGHTS}, are missing")
    return config


def was_converted(directory: Path) -> bool:
    """Whether `save` wrote this adapter, so that another conversion may replace it."""
    try:
        return _ORIGIN in Shard(directory / WEIGHTS).metadata
    except (OSError, ValueError):
        return False


def attach(model: Any, config: Any, state: Mapping[str, Tensor]) -> None:
    """Gives a loaded Transformers model the adapters, active and trainable."""
    from peft import set_peft_model_state_dict

    model.add_adapter(config)
    own = {name.removeprefix(_WRAPPED): tensor for name, tensor in state.items()}
    result = set_peft_model_state_dict(model, own)
    assert not result.unexpected_keys
