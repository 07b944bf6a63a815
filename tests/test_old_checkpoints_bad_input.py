"""What is refused of a checkpoint of the hivemind family, and that file and tensor are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import hivemind_layout as old
import pytest
import torch
import transformers
from tiny import gpt2, gptj, logits, relative
from transformers import GPTJForCausalLM

import gptj_q8
from gptj_q8 import hivemind
from gptj_q8.checkpoint import convert_checkpoint
from gptj_q8.config import Q8Config

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, torch.Tensor]


def changed(change: Callable[[State], object], **options: Any) -> State:
    state = old.state_dict(**options)
    change(state)
    return state


NAME = "transformer.h.1.mlp.fc_in"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda s: s.update({f"{NAME}.absmax": s[f"{NAME}.absmax"][:-1]}),
            ValueError,
            rf"{NAME}\.absmax must have shape \[3\] for 9216 codes in blocks of 4096, got \[2\]",
        ),
        (
            lambda s: s.update({f"{NAME}.code": s[f"{NAME}.code"][:255]}),
            ValueError,
            rf"{NAME}\.code must have shape \[256\], got \[255\]",
        ),
        (
            lambda s: s.update({f"{NAME}.weight": s[f"{NAME}.weight"].float()}),
            TypeError,
            rf"{NAME}\.weight must be uint8, got float32",
        ),
        (
            lambda s: s.update({f"{NAME}.code": s[f"{NAME}.code"].double()}),
            TypeError,
            rf"{NAME}\.code must be float32 or bfloat16 or float16, got float64",
        ),
        (
            lambda s: s.update({f"{NAME}.weight": s[f"{NAME}.weight"].flatten()}),
            ValueError,
            rf"{NAME}\.weight must have 2 dimensions, got \[9216\]",
        ),
        (
            lambda s: s.pop(f"{NAME}.absmax"),
            ValueError,
            rf"{NAME}\.weight is there but {NAME}\.absmax is missing",
        ),
        (
            lambda s: s.pop(f"{NAME}.weight"),
            ValueError,
            rf"{NAME}\.absmax is there but {NAME}\.weight is missing",
        ),
        (
            lambda s: [s.pop(f"{NAME}.{part}") for part in ("weight", "absmax", "code")],
            ValueError,
            rf"lacks (8-bit )?{NAME}\.weight, which GPTJForCausalLM needs",
        ),
    ],
)
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_parts_that_do_not_fit(tmp_path, read_old, form, change, error, message):
    old.write(tmp_path / "old", changed(change), form)
    file = "pytorch_model.bin" if form == "bin" else "model.safetensors"
    with pytest.raises(error, match=rf"{file}: {message}"):
        read_old(tmp_path / "old")


def test_codes_of_another_shape(tmp_path, read_old):
    def turn(state: State) -> None:
        state[f"{NAME}.weight"] = state[f"{NAME}.weight"].T.contiguous()

    old.write(tmp_path / "old", changed(turn))
    message = rf"pytorch_model\.bin: {NAME}\.weight must have shape \[192, 48\] for this model"
    with pytest.raises(ValueError, match=message):
        read_old(tmp_path / "old")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_bad_scales(tmp_path, read_old, value):
    state = changed(lambda s: s[f"{NAME}.absmax"][1:2].fill_(value))
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin: {NAME}: absmax"):
        read_old(old.write(tmp_path / "old", state))


@pytest.mark.parametrize("value", [float("nan"), 2.0])
def test_bad_table(tmp_path, read_old, value):
    table = old.dynamic_map()
    table[7] = value
    state = old.state_dict()
    state[f"{NAME}.code"] = table
    message = rf"pytorch_model\.bin: {NAME}: codebook must lie in \[-1, 1\]"
    with pytest.raises(ValueError, match=message):
        read_old(old.write(tmp_path / "old", state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lm_head.adapter.1.weight"), r"lm_head must be the weights 0 and 1, or"),
        (
            lambda s: s.update({"lm_head.adapter.0.bias": torch.zeros(3)}),
            r"lm_head\.adapter\.0\.bias is no part of an adapter known here",
        ),
        (
            lambda s: s.update({"lm_head.adapter.0.weight": torch.zeros(3, 47)}),
            r"lm_head\.adapter\.0\.weight must have shape \[3, 48\] for this model, got \[3, 47\]",
        ),
        (
            lambda s: s.update({"transformer.wte.adapter.1.weight": torch.zeros(47, 3)}),
            r"wte\.adapter\.1\.weight must have shape \[48, 3\] for this model, got \[47, 3\]",
        ),
        (
            lambda s: s.update(
                {
                    "lm_head.adapter.0.weight": torch.zeros(0, 48),
                    "lm_head.adapter.1.weight": torch.zeros(130, 0),
                }
            ),
            r"lm_head\.adapter\.1\.weight must have 2 dimensions above 0, got \[130, 0\]",
        ),
        (
            lambda s: s.update({"lm_head.adapter.1.weight": torch.tensor(1.0)}),
            r"lm_head\.adapter\.1\.weight must have 2 dimensions above 0, got \[\]",
        ),
        (
            lambda s: s["lm_head.adapter.0.weight"][0, :2].fill_(torch.nan),
            r"lm_head\.adapter\.0\.weight has 2 NaN or Inf values",
        ),
    ],
)
def test_bad_adapters(tmp_path, read_old, change, message):
    old.write(tmp_path / "old", changed(change, adapters="hivemind"))
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin: .*{message}"):
        read_old(tmp_path / "old")


# Another architecture


def test_checkpoint_of_another_architecture(tmp_path, read_old):
    """The names of GPT-2's tensors under the config.json of a GPT-J."""
    state = old.state_dict()
    for name in [name for name in state if ".attn.q_proj." in name]:
        state[name.replace("attn.q_proj", "attn.c_attn")] = state.pop(name)
    message = (
        r"pytorch_model\.bin: holds 8-bit transformer\.h\.0\.attn\.c_attn\.weight, which GPTJFor"
    )
    with pytest.raises(ValueError, match=message):
        read_old(old.write(tmp_path / "old", state))


