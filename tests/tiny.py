"""Tiny models, and checkpoints of them, for the tests of conversion and loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    PreTrainedModel,
)

from gptj_q8.config import Q8Config

QUICK = Q8Config(codebook="dynamic")  # where the codebook does not matter
VOCABULARY = 130
IDS = torch.arange(12)[None]
LONG = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
SHORT = torch.tensor([[20, 21, 22]])
SIZES = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def gptj(seed: int = 0, **changes: object) -> GPTJForCausalLM:
    torch.manual_seed(seed)
    config = GPTJConfig(**{**SIZES, **TOKENS, "rotary_dim": 4, **changes})
    model = GPTJForCausalLM(config).eval()
    with torch.no_grad():  # they start as zeros, and a test would not see them lost
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    return model


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of LONG and SHORT, the latter with padding at its left."""
    ids = torch.cat([torch.full((1, 4), 1), SHORT], dim=1)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :4] = 0
    return torch.cat([LONG, ids]), mask


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Ties lm_head to wte."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**SIZES, **TOKENS)).eval()


def load(path: Path, **kwargs: object) -> PreTrainedModel:
    """from_pretrained that loads everything that it should."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm())


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`, by its path there."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the only weight file, its tensors changed by `change`, its metadata kept."""
    path = directory / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)
