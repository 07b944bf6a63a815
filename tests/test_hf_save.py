"""Saving 8-bit models through Transformers, loading them again and dequantizing them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import QUICK, contents, gpt2, load, logits, relative
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTJForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import gptj_q8
from gptj_q8.config import Q8Config
from gptj_q8.hf import layers
from gptj_q8.nn import Q8Embedding, Q8Linear


def test_reload_is_exact(float_dir, stored_dir):
    model, again = load(float_dir, quantization_config=Q8Config()), load(stored_dir)
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(logits(again), logits(model))
    assert again.dtype == again.lm_head.dtype == torch.float16
    assert not again.lm_head.codes.requires_grad


def test_what_is_stored(stored_dir):
    config = json.loads((stored_dir / "config.json").read_text())["quantization_config"]
    assert config == {
        "block_size": 256,
        "codebook": "fitted",
        "format_version": 1,
        "modules_to_not_convert": None,
        "quant_method": "gptj_q8",
    }
    names = []
    for path in stored_dir.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "format_version": "1"}
            names += file.keys()
    assert [name for name in names if name.startswith("lm_head")]
    assert {n.rpartition(".")[2] for n in names} == {
        "codes",
        "absmax",
        "codebook",
        "bias",
        "weight",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reload_in_another_dtype(stored_dir, dtype):
    model = load(stored_dir, dtype=dtype)
    assert model.dtype == model.lm_head.dtype == model.transformer.wte.dtype == dtype
    assert model.lm_head.absmax.dtype == model.lm_head.codebook.dtype == torch.float32
    assert relative(logits(model), logits(load(stored_dir))) < 0.02


def test_model_that_initializes_the_weights_of_its_parts(tmp_path):
    """T5's modules do, and from_pretrained calls on them even where every weight was loaded."""
    config = T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4, vocab_size=130)
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "float")
    loaded = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "float", quantization_config=QUICK
    )
    loaded.save_pretrained(tmp_path / "stored")
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "stored")
    expected = gptj_q8.quantize_(model, QUICK)
    ids = torch.arange(9)[None]
    for each in (loaded, again):
        outputs = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (each, expected))
        assert torch.equal(*outputs)


def test_quantize_then_save(float_dir, stored_dir, tmp_path):
    model = GPTJForCausalLM.from_pretrained(float_dir)
    config = Q8Config()
    gptj_q8.quantize_(model, config).save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(load(stored_dir)))
    assert model.config.quantization_config is not config  # it stays the caller's own
    assert model.is_quantized


def test_save_over_the_directory_it_came_from(one_file):
    """Its tensors are pages of the very file that is written."""
    model = load(one_file)
    expected = logits(model)
    model.save_pretrained(one_file)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(load(one_file)), expected)


def test_body_of_a_stored_model(stored_dir):
    body, info = AutoModel.from_pretrained(stored_dir, output_loading_info=True)
    assert isinstance(body.wte, Q8Embedding)
    assert not info["missing_keys"]
    assert {name.partition(".")[0] for name in info["unexpected_keys"]} == {"lm_head"}
    whole = load(stored_dir).transformer
    ids = torch.arange(5)[None]
    assert torch.equal(body(ids).last_hidden_state, whole(ids).last_hidden_state)


def test_stored_body_with_a_new_head(float_dir, tmp_path):
    body = AutoModel.from_pretrained(float_dir, quantization_config=QUICK)
    body.save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight", "lm_head.bias"}
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.transformer.wte.codes, body.wte.codes)


