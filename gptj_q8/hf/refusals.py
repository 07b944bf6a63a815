"""What Transformers would do wrong with 8 bits, refused before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from gptj_q8.checkpoint import old, stored
from gptj_q8.checkpoint.shards import Shard
from gptj_q8.models.layers import Quantized


def check_load(
    model: nn.Module,
    state_dict: Any,
    checkpoint_files: Sequence[str] | None,
    load_config: Any,
    *args: Any,
    **_: Any,
) -> None:
    """ValueError for a checkpoint of the hivemind family on its way into a float model.

    Its config.json says nothing of 8 bits, so Transformers would take the codes for weights.
    """
    if load_config.hf_quantizer is not None:
        return
    entries = stored.in_memory(state_dict or {})
    with suppress(OSError, ValueError):  # what is amiss with the files is for Transformers to say
        for file in checkpoint_files or ():
            entries.update(Shard(file).entries())
    names = [f"{name}.weight" for name in old.quantized_names(entries)]
    codes = [name for name in names if name in entries and entries[name].dtype == torch.uint8]
    # A model of the old modules has a place for scales.
    if codes and not any(name.endswith(".absmax") for name in model.state_dict()):
        raise ValueError(
            f"{entries[codes[0]].file}: {codes[0]} is in 8 bits, in the layout of "
            "hivemind/gpt-j-6B-8bit, and would be taken for floats; load it with "
            "gptj_q8.from_pretrained, or with quantization_config=gptj_q8.Q8Config()"
        )


def check_resize(
    model: nn.Module,
    old_embeddings: nn.Module,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **_: Any,
) -> None:
    """ValueError for 8-bit embeddings that would get another size."""
    if not isinstance(old_embeddings, Quantized):
        return
    rows = old_embeddings.codes.shape[0]
    size = rows if new_num_tokens is None else new_num_tokens
    if isinstance(pad_to_multiple_of, int) and pad_to_multiple_of > 0:
        size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
    if size != rows:
        raise ValueError(
            f"resize_token_embeddings: the {rows} embeddings are in 8 bits and cannot become "
            f"{size}; resize the float model (model.dequantize()) and quantize_ it, or leave them "
            "in float by Q8Config(modules_to_not_convert=[...])"
        )
