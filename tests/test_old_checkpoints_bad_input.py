"""What is refused of a checkpoint of the hivemind family, and that file and tensor are named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hivemind_layout as old
import pytest
import torch
import transformers
from tiny import contents, gpt2, gptj, logits, relative
from transformers import GPTJForCausalLM

import gptj_q8
from gptj_q8 import hivemind
from gptj_q8.checkpoint import convert_checkpoint
from gptj_q8.config import Q8Config

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, torch.Tensor]


@pytest.fixture(params=["load", "convert", "hivemind"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], Any]:
    """Each way to read such a checkpoint; a conversion must leave nothing behind."""

    def convert(path: Path) -> None:
        target = tmp_path / "place" / "new"
        target.parent.mkdir()
        try:
            convert_checkpoint(path, target)
        finally:
            assert not list(target.parent.iterdir())

    return {
        "load": gptj_q8.from_pretrained,
        "convert": convert,
        "hivemind": hivemind.GPTJForCausalLM.from_pretrained,
    }[request.param]


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
def test_parts_that_do_not_fit(tmp_path, read, form, change, error, message):
    old.write(tmp_path / "old", changed(change), form)
    file = "pytorch_model.bin" if form == "bin" else "model.safetensors"
    with pytest.raises(error, match=rf"{file}: {message}"):
        read(tmp_path / "old")


def test_codes_of_another_shape(tmp_path, read):
    def turn(state: State) -> None:
        state[f"{NAME}.weight"] = state[f"{NAME}.weight"].T.contiguous()

    old.write(tmp_path / "old", changed(turn))
    message = rf"pytorch_model\.bin: {NAME}\.weight must have shape \[192, 48\] for this model"
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "old")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_bad_scales(tmp_path, read, value):
    state = changed(lambda s: s[f"{NAME}.absmax"][1:2].fill_(value))
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin: {NAME}: absmax"):
        read(old.write(tmp_path / "old", state))


@pytest.mark.parametrize("value", [float("nan"), 2.0])
def test_bad_table(tmp_path, read, value):
    table = old.dynamic_map()
    table[7] = value
    state = old.state_dict()
    state[f"{NAME}.code"] = table
    message = rf"pytorch_model\.bin: {NAME}: codebook must lie in \[-1, 1\]"
    with pytest.raises(ValueError, match=message):
        read(old.write(tmp_path / "old", state))


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
def test_bad_adapters(tmp_path, read, change, message):
    old.write(tmp_path / "old", changed(change, adapters="hivemind"))
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin: .*{message}"):
        read(tmp_path / "old")


# Another architecture


def test_checkpoint_of_another_architecture(tmp_path, read):
    """The names of GPT-2's tensors under the config.json of a GPT-J."""
    state = old.state_dict()
    for name in [name for name in state if ".attn.q_proj." in name]:
        state[name.replace("attn.q_proj", "attn.c_attn")] = state.pop(name)
    message = (
        r"pytorch_model\.bin: holds 8-bit transformer\.h\.0\.attn\.c_attn\.weight, which GPTJFor"
    )
    with pytest.raises(ValueError, match=message):
        read(old.write(tmp_path / "old", state))


def test_config_of_another_architecture(tmp_path):
    old.write(tmp_path / "old", old.state_dict())
    gpt2().config.save_pretrained(tmp_path / "old")
    message = (
        r"holds 8-bit transformer\.h\.0\.attn\.k_proj\.weight, which GPT2LMHeadModel has no place"
    )
    for read in (gptj_q8.from_pretrained, lambda path: convert_checkpoint(path, tmp_path / "new")):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "old")


def test_8_bits_where_floats_belong(tmp_path, read):
    def swap(state: State) -> None:
        for part in ("weight", "absmax", "code"):
            state[f"transformer.ln_f.{part}"] = state[f"{NAME}.{part}"]

    old.write(tmp_path / "old", changed(swap))
    message = r"pytorch_model\.bin: holds 8-bit transformer\.ln_f\.weight, which GPTJForCausalLM"
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "old")


def test_config_of_another_size(tmp_path, read):
    state = old.state_dict()
    bigger = GPTJForCausalLM(gptj(n_embd=64).config)
    old.write(tmp_path / "old", state, model=bigger)
    with pytest.raises(ValueError, match=r"\.weight must have shape \[\d+, 64\] for this model"):
        read(tmp_path / "old")


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


def test_plain_transformers_still_says_what_is_amiss(tmp_path):
    """Files that cannot be looked into fail as they do without this package."""
    path = old.write(tmp_path / "old", old.state_dict())
    (path / "pytorch_model.bin").write_bytes(b"x" * 100)
    with pytest.raises(Exception, match=r"(?i)unpickl|pickle|weights.only|load key"):
        GPTJForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("said", [["logging"], ["GPTJConfig"], ["NoSuchClass"], []])
