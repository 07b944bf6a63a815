"""add_lora, and what an 8-bit model refuses of PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapters import EVERYTHING, SIX, lora
from families import family
from peft import PromptTuningConfig, get_peft_model
from tiny import QUICK
from transformers import GPTJForCausalLM

import gptj_q8


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    torch.manual_seed(0)


def test_add_lora_takes_all_matrices_or_names(eight_bit_gptj: GPTJForCausalLM) -> None:
    def adapted(**options: Any) -> set[str]:
        model = gptj_q8.add_lora(copy.deepcopy(eight_bit_gptj), **options)
        layers = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
        return {name.rpartition(".")[2] for name in layers}

    assert adapted() == set(SIX)
    assert adapted(targets=["all", "lm_head", "wte"]) == set(EVERYTHING)
    assert adapted(targets="lm_head") == {"lm_head"}


def test_add_lora_passes_its_options_on(eight_bit_gptj: GPTJForCausalLM) -> None:
    model = gptj_q8.add_lora(
        copy.deepcopy(eight_bit_gptj),
        r=4,
        alpha=6,
        dropout=0.25,
        rslora=True,
        dora=True,
        bias="all",
    )
    config = model.peft_config["default"]
    layer = model.base_model.model.transformer.h[0].attn.q_proj
    assert layer.scaling["default"] == 6 / 2
    assert (config.lora_dropout, config.use_dora, config.bias) == (0.25, True, "all")
    assert config.task_type == "CAUSAL_LM"
    assert gptj_q8.add_lora(model, r=2, adapter_name="more") is model
    assert model.active_adapters == ["default"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "r": ({"r": 0}, "r must be a positive whole number, got 0"),
    "half": ({"r": 2.5}, "r must be a positive whole number, got 2.5"),
    "alpha": ({"alpha": -1}, "alpha must be positive, got -1"),
    "dropout": ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    "typo": ({"targets": ["q_proj", "kproj"]}, "no module named 'kproj'"),
    "none": ({"targets": []}, "targets is empty"),
    "norm": ({"targets": ["q_proj", "ln_1"]}, "'ln_1' is a LayerNorm and has no matrix"),
    "parent": ({"targets": ["q_proj", "mlp"]}, "'mlp' is a GPTJMLP and has no matrix"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_add_lora_refuses_bad_options(
    options: dict[str, Any], message: str, eight_bit_gptj: GPTJForCausalLM
) -> None:
    model = copy.deepcopy(eight_bit_gptj)
    with pytest.raises(ValueError, match=message):
        gptj_q8.add_lora(model, **options)
    assert not hasattr(model, "peft_config")
    assert not any(hasattr(module, "lora_A") for module in model.modules())


def test_add_lora_refuses_a_name_twice(eight_bit_gptj: GPTJForCausalLM) -> None:
    model = gptj_q8.add_lora(copy.deepcopy(eight_bit_gptj))
    with pytest.raises(ValueError, match="adapter named 'default' already"):
        gptj_q8.add_lora(model)


REFUSED = {
    "pissa": ({"init_lora_weights": "pissa"}, "'pissa' changes the base weights"),
    "olora": ({"init_lora_weights": "olora"}, "'olora' changes the base weights"),
    "lm_head": ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head is in 8 bits"),
    "parent": ({"modules_to_save": ["mlp"]}, r"transformer.h.0.mlp.fc_in is in 8 bits"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: only plain LoRA"),
    "parameters": (
        {"target_modules": [], "target_parameters": ["q_proj.codes"]},
        "target_parameters: .*q_proj.codes is in 8 bits",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_silently_wrong_is_refused(
    options: dict[str, Any], message: str, eight_bit_gptj: GPTJForCausalLM
) -> None:
    model = copy.deepcopy(eight_bit_gptj)
    with pytest.raises((ValueError, RuntimeError), match=message):
        get_peft_model(model, lora(**options))
    assert not any(hasattr(module, "lora_A") for module in model.modules())


def test_an_embedding_that_shifts_its_ids_is_refused_by_name() -> None:
    model = gptj_q8.quantize_(family("opt"), QUICK)
    with pytest.raises(ValueError, match=r"embed_positions computes its ids itself"):
        get_peft_model(model, lora(target_modules=["embed_positions"]))


def test_prompt_tuning_is_refused_by_name(eight_bit_gptj: GPTJForCausalLM) -> None:
    with pytest.raises(ValueError, match="prompt learning needs a float embedding"):
        get_peft_model(
            copy.deepcopy(eight_bit_gptj), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)
        )
