"""Wraps three methods of Transformers' models when it is imported, once.

Two refuse what would go wrong, and saving an 8-bit model adds its card. AttributeError for a
Transformers without them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from gptj_q8._register import follow, guard
from gptj_q8.checkpoint import card
from gptj_q8.config import Q8Config
from gptj_q8.hf.quantizer import layers
from gptj_q8.hf.refusals import check_load, check_resize


def write_card(
    model: Any, save_directory: str | os.PathLike[str], is_main_process: bool = True, **_: Any
) -> None:
    """Writes README.md beside an 8-bit model that was just saved; adapters get PEFT's."""
    config = getattr(model.config, "quantization_config", None)
    is_adapter = getattr(model, "_hf_peft_config_loaded", False)
    if not is_main_process or is_adapter or not isinstance(config, Q8Config):
        return
    sizes = {layer.codes.data_ptr(): layer.codes.numel() for _, layer in layers(model)}
    base = getattr(model, "name_or_path", None)
    original = Path(base) if base else None
    card.write(Path(save_directory), config, base, sum(sizes.values()), original=original)


guard(PreTrainedModel, "_load_pretrained_model", check_load)
guard(PreTrainedModel, "_get_resized_embeddings", check_resize)
follow(PreTrainedModel, "save_pretrained", write_card)
