"""The old API: the card's snippet, loading and state dicts, against what the old code does."""

from __future__ import annotations

import copy
import json
import pickle
from contextlib import nullcontext
from typing import Any
from unittest import mock

import hivemind_layout as old
import pytest
import torch
import transformers
from command_line import POSITIONS, float32, save_byte_gptj
from frozen import adapters_of, frozen_modules
from tiny import IDS, gptj, logits, relative
from torch import nn
from transformers.models.gptj import modeling_gptj

import gptj_q8
from gptj_q8 import hivemind
from gptj_q8.hivemind import (
    GPTJBlock,
    GPTJForCausalLM,
    GPTJModel,
    add_adapters,
    bnbfy_,
    convert_to_int8,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = old.CLOSE


def patched() -> Any:
    """What the snippet does for good: then all of GPT-J in the process is built of that block."""
    return mock.patch.object(modeling_gptj, "GPTJBlock", GPTJBlock)


# The model card's snippet


def test_the_cards_snippet(tmp_path, monkeypatch):
    """Word for word from the model card, but for its first import and lengths."""
    monkeypatch.setattr(modeling_gptj, "GPTJBlock", modeling_gptj.GPTJBlock)  # restores it
    folder = tmp_path / "bertin-gpt-j-6B-ES-8bit"
    model = float32(save_byte_gptj(folder, seed=0))
    (folder / "model.safetensors").unlink()
    state = old.state_dict(model=model)
    old.write(folder, state, model=model)
    snippet = """
import transformers, torch
from gptj_q8.hivemind import GPTJBlock, GPTJForCausalLM
device = 'cuda' if torch.cuda.is_available() else 'cpu'
transformers.models.gptj.modeling_gptj.GPTJBlock = GPTJBlock  # monkey-patch GPT-J
tokenizer = transformers.AutoTokenizer.from_pretrained(ckpt)
model = GPTJForCausalLM.from_pretrained(
    ckpt, pad_token_id=tokenizer.eos_token_id, low_cpu_mem_usage=True
).to(device)
prompt = tokenizer("El sentido de la vida es", return_tensors='pt')
prompt = {key: value.to(device) for key, value in prompt.items()}
out = model.generate(**prompt, max_length=max_length, do_sample=True)
text = tokenizer.decode(out[0])
"""
    names: dict[str, object] = {"ckpt": str(folder), "max_length": POSITIONS}
    exec(snippet, names)
    assert names["text"].startswith("El sentido de la vida es")
    assert len(names["out"][0]) > len(names["prompt"]["input_ids"][0])
    assert names["model"].config.pad_token_id == names["tokenizer"].eos_token_id
    # Greedy, token for token what the original decodes to in float64 says.
    ids = names["prompt"]["input_ids"]
    said = names["model"].generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    reference = old.old_model(state, model)
    for _ in range(8):
        ids = torch.cat([ids, reference(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(said, ids)


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("form", ["bin", "safetensors", "bin-shards"])
def test_loading(tmp_path, form, patch):
    state = old.state_dict(scales=torch.float16)
    path = old.write(tmp_path, state, form)
    with patched() if patch else nullcontext():
        model, info = GPTJForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert len(frozen_modules(model)) == 14
    assert all(isinstance(block, GPTJBlock) for block in model.transformer.h)
    assert model.lm_head.weight.dtype == torch.uint8
    assert model.lm_head.absmax.dtype == model.lm_head.code.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    assert relative(logits(model), old.old_logits(state)) < CLOSE
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_body_alone(old_dir):
    state = old.state_dict()
    body = GPTJModel.from_pretrained(old_dir)
    assert "lm_head.weight" not in body.state_dict()
    expected = old.old_model(state).transformer(IDS).last_hidden_state
    assert relative(body(IDS).last_hidden_state, expected) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["dtype", "to"])
def test_half_precision(old_dir, dtype, how):
    """`.half()` used to make garbage of the scales."""
    if how == "dtype":
        model = GPTJForCausalLM.from_pretrained(old_dir, dtype=dtype)
    else:
        model = GPTJForCausalLM.from_pretrained(old_dir).to(dtype)
    assert model.dtype == model.transformer.wte(IDS).dtype == dtype
    assert model.lm_head.absmax.dtype == model.lm_head.code.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.uint8
    assert relative(logits(model), old.old_logits(old.state_dict())) < 0.02


def test_the_patch_leaves_other_models_alone(old_dir, float_dir, stored_dir):
    with patched():
        loaded = gptj_q8.from_pretrained(old_dir)
        quantized, again = gptj_q8.from_pretrained(float_dir), gptj_q8.from_pretrained(stored_dir)
        plain = transformers.GPTJForCausalLM.from_pretrained(float_dir, dtype=torch.float32)
    assert relative(logits(loaded), old.old_logits(old.state_dict())) < CLOSE
    assert torch.equal(logits(quantized), logits(again))
    assert not frozen_modules(plain)
    assert relative(logits(plain), logits(quantized)) < 0.02


def test_a_block_of_its_own():
    config = gptj().config
    for block in (GPTJBlock(config), GPTJBlock(config, layer_idx=1)):
        assert len(frozen_modules(block)) == 6


# State dicts and checkpoints


@pytest.mark.parametrize("kind", old.ADAPTERS)
@pytest.mark.parametrize("assign", [False, True])
def test_old_state_dicts_load(tmp_path, kind, assign):
    """Into a bare model; the adapters in it come along, the masks are dropped."""
    state = old.state_dict(adapters=kind, scales=torch.float16)
    model = GPTJForCausalLM(gptj().config).eval()
    model.load_state_dict(state, assign=assign)
    assert relative(logits(model), old.old_logits(state)) < CLOSE
    assert "transformer.h.0.attn.bias" in state  # what was given stays
    model.save_pretrained(tmp_path)
    again = GPTJForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", old.ADAPTERS[1:])
def test_what_was_trained_comes_back(tmp_path, kind):
    """By state dict and by save_pretrained, here and in gptj_q8.from_pretrained."""
    state = old.state_dict(adapters=kind)
    model = GPTJForCausalLM.from_pretrained(old.write(tmp_path / "old", state))
    expected = logits(model)
    assert relative(expected, old.old_logits(state)) < CLOSE
    own = model.state_dict()
    masks = {name for name in state if name.endswith((".attn.bias", ".masked_bias"))}
    assert own.keys() == state.keys() - masks
    torch.save(own, tmp_path / "tuned.pt")
    fresh = GPTJForCausalLM.from_pretrained(old.write(tmp_path / "base", old.state_dict()))
    fresh.load_state_dict(torch.load(tmp_path / "tuned.pt"))
    assert torch.equal(logits(fresh), expected)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    again = GPTJForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), expected)
    assert relative(logits(gptj_q8.from_pretrained(tmp_path / "saved")), expected) < CLOSE
    has_dropout = any(
        isinstance(m, nn.Dropout) for m in again.transformer.h[0].attn.q_proj.modules()
    )
    assert has_dropout == (kind == "dropout")


def test_copies(old_dir):
    model = GPTJForCausalLM.from_pretrained(old_dir)
    add_adapters(model)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


# Models of other classes


@pytest.mark.parametrize("rank", [0, 4])
def test_bnbfy_(rank):
    model, original = gptj(), gptj()
    bnbfy_(model, adapter_dim=rank)
    assert len(frozen_modules(model)) == 14
    assert len(adapters_of(model)) == (28 if rank else 0)
    assert relative(logits(model), logits(original)) < 0.05
    assert relative(logits(model), old.old_logits(with_floats(model))) < CLOSE
    bnbfy_(model)  # nothing is left to do, least of all in adapters
    assert len(adapters_of(model)) == (28 if rank else 0)


def with_floats(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def test_bnbfy_names_bad_weights_and_changes_nothing():
    model = gptj()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
        model.transformer.wte.weight[1] = torch.inf
    with pytest.raises(ValueError, match=r"wte\.weight has 48 NaN or Inf.*lm_head\.weight has 1"):
        bnbfy_(model)
    assert not frozen_modules(model)
    model = gptj()
    model.lm_head.double()
    with pytest.raises(TypeError, match=r"bnbfy_: lm_head\.weight must be .* got float64"):
        bnbfy_(model)
    assert not frozen_modules(model)


def test_convert_to_int8_makes_shells_for_any_model(tmp_path):
    """Of a class of one's own, as the notebooks did for T5 and BLOOM; Transformers fills them."""

    class Own(transformers.GPTJForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            convert_to_int8(self)

    state = old.state_dict()
    model = Own.from_pretrained(old.write(tmp_path, state))
    assert relative(logits(model), old.old_logits(state)) < CLOSE
    shell = Own(gptj().config)
    assert not any(b.any() for n, b in shell.named_buffers() if n.endswith((".weight", ".absmax")))


# Bad input


def test_other_checkpoints_are_named(float_dir, stored_dir):
    for path in (float_dir, stored_dir):
        with pytest.raises(ValueError, match=r"model-.*safetensors: holds no 8-bit weights as"):
            GPTJForCausalLM.from_pretrained(path)


def test_what_is_in_8_bits_is_not_quantized_again(old_dir):
    """Their adapters would have become 8-bit layers."""
    model = GPTJForCausalLM.from_pretrained(old_dir)
    add_adapters(model)
    with pytest.raises(ValueError, match=r"transformer\.wte is in 8 bits, as a FrozenBNBEmbedding"):
        gptj_q8.quantize_(model)
    assert not any(isinstance(module, gptj_q8.Q8Linear) for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_bad_scales(tmp_path, value):
    state = old.state_dict()
    state["lm_head.absmax"][1] = value
    with pytest.raises(ValueError, match=r"lm_head: absmax"):
        GPTJForCausalLM.from_pretrained(old.write(tmp_path, state))
    with pytest.raises(RuntimeError, match=r"lm_head: absmax"):
        GPTJForCausalLM(gptj().config).load_state_dict(state)


def test_float_state_dicts_are_refused():
    """PyTorch would cast them to uint8."""
    state = {**old.state_dict(), "lm_head.weight": gptj().lm_head.weight.detach()}
    with pytest.raises(RuntimeError, match=r"lm_head: codes must be uint8, got float32"):
        GPTJForCausalLM(gptj().config).load_state_dict(state, strict=False)


def test_everything_is_there():
    assert all(hasattr(hivemind, name) for name in hivemind.__all__)
    assert len(hivemind.__all__) == 10
