"""Every way that people generate with GPT-J, on a quantized one.

The truth for each is the float model with the decoded weights, which Transformers alone runs.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny import GREEDY, LONG, QUICK, SHORT, gptj, padded_batch, relative

import gptj_q8

pytestmark = pytest.mark.usefixtures("one_thread")


def test_left_padding(model):
    """Each sequence of the batch gives what it gives alone."""
    ids, mask = padded_batch()
    together = model.generate(ids, attention_mask=mask, **GREEDY)[:, 7:]
    for row, alone in zip(together, (LONG, SHORT), strict=True):
        assert torch.equal(row, model.generate(alone, **GREEDY)[0, alone.shape[1] :])


def test_no_pad_token(model, decoded):
    """GPT-J has none; Transformers then pads with the end."""
    bare = copy.deepcopy(model)
    bare.config.pad_token_id = bare.generation_config.pad_token_id = None
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 3}
    mask = torch.ones_like(LONG)
    tokens = bare.generate(LONG, attention_mask=mask, **options)
    assert torch.equal(tokens, decoded.generate(LONG, attention_mask=mask, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_generate_equals_that_of_the_decoded_model(model, decoded, options):
    tokens = model.generate(LONG, **GREEDY, **options)
    assert torch.equal(tokens, decoded.generate(LONG, **GREEDY, **options))


def test_sampling_follows_the_seed(model, decoded):
    outputs = []
    for each in (model, model, decoded):
        torch.manual_seed(3)
        outputs.append(each.generate(LONG, **{**GREEDY, "do_sample": True, "top_p": 0.9}))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_static_cache_equals_the_dynamic_one(model):
    static = model.generate(LONG, **GREEDY, cache_implementation="static")
    assert torch.equal(static, model.generate(LONG, **GREEDY))


@pytest.mark.parametrize(
    ("backend", "is_there"),
    [
        ("quanto", transformers.utils.is_optimum_quanto_available),
        ("hqq", transformers.utils.is_hqq_available),
    ],
)
def test_quantized_cache(model, decoded, backend, is_there):
    if not is_there():
        pytest.skip(f"needs {backend} (pip install optimum-quanto hqq)")
    options = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": backend, "q_group_size": 16, "residual_length": 4},
    }
    tokens = model.generate(LONG, **GREEDY, **options)
    assert torch.equal(tokens, decoded.generate(LONG, **GREEDY, **options))


def test_quantized_cache_of_8_bits(model, decoded):
    """Transformers' own QuantizedCache over a quantizer that every installation has: our ops."""
    outputs = [each.generate(LONG, past_key_values=cache(), **GREEDY) for each in (model, decoded)]
    assert torch.equal(*outputs)


def cache():
    from transformers.cache_utils import Cache, QuantizedLayer

    from gptj_q8 import codebooks, ops

    table = codebooks.CODEBOOKS["dynamic"](torch.zeros(1), 32)

    class Layer(QuantizedLayer):
        def _quantize(self, tensor, axis):
            codes, absmax = ops.quantize(tensor.contiguous(), table, 32)
            return codes, absmax, tensor.dtype

        def _dequantize(self, quantized):
            codes, absmax, dtype = quantized
            return ops.dequantize(codes, absmax, table, 32, dtype)

    return Cache(layers=[Layer(residual_length=4) for _ in range(2)])


def test_assisted_generation(model):
    """A smaller model proposes; the tokens are those of the model alone."""
    assistant = gptj_q8.quantize_(gptj(seed=1, n_layer=1), QUICK)
    tokens = model.generate(LONG, assistant_model=assistant, **GREEDY)
    assert torch.equal(tokens, model.generate(LONG, **GREEDY))


def test_prompt_lookup(model):
    tokens = model.generate(LONG, prompt_lookup_num_tokens=2, **GREEDY)
    assert torch.equal(tokens, model.generate(LONG, **GREEDY))


def test_tokens_continue_in_the_second_turn(model):
    """A chat: generate, add to the cache, generate on."""
    first = model.generate(LONG, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([first.sequences, SHORT], dim=1)
    with_past = model.generate(longer, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(with_past, model.generate(longer, **GREEDY))


def test_compiled_generate():
    model = gptj_q8.quantize_(gptj(initializer_range=0.2, n_layer=1), QUICK)
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, backend="aot_eager")
    options = {**GREEDY, "cache_implementation": "static"}
    assert torch.equal(compiled.generate(LONG, **options), model.generate(LONG, **options))


def test_one_step_compiles_whole():
    """No graph break, by Inductor, as Transformers compiles decoding."""
    from transformers import StaticCache

    model = gptj_q8.quantize_(gptj(n_layer=1), QUICK)
    past = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        expected = model(LONG).logits
        step = torch.compile(model.forward, fullgraph=True)
        found = step(LONG, past_key_values=past).logits
    assert relative(found, expected) < 1e-5
