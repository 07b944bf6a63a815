"""What the headers of a stored 8-bit checkpoint must say, checked before its data is read."""

import os
from collections.abc import Iterable, Mapping

import torch

from gptj_q8.checkpoint.shards import Entry, Shard
from gptj_q8.checks import DtypeError
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

    ValueError, naming the file, for a damaged one and for one of a newer format.
    """
    found = {}
    for path in files:
        shard = Shard(path)
        if "format_version" in shard.metadata:
            check_format_version(shard.metadata["format_version"], str(path))
        found.update(shard.entries())
    return found


def quantized_names(entries: Mapping[str, Entry]) -> list[str]:
    """Returns the names of the modules whose 8-bit weights the checkpoint holds."""
    return [name.removesuffix(".codes") for name in entries if name.endswith(".codes")]


def check(entries: Mapping[str, Entry], block_size: int) -> None:
    """ValueError unless the parts of every 8-bit weight are there and fit each other.

    TypeError for a part of another dtype. Both name the tensor and its file.
    """
    for name in quantized_names(entries):
        codes = entries[f"{name}.codes"]
        for part in PARTS[1:]:
            if f"{name}.{part}" not in entries:
                raise ValueError(
                    f"{codes.file}: {name}.codes is there but {name}.{part} is missing"
                )
        absmax, codebook = (entries[f"{name}.{part}"] for part in PARTS[1:])
        _check_dtype(f"{name}.codes", codes, torch.uint8)
        _check_dtype(f"{name}.absmax", absmax, torch.float32)
        _check_dtype(f"{name}.codebook", codebook, torch.float32)
        blocks = -(-codes.numel // block_size)
        if absmax.shape != (blocks,):
            raise ValueError(
                f"{absmax.file}: {name}.absmax must have shape [{blocks}] for "
                f"{codes.numel} codes at block_size {block_size} (config.json), "
                f"got {list(absmax.shape)}"
            )
        if codebook.shape != _CODEBOOK_SHAPE:
            raise ValueError(
                f"{codebook.file}: {name}.codebook must have shape [256], "
                f"got {list(codebook.shape)}"
            )


def check_shape(entries: Mapping[str, Entry], name: str, shape: torch.Size) -> None:
    """ValueError unless tensor `name` has this shape (Transformers 5.17 would take any)."""
    entry = entries[name]
    if entry.shape != tuple(shape):
        raise ValueError(
            f"{entry.file}: {name} must have shape {list(shape)} for this model, "
            f"got {list(entry.shape)}"
        )


def _check_dtype(name: str, entry: Entry, dtype: torch.dtype) -> None:
    if entry.dtype != dtype:
        wanted = str(dtype).removeprefix("torch.")
        got = str(entry.dtype).removeprefix("torch.")
        raise DtypeError(f"{entry.file}: {name} must be {wanted}, got {got}")
