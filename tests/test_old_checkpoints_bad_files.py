"""Damaged, mixed-up and dangerous files of the hivemind family are refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import hivemind_layout as old
import pytest
import torch
from tiny import contents, gptj
from transformers import GPTJForCausalLM

import gptj_q8
from gptj_q8 import hivemind
from gptj_q8.checkpoint import convert_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("form", ["bin", "safetensors", "bin-shards", "safetensors-shards"])
def test_truncated(tmp_path, read_old, form):
    old.write(tmp_path / "old", old.state_dict(), form)
    file = sorted((tmp_path / "old").glob("*model*"))[-1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{file.name}: truncated or damaged"):
        read_old(tmp_path / "old")


@pytest.mark.parametrize("form", ["bin-shards", "safetensors-shards"])
@pytest.mark.parametrize("how", ["swapped", "twice", "another's"])
def test_mixed_up_shards(tmp_path, read_old, form, how):
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
        read_old(tmp_path / "old")


def test_missing_shard(tmp_path, read_old):
    old.write(tmp_path / "old", old.state_dict(), "bin-shards")
    (tmp_path / "old" / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(OSError, match="pytorch_model-00002-of-00003"):
        read_old(tmp_path / "old")


# Pickles


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("dtype_is_said", [False, True])
@pytest.mark.parametrize("where", ["beside", "instead", "whole"])
def test_a_pickle_that_wants_to_run_code(tmp_path, read_old, where, dtype_is_said):
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
        read_old(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # so it was dangerous


def test_no_one_may_ask_for_it(tmp_path):
    path = old.write(tmp_path / "old", old.state_dict())
    for read_old in (gptj_q8.from_pretrained, hivemind.GPTJForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="weights_only=False would run code"):
            read_old(path, weights_only=False)


def test_a_pickled_module_is_refused(tmp_path, read_old):
    """As some offered their fine-tuned models."""
    path = old.write(tmp_path / "old", old.state_dict())
    torch.save(gptj(), path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: refused, .* asks for .*GPTJFor"):
        read_old(path)


def test_a_pickle_of_something_else(tmp_path, read_old):
    path = old.write(tmp_path / "old", old.state_dict())
    torch.save([torch.zeros(3)], path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: .* holds no state dict but a list"):
        read_old(path)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda s: {"state_dict": s, "epoch": 3}, "it holds no tensors but 'state_dict', 'epoch'"),
        (lambda s: {**s, 3: torch.zeros(1)}, "it holds a tensor whose name is no text but 3"),
    ],
)
def test_a_pickle_with_other_names(tmp_path, read_old, wrap, message):
    path = old.write(tmp_path / "old", old.state_dict())
    torch.save(wrap(old.state_dict()), path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin: .*{message}"):
        read_old(path)


def test_a_dtype_that_cannot_be_copied(tmp_path):
    state = {**old.state_dict(), "more": torch.zeros(3, dtype=torch.complex64)}
    old.write(tmp_path / "old", state)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: more is of a dtype that gptj_q8"):
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_noise(tmp_path, read_old):
    path = old.write(tmp_path / "old", old.state_dict())
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 100, 5000):
        noise = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        (path / "pytorch_model.bin").write_bytes(noise.numpy().tobytes())
        shutil.rmtree(tmp_path / "place", ignore_errors=True)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: truncated or damaged"):
            read_old(path)
    assert contents(tmp_path).keys() == {"old/config.json", "old/pytorch_model.bin"}


def test_plain_transformers_still_says_what_is_amiss(tmp_path):
    """Files that cannot be looked into fail as they do without this package."""
    path = old.write(tmp_path / "old", old.state_dict())
    (path / "pytorch_model.bin").write_bytes(b"x" * 100)
    with pytest.raises(Exception, match=r"(?i)unpickl|pickle|weights.only|load key"):
        GPTJForCausalLM.from_pretrained(path)
