"""Families other than GPT-J: quantize, save, load, convert, generate or encode, and fine-tune."""

from __future__ import annotations

import logging
import shutil

import peft
import pytest
import torch
import transformers
from families import FAMILIES, family, make
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import IDS, QUICK, logits, relative
from torch import nn

import gptj_q8
from gptj_q8 import convert
from gptj_q8.checkpoint import convert_checkpoint
from gptj_q8.config import Q8Config
from gptj_q8.hf import layers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=FAMILIES)
def original(request, tmp_path_factory):
    """A float model and where it is stored."""
    model = family(request.param)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return model, path


def load(like, path, **options):
    """from_pretrained of the class of `like`, that loads everything that it should."""
    model, info = type(like).from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def same_weights(model, other):
    state = other.state_dict()
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_every_matrix_becomes_8_bit_and_the_model_stays_itself(original, caplog):
    model, path = original
    with caplog.at_level(logging.WARNING, "gptj_q8"):
        quantized = load(model, path, quantization_config=Q8Config())
    assert [
        name for name, p in quantized.named_parameters() if p.is_floating_point() and p.dim() > 1
    ] == []
    assert caplog.text == ""
    assert relative(logits(quantized), logits(model)) < 0.03
    decoded = {name: layer.turn(layer.dequantize()) for name, layer in layers(quantized)}
    for name, weight in decoded.items():
        assert relative(weight, model.get_parameter(f"{name}.weight")) < 0.01, name


def test_loading_saving_and_converting_agree(original, tmp_path):
    model, path = original
    quantized = load(model, path, quantization_config=QUICK)
    quantized.save_pretrained(tmp_path / "saved")
    convert_checkpoint(path, tmp_path / "converted", QUICK)
    same_weights(load(model, tmp_path / "saved"), quantized)
    same_weights(load(model, tmp_path / "converted"), quantized)
    for name in ("saved", "converted"):
        assert torch.equal(logits(load(model, tmp_path / name)), logits(quantized))
    names = {
        name: set(load_file(tmp_path / name / "model.safetensors"))
        for name in ("saved", "converted")
    }
    assert names["saved"] == names["converted"]


def test_in_place_and_back(original, tmp_path):
    model, path = original
    quantized = gptj_q8.quantize_(load(model, path), QUICK)
    same_weights(quantized, load(model, path, quantization_config=QUICK))
    expected = logits(quantized)
    plain = quantized.dequantize()
    assert {n: type(m) for n, m in plain.named_modules()} == {
        n: type(m) for n, m in model.named_modules()
    }
    assert relative(logits(plain), expected) < 1e-5
    plain.save_pretrained(tmp_path)
    same_weights(load(model, tmp_path), plain)
    assert set(load_file(tmp_path / "model.safetensors")) == set(
        load_file(path / "model.safetensors")
    )


def test_generates_or_encodes_as_its_decoded_weights_do(original):
    model, path = original
    quantized = load(model, path, quantization_config=QUICK)
    if not model.can_generate():
        encoded = logits(quantized)
        assert relative(encoded, logits(quantized.dequantize())) < 1e-5
        return
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    tokens = quantized.generate(IDS, **arguments)
    assert tokens.shape == (1, IDS.shape[1] + 6)
    assert torch.equal(tokens, quantized.dequantize().generate(IDS, **arguments))


def test_lora_step_equals_that_on_the_decoded_weights(original):
    """The same adapter, loss and gradients as PEFT has on the float model of the same weights."""
    model, path = original
    losses, gradients = [], []
    for decode in (True, False):
        base = load(model, path, quantization_config=QUICK)
        base = base.dequantize() if decode else base
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        adapted = peft.get_peft_model(base, config).eval()
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.detach())
        trained = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in trained)
        gradients.append(trained)
    assert torch.allclose(*losses, rtol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert relative(gradient, gradients[1][name]) < 1e-3, name
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    optimizer.step()
    assert adapted(input_ids=IDS, labels=IDS).loss < losses[1]


def test_deep_copy_and_pickle(original, tmp_path):
    model, path = original
    quantized = load(model, path, quantization_config=QUICK)
    torch.save(quantized, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(again), logits(quantized))
    assert [type(m) for m in again.modules()] == [type(m) for m in quantized.modules()]


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


# Tied weights and accelerate


def test_accelerate_loads_tied_weights_with_their_scales(tmp_path):
    """It ties codes again after loading, and knows nothing of scales."""
    accelerate = pytest.importorskip("accelerate")
    model = gptj_q8.quantize_(family("gpt2"), QUICK)
    model.save_pretrained(tmp_path)
    other = gptj_q8.quantize_(family("gpt2", seed=1), QUICK).to("meta")
    other.tie_weights()
    for device_map in ("auto", {"": "cpu"}):
        loaded = accelerate.load_checkpoint_and_dispatch(
            other, str(tmp_path / "model.safetensors"), device_map=device_map
        )
        assert torch.equal(logits(loaded), logits(model))


def test_codes_tied_to_older_ones_take_their_scales_back(tmp_path):
    """What accelerate does to a model with data, float or not: the first of the tied wins."""
    accelerate = pytest.importorskip("accelerate")
    gptj_q8.quantize_(family("gpt2"), QUICK).save_pretrained(tmp_path)
    other = gptj_q8.quantize_(family("gpt2", seed=1), QUICK)
    before = other.lm_head.dequantize()
    accelerate.load_checkpoint_and_dispatch(
        other, str(tmp_path / "model.safetensors"), device_map={"": "cpu"}
    )
    for layer in (other.lm_head, other.transformer.wte):
        assert torch.equal(layer.dequantize(), before)


def test_a_move_keeps_tied_layers_on_their_own_devices():
    model = gptj_q8.quantize_(family("gpt2"), QUICK)
    model.transformer.to("meta")
    assert model.transformer.wte.absmax.is_meta
    assert not model.lm_head.absmax.is_meta


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
