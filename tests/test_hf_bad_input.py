"""What from_pretrained refuses, and what it says of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import QUICK, change_tensors, contents, gptj, load, logits
from transformers import AutoConfig, GPTJForCausalLM

from gptj_q8.config import Q8Config


def change_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


# Float checkpoints


def test_bad_weights_are_all_named_while_loading(tmp_path):
    model = gptj()
    with torch.no_grad():
        model.lm_head.weight[0, :5] = float("nan")
        model.transformer.h[1].mlp.fc_in.weight[3, 3] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="NaN or Inf") as caught:
        load(tmp_path, quantization_config=QUICK)
    assert "lm_head.weight has 5 NaN or Inf values" in str(caught.value)
    assert "transformer.h.1.mlp.fc_in.weight has 1 NaN or Inf values" in str(caught.value)


def test_dtype_that_no_layer_can_have(float_dir):
    with pytest.raises(TypeError, match=r"from_pretrained: .*\.weight must be .*, got float64"):
        load(float_dir, quantization_config=QUICK, dtype=torch.float64)


def test_nothing_to_quantize(float_dir):
    everything = Q8Config(modules_to_not_convert=["transformer", "lm_head"])
    with pytest.raises(ValueError, match=r"no nn\.Linear or nn\.Embedding to quantize"):
        load(float_dir, quantization_config=everything)


def test_exemption_that_matches_nothing_is_told(float_dir, caplog):
    with caplog.at_level(logging.WARNING, "gptj_q8"):
        config = Q8Config(codebook="dynamic", modules_to_not_convert=["lmhead"])
        load(float_dir, quantization_config=config)
    assert "matches no module: lmhead" in caplog.text


# Stored 8-bit models


def test_absmax_of_the_wrong_length(one_file):
    change_tensors(
        one_file, lambda t: t.update({"lm_head.absmax": t["lm_head.absmax"][:-1].clone()})
    )
    with pytest.raises(ValueError, match=r"lm_head\.absmax must have shape \[25\] .*, got \[24\]"):
        load(one_file)


def test_block_size_that_does_not_fit(one_file):
    change_config(one_file, block_size=128)
    with pytest.raises(ValueError, match=r"absmax must have shape .* at block_size 128"):
        load(one_file)


@pytest.mark.parametrize("part", ["absmax", "codebook"])
def test_part_missing(one_file, part):
    change_tensors(one_file, lambda tensors: tensors.pop(f"lm_head.{part}"))
    with pytest.raises(
        ValueError, match=rf"lm_head\.codes is there but lm_head\.{part} is missing"
    ):
        load(one_file)


def test_codes_of_another_dtype(one_file):
    change_tensors(one_file, lambda t: t.update({"lm_head.codes": t["lm_head.codes"].float()}))
    with pytest.raises(TypeError, match=r"lm_head\.codes must be uint8, got float32"):
        load(one_file)


def test_codes_of_another_shape(one_file):
    def reshape(tensors):
        tensors["lm_head.codes"] = tensors["lm_head.codes"].T.contiguous()

    change_tensors(one_file, reshape)
    message = r"lm_head\.codes must have shape \[130, 48\] for this model, got \[48, 130\]"
    with pytest.raises(ValueError, match=message):
        load(one_file)


def test_state_dict_instead_of_files(stored_dir):
    model = load(stored_dir)
    config = AutoConfig.from_pretrained(stored_dir)
    state = dict(model.state_dict())
    again = GPTJForCausalLM.from_pretrained(None, config=config, state_dict=state)
    assert torch.equal(logits(again), logits(model))
    del state["lm_head.absmax"]
    config = AutoConfig.from_pretrained(stored_dir)
    with pytest.raises(ValueError, match=r"the state_dict lacks lm_head\.absmax"):
        GPTJForCausalLM.from_pretrained(None, config=config, state_dict=state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.flip(0), r"lm_head: codebook must be sorted"),
        (
            lambda table: table.index_fill(0, torch.tensor(7), torch.nan),
            r"lm_head: codebook .* nan",
        ),
        (lambda table: table * 2, r"lm_head: codebook must lie in \[-1, 1\]"),
        (lambda table: table[:255].clone(), r"lm_head\.codebook must have shape \[256\]"),
    ],
)
def test_bad_codebook(one_file, change, message):
    key = "lm_head.codebook"
    change_tensors(one_file, lambda tensors: tensors.update({key: change(tensors[key])}))
    with pytest.raises(ValueError, match=message):
        load(one_file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_bad_scale(one_file, value):
    change_tensors(one_file, lambda tensors: tensors["lm_head.absmax"][3:4].fill_(value))
    with pytest.raises(ValueError, match="lm_head: absmax"):
        load(one_file)


def test_newer_format_is_refused(one_file):
    change_config(one_file, format_version=2, something_new=True)
    with pytest.raises(ValueError, match=r"config\.json: format_version 2 is newer than 1"):
        load(one_file)


def test_newer_format_in_the_weights_is_refused(one_file):
    path = one_file / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "format_version": "3"})
    with pytest.raises(ValueError, match=r"model\.safetensors: format_version 3 is newer than 1"):
        load(one_file)


# Either


@pytest.mark.parametrize("kind", ["float", "stored"])
def test_truncated_shard(kind, float_dir, stored_dir, tmp_path):
    source = float_dir if kind == "float" else stored_dir
    for name, data in contents(source).items():
        (tmp_path / name).write_bytes(data[:-1] if name.startswith("model-00002") else data)
    options = {"quantization_config": QUICK} if kind == "float" else {}
    with pytest.raises(ValueError, match=r"model-00002-of-.*truncated or damaged"):
        load(tmp_path, **options)


@pytest.mark.parametrize("kind", ["float", "stored"])
def test_missing_shard(kind, float_dir, stored_dir, tmp_path):
    source = float_dir if kind == "float" else stored_dir
    for name, data in contents(source).items():
        if not name.startswith("model-00002"):
            (tmp_path / name).write_bytes(data)
    options = {"quantization_config": QUICK} if kind == "float" else {}
    with pytest.raises(OSError, match="model-00002-of"):
        load(tmp_path, **options)