def test_a_class_that_is_no_model(tmp_path, said):
    """Then config.json's model_type says which."""
    path = old.write(tmp_path / "old", old.state_dict())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": said}))
    convert_checkpoint(path, tmp_path / "new")
    new = gptj_q8.from_pretrained(tmp_path / "new")
    assert torch.equal(logits(new), logits(gptj_q8.from_pretrained(path)))


# Files


@pytest.mark.parametrize("form", ["bin", "safetensors", "bin-shards", "safetensors-shards"])
def test_truncated(tmp_path, read, form):
    old.write(tmp_path / "old", old.state_dict(), form)
    file = sorted((tmp_path / "old").glob("*model*"))[-1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{file.name}: truncated or damaged"):
        read(tmp_path / "old")


@pytest.mark.parametrize("form", ["bin-shards", "safetensors-shards"])
@pytest.mark.parametrize("how", ["swapped", "twice", "another's"])
def test_mixed_up_shards(tmp_path, read, form, how):
    old.write(tmp_path / "old", old.state_dict(), form)
    first, second, _ = sorted(tmp_path.glob("old/*-0000*"))
    message = rf"{first.name}: lacks \S+, which .*index\.json has there"
    if how == "swapped":
        first.rename(tmp_path / "kept")
        second.rename(first)
        (tmp_path / "kept").rename(second)
    elif how == "twice":
        shutil.copy(first, second)
        message = rf"{second.name}: holds \S+, which .*{first.name} holds too"
    else:
        bigger = old.state_dict(model=gptj(n_layer=3))
        shutil.copy(sorted(old.write(tmp_path / "x", bigger, form).glob("*-00002-*"))[0], second)
        message = r"(holds|lacks) \S+, which"
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "old")


def test_missing_shard(tmp_path, read):
    old.write(tmp_path / "old", old.state_dict(), "bin-shards")
    (tmp_path / "old" / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(OSError, match="pytorch_model-00002-of-00003"):
        read(tmp_path / "old")


# Pickles


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("dtype_is_said", [False, True])
@pytest.mark.parametrize("where", ["beside", "instead", "whole"])
def test_a_pickle_that_wants_to_run_code(tmp_path, read, where, dtype_is_said):
    """Refused by name, and nothing has run: it would have left a file."""
    path = old.write(tmp_path / "old", old.state_dict())
    if not dtype_is_said:
        config = json.loads((path / "config.json").read_text())
        del config["torch_dtype"]
        (path / "config.json").write_text(json.dumps(config))
    evil = Evil(tmp_path / "ran")
    state: object = {**old.state_dict(), "lm_head.bias" if where == "instead" else "more": evil}
    torch.save(evil if where == "whole" else state, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: refused, .* asks for posix\.system"):
        read(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # so it was dangerous


def test_no_one_may_ask_for_it(tmp_path):
    path = old.write(tmp_path / "old", old.state_dict())
    for read in (gptj_q8.from_pretrained, hivemind.GPTJForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="weights_only=False would run code"):
            read(path, weights_only=False)


def test_a_pickled_module_is_refused(tmp_path, read):
    """As some offered their fine-tuned models."""
    path = old.write(tmp_path / "old", old.state_dict())
    torch.save(gptj(), path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: refused, .* asks for .*GPTJFor"):
        read(path)


def test_a_pickle_of_something_else(tmp_path, read):
    path = old.write(tmp_path / "old", old.state_dict())
    torch.save([torch.zeros(3)], path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: .* holds no state dict but a list"):
        read(path)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda s: {"state_dict": s, "epoch": 3}, "it holds no tensors but 'state_dict', 'epoch'"),
        (lambda s: {**s, 3: torch.zeros(1)}, "it holds a tensor whose name is no text but 3"),
    ],
)
def test_a_pickle_with_other_names(tmp_path, read, wrap, message):
    path = old.write(tmp_path / "old", old.state_dict())
    torch.save(wrap(old.state_dict()), path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin: .*{message}"):
        read(path)


def test_a_dtype_that_cannot_be_copied(tmp_path):
    state = {**old.state_dict(), "more": torch.zeros(3, dtype=torch.complex64)}
    old.write(tmp_path / "old", state)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: more is of a dtype that gptj_q8"):
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_noise(tmp_path, read):
    path = old.write(tmp_path / "old", old.state_dict())
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 100, 5000):
        noise = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        (path / "pytorch_model.bin").write_bytes(noise.numpy().tobytes())
        shutil.rmtree(tmp_path / "place", ignore_errors=True)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: truncated or damaged"):
            read(path)
    assert contents(tmp_path).keys() == {"old/config.json", "old/pytorch_model.bin"}
