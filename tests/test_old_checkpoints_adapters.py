"""Adapters inside checkpoints of the hivemind family, against what the old code computes."""

from __future__ import annotations

import json
from pathlib import Path

import hivemind_layout as old
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import logits, relative

import gptj_q8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", old.ADAPTERS[1:])
@pytest.mark.parametrize("form", old.FORMS[:2])
def test_loading_with_adapters(tmp_path, form, kind):
    state = old.state_dict(adapters=kind)
    model = gptj_q8.from_pretrained(old.write(tmp_path, state, form))
    old.assert_same_weights(model, state)
    expected = old.old_logits(state)
    assert relative(logits(model), expected) < old.CLOSE
    assert relative(old.old_logits(old.state_dict()), expected) > 0.01  # adapters matter


def saved_with_adapters(tmp_path, change: float) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model that came with adapters, trained on and saved; and what the old code would hold."""
    state = old.state_dict(adapters="hivemind")
    model = gptj_q8.from_pretrained(old.write(tmp_path / "old", state))
    with torch.no_grad():
        model.get_submodule("transformer.h.0.attn.q_proj").lora_B["default"].weight += change
    model.save_pretrained(tmp_path / "tuned")
    name = "transformer.h.0.attn.q_proj.adapter.1.weight"
    return tmp_path / "tuned", {**state, name: state[name] + change}


def test_saving_adapters_that_came_along(tmp_path):
    """They alone are written, and loading them brings the model back, trained as they are."""
    tuned, state = saved_with_adapters(tmp_path, change=0.1)
    written = load_file(tuned / "adapter_model.safetensors")
    assert not any(tensor.dtype == torch.uint8 for tensor in written.values())
    expected = old.old_logits(state)
    before = gptj_q8.from_pretrained(tmp_path / "old")
    assert relative(logits(before), expected) > 0.001
    again, info = gptj_q8.from_pretrained(tuned, output_loading_info=True)
    assert not any(info.values()), info
    assert relative(logits(again), expected) < old.CLOSE
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert len(trainable) == 28
    assert all(".lora_" in name for name in trainable)


def test_new_adapters_do_not_mix_with_those_that_came_along(tmp_path):
    """PEFT would have overwritten some and kept the others."""
    state = old.state_dict(adapters="hivemind")
    model = gptj_q8.from_pretrained(old.write(tmp_path, state))
    own = model.peft_config["default"]
    for add in (lambda: get_peft_model(model, lora()), lambda: gptj_q8.add_lora(model)):
        with pytest.raises(ValueError, match="loaded with an adapter named 'default'"):
            add()
    assert model.peft_config == {"default": own}
    assert relative(logits(model), old.old_logits(state)) < old.CLOSE
    both = get_peft_model(model, lora(), adapter_name="new")
    bare = old.old_logits(old.state_dict())
    assert relative(logits(both), bare) < old.CLOSE  # the new one is active
    both.base_model.set_adapter(["default", "new"])
    assert relative(logits(both), old.old_logits(state)) < old.CLOSE


def test_new_adapters_in_the_place_of_those_that_came_along(tmp_path):
    model = gptj_q8.from_pretrained(old.write(tmp_path, old.state_dict(adapters="hivemind")))
    model.delete_adapter("default")
    tuned = get_peft_model(model, lora())
    assert relative(logits(tuned), old.old_logits(old.state_dict())) < old.CLOSE


def lora():
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def test_an_adapter_that_does_not_name_its_model(tmp_path):
    tuned, _ = saved_with_adapters(tmp_path, change=0.1)
    config = json.loads((tuned / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (tuned / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"adapter_config\.json: does not say which model"):
        gptj_q8.from_pretrained(tuned)


def test_adapters_of_layers_on_the_disk_are_refused(tmp_path):
    """Transformers would not find the layer's data under its name in PEFT: inf came out."""
    options = {
        "device_map": {"transformer": "cpu", "lm_head": "disk"},
        "offload_folder": tmp_path / "offload",
    }
    old.write(tmp_path / "old", old.state_dict(adapters="hivemind"))
    message = r"pytorch_model\.bin: lm_head\.adapter\.0\.weight is an adapter .*gptj-q8 convert"
    with pytest.raises(ValueError, match=message):
        gptj_q8.from_pretrained(tmp_path / "old", **options)
    state = old.state_dict(adapters="attention")  # none on what is offloaded
    model = gptj_q8.from_pretrained(old.write(tmp_path / "few", state), **options)
    assert relative(logits(model), old.old_logits(state)) < old.CLOSE
