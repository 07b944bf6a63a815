"""What single families do differently: their names, fused layers, Conv1D, experts, leftovers."""

from __future__ import annotations

import logging
import shutil

import peft
import pytest
import torch
import transformers
from families import FAMILIES, family, load, make, same_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import QUICK, logits, relative
from torch import nn

import gptj_q8
from gptj_q8 import convert
from gptj_q8.checkpoint import convert_checkpoint
from gptj_q8.config import Q8Config

pytestmark = pytest.mark.usefixtures("one_thread")


# Names that Transformers changes while loading


def test_neox_is_stored_under_the_names_of_its_checkpoints(tmp_path):
    family("gpt_neox").save_pretrained(tmp_path / "float")
    convert_checkpoint(tmp_path / "float", tmp_path / "new", QUICK)
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as file:
        assert "embed_out.codes" in file.keys()  # noqa: SIM118


def test_model_names_in_the_file_load_too(tmp_path):
    """As earlier Transformers stored them, or those who save a state_dict."""
    model = gptj_q8.quantize_(family("gpt_neox"), QUICK)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for part in ("codes", "absmax", "codebook"):
        state[f"lm_head.{part}"] = state.pop(f"embed_out.{part}")
    save_file(state, tmp_path / "model.safetensors", metadata={"format_version": "1"})
    assert torch.equal(logits(load(model, tmp_path)), logits(model))


NOMIC = {
    "vocab_size": 130, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 64,
}  # fmt: skip


def test_layers_that_a_checkpoint_fuses(tmp_path):
    """NomicBert's holds q, k and v in one matrix, and Transformers splits it."""
    model = make("NomicBertForMaskedLM", "NomicBertConfig", NOMIC)
    model.save_pretrained(tmp_path / "float")
    fused = [name for name in load_file(tmp_path / "float" / "model.safetensors") if "Wqkv" in name]
    assert fused
    quantized = load(model, tmp_path / "float", quantization_config=QUICK)
    same_weights(quantized, gptj_q8.quantize_(load(model, tmp_path / "float"), QUICK))
    quantized.save_pretrained(tmp_path / "stored")
    same_weights(load(model, tmp_path / "stored"), quantized)
    with pytest.raises(ValueError, match=r"lacks .*q_proj\.weight; if Transformers makes it"):
        convert_checkpoint(tmp_path / "float", tmp_path / "new", QUICK)
    plain = quantized.dequantize()
    plain.save_pretrained(tmp_path / "plain")
    assert set(fused) <= set(load_file(tmp_path / "plain" / "model.safetensors"))
    same_weights(load(model, tmp_path / "plain"), plain)
    again = load(model, tmp_path / "stored").dequantize()
    again.save_pretrained(tmp_path / "again")
    same_weights(load(model, tmp_path / "again"), plain)


def test_a_bias_that_is_missing_is_initialized(tmp_path):
    """As Transformers does for a float layer; it must not be whatever memory held."""
    model = gptj_q8.quantize_(family("codegen"), QUICK)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    assert state.pop("lm_head.bias").abs().sum() > 0
    save_file(state, path, metadata={"format_version": "1"})
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.bias"}
    assert torch.equal(again.lm_head.bias, torch.zeros(130))


def test_a_model_whose_layers_were_all_replaced_still_saves(tmp_path):
    """As merging adapters may do."""
    model = gptj_q8.quantize_(family("llama"), QUICK)
    convert.decode_layers(model)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")


# Mixtures of experts


