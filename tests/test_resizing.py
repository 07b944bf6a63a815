"""Another vocabulary for a quantized model."""

from __future__ import annotations

import pytest
import torch
from tiny import LONG, QUICK, VOCABULARY, gptj, load, relative
from torch import nn
from transformers import (
    AutoModelForCausalLM,
)

import gptj_q8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", [VOCABULARY - 2, VOCABULARY + 14])
def test_resizing_is_refused_and_changes_nothing(model, size):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"resize_token_embeddings: the 130 .* become {size}; "):
        model.resize_token_embeddings(size)
    with pytest.raises(ValueError, match="in 8 bits and cannot become 192"):
        model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.config.vocab_size == VOCABULARY
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_resizing_embeddings_left_in_float(tmp_path):
    """An 8-bit lm_head beside them becomes a float one, of the decoded weights."""
    config = gptj_q8.Q8Config(codebook="dynamic", modules_to_not_convert=["wte"])
    model = gptj_q8.quantize_(gptj(), config)
    with torch.no_grad():
        expected = model(LONG).logits
    model.resize_token_embeddings(VOCABULARY + 14)
    assert type(model.lm_head) is nn.Linear
    model.save_pretrained(tmp_path)
    for each in (model, load(tmp_path)):
        with torch.no_grad():
            found = each(LONG).logits
        assert found.shape[-1] == VOCABULARY + 14
        assert relative(found[..., :VOCABULARY], expected) < 1e-5


def test_resizing_the_float_model_before(float_dir):
    model = AutoModelForCausalLM.from_pretrained(float_dir, dtype=torch.float32)
    model.resize_token_embeddings(VOCABULARY + 14)
    quantized = gptj_q8.quantize_(model, QUICK)
    assert quantized.lm_head.codes.shape[0] == VOCABULARY + 14
    with torch.no_grad():
        assert quantized(torch.tensor([[VOCABULARY + 13]])).logits.shape[-1] == VOCABULARY + 14


def test_resizing_to_the_same_size_is_no_change(model):
    assert model.resize_token_embeddings(VOCABULARY) is model.get_input_embeddings()
    assert model.resize_token_embeddings(pad_to_multiple_of=65) is model.get_input_embeddings()
