"""What the headers of a stored 8-bit checkpoint must say, checked before its data is read."""

import os
from collections.abc import Iterable, Mapping, Sequence

import torch

from gptj_q8.checkpoint.files import check_index
from gptj_q8.checkpoint.shards import Entry, Shard
from gptj_q8.checks import one_of_dtypes
from gptj_q8.config import check_format_version

PARTS = ("codes", "absmax", "codebook")
_CODEBOOK_SHAPE = (256,)


def guard(first: str) -> tuple[str, torch.Tensor]:
    """Returns the name and value of a tensor to store beside the 8-bit weights.

    Without gptj_q8, Transformers would warn and go on with random weights. An empty tensor under
    the float weight's name makes it raise, for a size mismatch. first: the model's first 8-bit
    module, which every head of the model has.
    """
    return f"{first}.weight", torch.empty(0)


def entries(files: Iterable[str | os.PathLike[str]]) -> dict[str, Entry]:
    """Returns what the files hold, by tensor name.

    ValueError, naming file and tensor, for a damaged file, for one of a newer format, and for
    shards that do not belong together or are not those of the index beside them.
    """
    found: dict[str, Entry] = {}
    for path in files:
        shard = Shard(path)
        if "format_version" in shard.metadata:
            check_format_version(shard.metadata["format_version"], str(path))
        for name, entry in shard.entries().items():
            if name in found:
                raise ValueError(f"{path}: holds {name}, which {found[name].file} holds too")
            found[name] = entry
    check_index(found)
    return found


def in_memory(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Entry]:
    """Returns what a state dict holds, as `entries` does for files."""
    return {
        name: Entry(tensor.dtype, tuple(tensor.shape), "state_dict")
        for name, tensor in state_dict.items()
    }


def quantized_names(entries: Mapping[str, Entry]) -> list[str]:
    """Returns the names of the modules whose 8-bit weights the checkpoint holds."""
    return [name.removesuffix(".codes") for name in entries if name.endswith(".codes")]


def check(entries: Mapping[str, Entry], block_size: int) -> None:
    """ValueError unless the parts of every 8-bit weight are there and fit each other.

    TypeError for a part of another dtype. Both name the tensor and its file.
    """
    names = {part: part for part in PARTS}
    where = f"at block_size {block_size} (config.json)"
    check_parts(entries, quantized_names(entries), names, block_size, where, (torch.float32,))


def check_parts(
    entries: Mapping[str, Entry],
    modules: Iterable[str],
    spelled: Mapping[str, str],
    block_size: int,
    where: str,
    scales: Sequence[torch.dtype],
) -> None:
    """Does what `check` does for any spelling of the parts.

    spelled: name of each of PARTS there; where: what says so of the block size, for the message;
    scales: the dtypes that absmax and codebook may have.
    """
    for module in modules:
        names = [f"{module}.{spelled[part]}" for part in PARTS]
        there = next(name for name in names if name in entries)
        for name in names:
            if name not in entries:
                raise ValueError(f"{entries[there].file}: {there} is there but {name} is missing")
        codes, absmax, codebook = (entries[name] for name in names)
        _check_dtype(names[0], codes, torch.uint8)
        _check_dtype(names[1], absmax, *scales)
        _check_dtype(names[2], codebook, *scales)
        blocks = -(-codes.numel // block_size)
        if absmax.shape != (blocks,):
            raise ValueError(
                f"{absmax.file}: {names[1]} must have shape [{blocks}] for "
                f"{codes.numel} codes {where}, got {list(absmax.shape)}"
            )
        if codebook.shape != _CODEBOOK_SHAPE:
            raise ValueError(
                f"{codebook.file}: {names[2]} must have shape [256], got {list(codebook.shape)}"
            )


def check_shape(entries: Mapping[str, Entry], name: str, shape: torch.Size) -> None:
    """ValueError unless tensor `name` has this shape (Transformers 5.17 would take any)."""
    entry = entries[name]
    if entry.shape != tuple(shape):
        raise ValueError(
            f"{entry.file}: {entry.name or name} must have shape {list(shape)} for this model, "
            f"got {list(entry.shape)}"
        )


def _check_dtype(name: str, entry: Entry, *allowed: torch.dtype) -> None:
    one_of_dtypes(entry.file, name, entry.dtype, *allowed)
