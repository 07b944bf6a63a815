"""Adapter files: they hold the adapter alone and load anywhere; nothing is lost on the way."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import EXACT, SIX, attach, lora, scramble
from peft import AutoPeftModelForCausalLM, PeftModel, prepare_model_for_kbit_training
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from tiny import gptj, load, logits, relative
from transformers import GPTJForCausalLM

import gptj_q8


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    torch.manual_seed(0)


def test_an_adapter_file_holds_the_adapter_alone_and_loads_anywhere(
    eight_bit_gptj: GPTJForCausalLM, decoded_gptj: GPTJForCausalLM, tmp_path: Path
) -> None:
    a = attach(eight_bit_gptj, lora())
    right = logits(a)
    a.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".lora_" in name for name in stored)
    assert len(stored) == 2 * (2 * 6 + 2)
    for base, bound in ((eight_bit_gptj, 0.0), (decoded_gptj, EXACT)):
        for low_memory in (False, True):
            again = PeftModel.from_pretrained(
                copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_memory
            )
            assert relative(logits(again), right) <= bound
    native = copy.deepcopy(eight_bit_gptj)
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native), right)
    other_blocks = gptj_q8.quantize_(gptj(), gptj_q8.Q8Config(block_size=64))
    again = PeftModel.from_pretrained(other_blocks, tmp_path)
    assert relative(logits(again), right) < 0.05


def test_an_adapter_is_swapped_for_one_from_a_file(
    eight_bit_gptj: GPTJForCausalLM, tmp_path: Path
) -> None:
    stored = attach(eight_bit_gptj, lora(target_modules=SIX))
    stored.save_pretrained(tmp_path)
    model = attach(eight_bit_gptj, lora(target_modules=SIX))
    scramble(model, seed=2)
    assert not torch.equal(logits(model), logits(stored))
    hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(logits(model), logits(stored))


def test_dora_loads_again(eight_bit_gptj: GPTJForCausalLM, tmp_path: Path) -> None:
    a = attach(eight_bit_gptj, lora(use_dora=True))
    a.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(
            copy.deepcopy(eight_bit_gptj), tmp_path, low_cpu_mem_usage=low_memory
        )
        assert relative(logits(again), logits(a)) < EXACT


def test_an_adapter_of_the_float_model_loads_on_8_bits(
    eight_bit_gptj: GPTJForCausalLM, decoded_gptj: GPTJForCausalLM, tmp_path: Path
) -> None:
    b = attach(decoded_gptj, lora())
    b.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(copy.deepcopy(eight_bit_gptj), tmp_path)
    assert relative(logits(again), logits(b)) < EXACT


PLAIN_RELOAD = """
import sys, torch{first}
from peft import AutoPeftModelForCausalLM
{last}
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
kinds = {{type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")}}
assert kinds == {{"Q8LoraLinear"}}, kinds
torch.save(model(torch.arange(12)[None]).logits.detach(), sys.argv[2])
"""


@pytest.mark.parametrize("order", ["first", "last"])
def test_plain_peft_reloads_in_a_new_process(order: str, stored_dir: Path, tmp_path: Path) -> None:
    """Without helper of ours, whichever of the two is imported first."""
    model = gptj_q8.add_lora(load(stored_dir), r=4)
    scramble(model)
    model.save_pretrained(tmp_path / "adapter")
    imports = {"first": "", "last": ""}
    imports[order] = "; import gptj_q8" if order == "first" else "import gptj_q8"
    code = PLAIN_RELOAD.format(**imports)
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "adapter", tmp_path / "logits"], check=True
    )
    assert torch.equal(torch.load(tmp_path / "logits"), logits(model.eval()))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_peft_preparing_for_kbit_training_checkpoints(stored_dir: Path) -> None:
    model = prepare_model_for_kbit_training(load(stored_dir))
    assert model.is_gradient_checkpointing
    assert not hasattr(model, "is_loaded_in_8bit")
