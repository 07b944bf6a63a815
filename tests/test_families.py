"""Families other than GPT-J: quantize, save, load, convert, generate or encode, and fine-tune."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from families import FAMILIES, family, load, same_weights
from safetensors.torch import load_file
from tiny import IDS, QUICK, logits, relative

import gptj_q8
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