def test_config_of_another_architecture(tmp_path):
    old.write(tmp_path / "old", old.state_dict())
    gpt2().config.save_pretrained(tmp_path / "old")
    message = (
        r"holds 8-bit transformer\.h\.0\.attn\.k_proj\.weight, which GPT2LMHeadModel has no place"
    )
    for read_old in (
        gptj_q8.from_pretrained,
        lambda path: convert_checkpoint(path, tmp_path / "new"),
    ):
        with pytest.raises(ValueError, match=message):
            read_old(tmp_path / "old")


def test_8_bits_where_floats_belong(tmp_path, read_old):
    def swap(state: State) -> None:
        for part in ("weight", "absmax", "code"):
            state[f"transformer.ln_f.{part}"] = state[f"{NAME}.{part}"]

    old.write(tmp_path / "old", changed(swap))
    message = r"pytorch_model\.bin: holds 8-bit transformer\.ln_f\.weight, which GPTJForCausalLM"
    with pytest.raises(ValueError, match=message):
        read_old(tmp_path / "old")


def test_config_of_another_size(tmp_path, read_old):
    state = old.state_dict()
    bigger = GPTJForCausalLM(gptj(n_embd=64).config)
    old.write(tmp_path / "old", state, model=bigger)
    with pytest.raises(ValueError, match=r"\.weight must have shape \[\d+, 64\] for this model"):
        read_old(tmp_path / "old")


def test_what_is_asked_of_8_bits_that_are_there(tmp_path):
    old.write(tmp_path / "old", old.state_dict())
    config = Q8Config(block_size=64)
    with pytest.raises(ValueError, match="is in 8 bits already, which are kept"):
        gptj_q8.from_pretrained(tmp_path / "old", quantization_config=config)
    with pytest.raises(ValueError, match=r"old: is in 8 bits already, which are kept"):
        convert_checkpoint(tmp_path / "old", tmp_path / "new", config)


def test_where_the_old_modules_find_no_8_bits(tmp_path):
    """They hold nothing else: a float or missing head would be random. Ours take the float one."""
    state = old.state_dict()
    parts = [state.pop(f"lm_head.{part}") for part in ("weight", "absmax", "code")]
    message = r"pytorch_model\.bin: lacks 8-bit lm_head\.weight, which GPTJForCausalLM needs"
    with pytest.raises(ValueError, match=message):
        hivemind.GPTJForCausalLM.from_pretrained(old.write(tmp_path / "none", state))
    state["lm_head.weight"] = old.decode(*parts)
    old.write(tmp_path / "float", state)
    with pytest.raises(ValueError, match=message):
        hivemind.GPTJForCausalLM.from_pretrained(tmp_path / "float")
    expected = old.old_logits(old.state_dict())
    assert relative(logits(gptj_q8.from_pretrained(tmp_path / "float")), expected) < 1e-6
    convert_checkpoint(tmp_path / "float", tmp_path / "new")
    assert relative(logits(gptj_q8.from_pretrained(tmp_path / "new")), expected) < 1e-6


def test_old_modules_take_no_configuration(tmp_path):
    path = old.write(tmp_path / "old", old.state_dict())
    with pytest.raises(ValueError, match=r"GPTJForCausalLM\.from_pretrained: .* nothing to config"):
        hivemind.GPTJForCausalLM.from_pretrained(path, quantization_config=Q8Config())


@pytest.mark.parametrize("form", ["bin", "safetensors", "bin-shards"])
def test_plain_transformers_does_not_take_codes_for_weights(tmp_path, form):
    """It would: config.json says nothing of 8 bits. Its own models load as ever."""
    path = old.write(tmp_path / "old", old.state_dict(), form)
    for load in (
        transformers.AutoModelForCausalLM.from_pretrained,
        GPTJForCausalLM.from_pretrained,
        transformers.GPTJModel.from_pretrained,
    ):
        message = (
            r"old/(pytorch_)?model\S*: lm_head\.weight is in 8 bits, .*gptj_q8\.from_pretrained"
        )
        with pytest.raises(ValueError, match=message):
            load(path)
    with pytest.raises(ValueError, match=r"state_dict: lm_head\.weight is in 8 bits"):
        GPTJForCausalLM.from_pretrained(None, config=gptj().config, state_dict=old.state_dict())
    gptj().save_pretrained(tmp_path / "float")
    plain = GPTJForCausalLM.from_pretrained(tmp_path / "float")
    assert torch.equal(logits(plain), logits(gptj()))


@pytest.mark.parametrize("said", [["logging"], ["GPTJConfig"], ["NoSuchClass"], []])
def test_a_class_that_is_no_model(tmp_path, said):
    """Then config.json's model_type says which."""
    path = old.write(tmp_path / "old", old.state_dict())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": said}))
    convert_checkpoint(path, tmp_path / "new")
    new = gptj_q8.from_pretrained(tmp_path / "new")
    assert torch.equal(logits(new), logits(gptj_q8.from_pretrained(path)))
