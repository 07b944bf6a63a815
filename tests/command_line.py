"""Runs the command line in this process, on a tiny GPT-J whose tokens are bytes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from click.testing import Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from gptj_q8.cli import app

POSITIONS = 64


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})


def read_json(result: Result) -> dict:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def save_byte_gptj(folder: Path, seed: int) -> Path:
    """A random GPT-J whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>"
    )
    torch.manual_seed(seed)
    config = GPTJConfig(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=64,
        n_layer=2,
        n_head=2,
        rotary_dim=8,
        initializer_range=0.2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPTJForCausalLM(config).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def float32(folder: Path) -> GPTJForCausalLM:
    return GPTJForCausalLM.from_pretrained(folder, dtype=torch.float32)


def byte_ids(text: str, folder: Path) -> list[int]:
    return PreTrainedTokenizerFast.from_pretrained(folder)(text).input_ids