def test_experts_stay_in_float_and_are_named(tmp_path, caplog):
    options = {**FAMILIES["llama"][2], "num_local_experts": 2}
    model = make("MixtralForCausalLM", "MixtralConfig", options)
    model.save_pretrained(tmp_path / "float")
    with caplog.at_level(logging.WARNING, "gptj_q8"):
        quantized = load(model, tmp_path / "float", quantization_config=QUICK)
    assert "stay in float, with 5.5e+04 parameters" in caplog.text
    assert "model.layers.0.mlp.experts" in caplog.text
    caplog.clear()
    report = convert_checkpoint(tmp_path / "float", tmp_path / "new", QUICK)
    assert "model.layers.0.mlp.experts" in caplog.text
    assert {name.rpartition(".")[2] for name in report.kept} == {"experts", "gate"}
    same_weights(load(model, tmp_path / "new"), quantized)
    exempt = Q8Config(codebook="dynamic", modules_to_not_convert=["mlp"])
    caplog.clear()
    gptj_q8.quantize_(model, exempt)
    assert caplog.text == ""


# Old checkpoints


@pytest.mark.parametrize(
    ("name", "leftover"),
    [
        ("gpt2", "h.0.attn.bias"),
        ("gpt_neo", "transformer.h.0.attn.attention.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.1.attention.bias"),
        ("codegen", "transformer.h.1.attn.causal_mask"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("bert", "bert.embeddings.position_ids"),
    ],
)
def test_leftovers_are_dropped(tmp_path, name, leftover):
    family(name).save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "model.safetensors"
    save_file({**load_file(path), leftover: torch.ones(4)}, path, metadata={"format": "pt"})
    convert_checkpoint(tmp_path / "old", tmp_path / "new", QUICK)
    assert leftover not in load_file(tmp_path / "new" / "model.safetensors")


# The layers themselves


def test_conv1d_equals_the_float_one():
    torch.manual_seed(0)
    conv = transformers.pytorch_utils.Conv1D(40, 24)
    nn.init.normal_(conv.bias)
    layer = gptj_q8.nn.Q8Conv1D.from_float(conv, "fitted", 64)
    assert layer.codes.shape == (40, 24)
    assert (layer.in_features, layer.out_features) == (24, 40)
    assert layer.bias is conv.bias
    x = torch.randn(3, 5, 24, requires_grad=True)
    weight = layer.dequantize().double()
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert relative(y, x.double() @ weight.T + conv.bias.double()) < 1e-5
    assert relative(x.grad, torch.ones(3, 5, 40).double() @ weight) < 1e-5
    assert relative(layer(x), conv(x)) < 0.01
    back = layer.to_float(nn.Parameter(layer.turn(layer.dequantize())))
    assert type(back) is type(conv)
    assert vars(back).keys() == vars(conv).keys()
    assert relative(back(x), layer(x)) < 1e-6


def test_adapters_trained_in_8_bits_fit_the_float_gpt2(tmp_path):
    """PEFT needs fan_in_fan_out for Conv1D, and not for ours; merged, both give one answer."""
    model = family("gpt2")
    adapted = peft.get_peft_model(
        gptj_q8.quantize_(family("gpt2")),
        peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        plain = peft.PeftModel.from_pretrained(model, tmp_path)
    assert relative(logits(adapted), logits(plain)) < 0.03
    assert relative(logits(plain.merge_and_unload()), logits(adapted)) < 0.03


def test_modules_that_only_resemble_known_ones_stay():
    class ScaledWordEmbedding(nn.Embedding):
        pass

    model = nn.Sequential(ScaledWordEmbedding(8, 8), nn.Linear(8, 8))
    gptj_q8.quantize_(model)
    assert type(model[0]) is ScaledWordEmbedding


def test_old_directory_stays_when_a_family_cannot_be_converted(tmp_path):
    make("NomicBertForMaskedLM", "NomicBertConfig", NOMIC).save_pretrained(tmp_path / "float")
    target = tmp_path / "new"
    shutil.copytree(tmp_path / "float", target)
    before = sorted((p.name, p.read_bytes()) for p in target.iterdir())
    with pytest.raises(ValueError, match="lacks"):
        convert_checkpoint(tmp_path / "float", target, QUICK, overwrite=True)
    assert sorted((p.name, p.read_bytes()) for p in target.iterdir()) == before
