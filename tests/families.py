"""Tiny random models of the families that the README names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import SIZES, TOKENS, VOCABULARY
from transformers import PreTrainedModel

_BASE = {"vocab_size": VOCABULARY, "hidden_size": 48, "max_position_embeddings": 64, **TOKENS}
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_LLAMA = {**_BASE, **_LAYERS, "num_key_value_heads": 2}
_GPT_NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
_OPT = {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 32}

# Name -> class of the model, class of its configuration, what the configuration says.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**SIZES, **TOKENS}),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", {**_BASE, **_GPT_NEO, "window_size": 8}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_BASE, **_LAYERS}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_BASE, **_OPT}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**_BASE, "n_layer": 2, "n_head": 4}),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", {**SIZES, **TOKENS, "rotary_dim": 4}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**_BASE, **_LAYERS}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 12}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_LLAMA, "head_dim": 12}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "bert": ("BertForMaskedLM", "BertConfig", {**_BASE, **_LAYERS}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**_BASE, **_LAYERS}),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**_BASE, **_LAYERS, "embedding_size": 32}),
}


def make(class_name: str, config_name: str, options: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**options)
    model: PreTrainedModel = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():  # they start as zeros, and a test would not see them lost
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    return model


def family(name: str, seed: int = 0) -> Any:
    return make(*FAMILIES[name], seed)


def load(like: Any, path: Path, **options: Any) -> Any:
    """from_pretrained of the class of `like`, that loads everything that it should."""
    model, info = type(like).from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def same_weights(model: PreTrainedModel, other: PreTrainedModel) -> None:
    state = other.state_dict()
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
