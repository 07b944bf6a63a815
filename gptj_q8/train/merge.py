"""Merges an adapter into its model's own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from gptj_q8.checkpoint.directory import new_directory
from gptj_q8.config import Q8Config
from gptj_q8.convert import dequantize_, quantize_

Form = Literal["8bit", "float16", "bfloat16", "float32"]


def merge(
    model: Any, tokenizer: Any, adapter: Path, output: Path, form: Form, overwrite: bool = False
) -> None:
    """Writes `output`, a model that needs no adapter: W + alpha / r * B A in the place of W.

    model: in floats or in 8 bits, and is changed. The sum is computed in float32, on the decoded
        weights, and rounded once: to the float dtype that `form` names, or to 8 bits as the
        model's own configuration says, else the default one. Memory holds
        the model in float32.
    tokenizer: is written beside the model.
    adapter: a folder in PEFT's format.

    FileExistsError where `output` is not empty (with `overwrite`: holds something else).
    """
    from peft import PeftModel

    with new_directory(output, overwrite) as partial:
        present = getattr(model.config, "quantization_config", None)
        config = present if isinstance(present, Q8Config) else Q8Config()
        dtype = model.dtype
        # First `to`: 8-bit layers decode to their own dtype.
        dequantize_(model.to(torch.float32), torch.float32)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
        if form == "8bit":
            quantize_(merged, config).to(dtype)
        else:
            merged.to(getattr(torch, form))
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