def test_new_head_on_a_stored_model(stored_dir):
    model, info = AutoModelForSequenceClassification.from_pretrained(
        stored_dir, num_labels=3, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    assert type(model.score) is nn.Linear
    assert model.score.weight.abs().max() > 0
    assert isinstance(model.transformer.h[0].mlp.fc_in, Q8Linear)


def test_generate(stored_dir):
    model = load(stored_dir, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    tokens = model.generate(ids, **arguments)
    plain = model.dequantize()
    assert torch.equal(tokens, plain.generate(ids, **arguments))
    assert tokens.shape == (1, 11)


def test_cast_keeps_scales(stored_dir):
    model = load(stored_dir)
    before = model.lm_head.absmax.clone()
    model.to(torch.bfloat16)
    assert model.lm_head.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.absmax, before)
    assert model.lm_head.absmax.dtype == torch.float32


def test_push_to_hub(stored_dir, monkeypatch):
    """Uploads what save_pretrained writes."""
    from transformers.utils import hub

    uploaded = {}

    def create_repo(*args, **kwargs):
        return SimpleNamespace(repo_id="someone/gptj")

    def upload(self, folder, *args, **kwargs):
        uploaded.update(contents(Path(folder)))

    # 5.17 calls the function, later versions the method.
    monkeypatch.setattr(hub, "create_repo", create_repo, raising=False)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: MagicMock())
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    load(stored_dir).push_to_hub("someone/gptj")
    assert {"config.json", "model.safetensors"} <= uploaded.keys()


# Tied embeddings


def test_tied_embeddings(tmp_path):
    original = gpt2()
    original.save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", quantization_config=QUICK)
    model.save_pretrained(tmp_path / "stored")
    again = load(tmp_path / "stored")
    quantized = gptj_q8.quantize_(original, QUICK)
    for each in (model, again, quantized):
        for part in ("codes", "absmax", "codebook"):
            assert getattr(each.lm_head, part) is getattr(each.transformer.wte, part)
        assert torch.equal(logits(each), logits(model))
        each.tie_weights()
        assert torch.equal(logits(each), logits(model))
    stored = load_file(tmp_path / "stored" / "model.safetensors")
    assert not [name for name in stored if name.startswith("lm_head")]


def test_tied_embeddings_dequantized(tmp_path):
    model = gptj_q8.quantize_(gpt2(), QUICK)
    expected = logits(model)
    plain = model.dequantize()
    assert plain.lm_head.weight is plain.transformer.wte.weight
    plain.save_pretrained(tmp_path)
    assert relative(logits(load(tmp_path)), expected) < 1e-5


@pytest.mark.parametrize("differ", [False, True])
def test_tied_embeddings_stored_twice(tmp_path, differ):
    """As Transformers has it: equal weights are tied, others not, whatever config.json says."""
    model = gpt2()
    model.config.save_pretrained(tmp_path / "float")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] *= -2 if differ else 1
    save_file(state, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    expected = logits(load(tmp_path / "float"))
    model = load(tmp_path / "float", quantization_config=QUICK)
    assert (model.lm_head.codes is model.transformer.wte.codes) is not differ
    assert relative(logits(model), expected) < 0.03
    model.save_pretrained(tmp_path / "stored")
    again = load(tmp_path / "stored")
    assert torch.equal(logits(again), logits(model))


# dequantize


def test_dequantize(stored_dir, tmp_path):
    model = load(stored_dir, dtype=torch.float32)
    expected = logits(model)
    plain = model.dequantize()
    assert plain is model
    assert not list(layers(plain))
    assert type(plain.transformer.h[0].attn.q_proj) is nn.Linear
    assert relative(logits(plain), expected) < 1e-5
    assert not hasattr(plain.config, "quantization_config")
    assert plain.half().dtype == torch.float16  # Transformers refuses this of a quantized model
    plain.float().save_pretrained(tmp_path)
    again = load(tmp_path)
    for name, parameter in plain.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_dequantize_(stored_dir):
    """The function does to a Transformers model what its method does."""
    model = load(stored_dir)
    assert gptj_q8.dequantize_(model) is model
    assert not hasattr(model.config, "quantization_config")
    assert not model.is_quantized
    assert model.lm_head.weight.dtype == torch.float16


def test_dequantize_after_a_cast(stored_dir):
    plain = load(stored_dir).to(torch.bfloat16).dequantize()
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}


def test_dequantize_to_a_dtype(stored_dir):
    plain = load(stored_dir).dequantize(torch.float32)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
