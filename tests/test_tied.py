"""Tied weights where accelerate and PyTorch move or load them."""

from __future__ import annotations

import pytest
import torch
from families import family
from tiny import QUICK, logits

import gptj_q8

pytestmark = pytest.mark.usefixtures("one_thread")


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
