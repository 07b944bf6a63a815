"""What people do with GPT-J every day, on a quantized one.

The truth for each is the float model with the decoded weights, which Transformers alone runs.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny import LONG, QUICK, SHORT, VOCABULARY, gptj, load, padded_batch, relative
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    pipeline,
)

import gptj_q8
from gptj_q8.hf import layers
from gptj_q8.nn import Q8Linear

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}


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


def test_pipeline(stored_demo):
    path, tokenizer = stored_demo
    quantized = gptj_q8.from_pretrained(path)
    writer = pipeline("text-generation", model=quantized, tokenizer=tokenizer)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    text = writer("En el principio", generation_config=config)[0]["generated_text"]
    prompt = tokenizer("En el principio", return_tensors="pt")
    expected = quantized.generate(**prompt, generation_config=config)
    assert text == tokenizer.decode(expected[0], skip_special_tokens=True)
    by_name = pipeline("text-generation", model=str(path))
    assert isinstance(by_name.model.lm_head, Q8Linear)


@pytest.fixture(scope="module")
def stored_demo(tmp_path_factory):
    from transformers import AutoTokenizer

    from gptj_q8.demo import model_dir

    path = tmp_path_factory.mktemp("demo")
    gptj_q8.convert_checkpoint(model_dir(), path / "8bit", QUICK)
    return path / "8bit", AutoTokenizer.from_pretrained(path / "8bit")


def test_lm_eval(stored_demo):
    """EleutherAI's harness takes the model as it is."""
    pytest.importorskip("lm_eval", reason="needs lm-eval (pip install lm-eval, 300 MB)")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    path, tokenizer = stored_demo
    quantized = gptj_q8.from_pretrained(path, dtype=torch.float32)
    context, rest = "En el principio", " crió Dios los cielos y la tierra."
    request = Instance("loglikelihood", {}, (context, rest), 0)
    ((found, _),) = HFLM(pretrained=quantized, tokenizer=tokenizer).loglikelihood([request])
    ids = tokenizer(context + rest, return_tensors="pt").input_ids
    start = len(tokenizer(context).input_ids)
    with torch.no_grad():
        scores = quantized(ids).logits[0, start - 1 : -1].log_softmax(-1)
    assert found == pytest.approx(float(scores.gather(1, ids[0, start:, None]).sum()), rel=1e-4)


# Devices


@pytest.mark.parametrize("kind", ["float", "stored"])
def test_auto_device_map_that_spills_to_disk(float_dir, stored_dir, tmp_path, kind):
    """With too little memory allowed, accelerate puts the rest on the disk."""
    options = {"quantization_config": gptj_q8.Q8Config()} if kind == "float" else {}
    whole = load(stored_dir)
    model = load(
        float_dir if kind == "float" else stored_dir,
        device_map="auto",
        max_memory={"cpu": 60_000},
        offload_folder=tmp_path,
        **options,
    )
    assert "disk" in model.hf_device_map.values()
    assert "cpu" in model.hf_device_map.values()
    with torch.no_grad():
        assert torch.equal(model(LONG).logits, whole(LONG).logits)
    assert torch.equal(model.generate(LONG, **GREEDY), whole.generate(LONG, **GREEDY))


def test_cpu_offload_of_a_model_in_memory(model):
    """accelerate keeps the weights elsewhere and brings each layer's in for its forward."""
    from accelerate import cpu_offload

    with torch.no_grad():
        expected = model(LONG).logits
        offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
        assert offloaded.lm_head.codes.is_meta
        assert torch.equal(offloaded(LONG).logits, expected)


# Compiled


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


# Heads


@pytest.mark.parametrize("head", [GPTJForSequenceClassification, GPTJForQuestionAnswering])
def test_heads(head, tmp_path):
    torch.manual_seed(0)
    original = head(gptj().config).eval()
    original.save_pretrained(tmp_path / "float")
    names = ("start_logits", "end_logits") if head is GPTJForQuestionAnswering else ("logits",)
    model = head.from_pretrained(tmp_path / "float", quantization_config=QUICK)
    model.save_pretrained(tmp_path / "stored")
    again = head.from_pretrained(tmp_path / "stored")
    ids, mask = padded_batch()
    ids[0, 0] = 5
    with torch.no_grad():
        outputs = [each(ids, attention_mask=mask) for each in (model, again, original)]
    for name in names:
        found, reloaded, expected = (output[name] for output in outputs)
        assert torch.equal(found, reloaded)
        assert relative(found, expected) < 0.05


def test_a_classifier_trains_its_head_on_8_bits(float_dir):
    """The usual way: the body in 8 bits, the new head in float."""
    config = gptj_q8.Q8Config(codebook="dynamic", modules_to_not_convert=["score"])
    model = GPTJForSequenceClassification.from_pretrained(
        float_dir, quantization_config=config, num_labels=2, dtype=torch.float32
    )
    assert type(model.score) is nn.Linear
    labels = torch.tensor([0, 1])
    ids, mask = padded_batch()
    optimizer = torch.optim.Adam(model.score.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


# Another vocabulary


@pytest.mark.parametrize("size", [VOCABULARY - 2, VOCABULARY + 14])
def test_resizing_is_refused_and_changes_nothing(model, size):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"resize_token_embeddings: the 130 .* become {size}; "):
        model.resize_token_embeddings(size)
    with pytest.raises(ValueError, match="in 8 bits and cannot become 192"):
        model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.config.vocab_size == VOCABULARY
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_resizing_embeddings_left_in_float(tmp_path):
    """An 8-bit lm_head beside them becomes a float one, of the decoded weights."""
    config = gptj_q8.Q8Config(codebook="dynamic", modules_to_not_convert=["wte"])
    model = gptj_q8.quantize_(gptj(), config)
    with torch.no_grad():
        expected = model(LONG).logits
    model.resize_token_embeddings(VOCABULARY + 14)
    assert type(model.lm_head) is nn.Linear
    model.save_pretrained(tmp_path)
    for each in (model, load(tmp_path)):
        with torch.no_grad():
            found = each(LONG).logits
        assert found.shape[-1] == VOCABULARY + 14
        assert relative(found[..., :VOCABULARY], expected) < 1e-5


def test_resizing_the_float_model_before(float_dir):
    model = AutoModelForCausalLM.from_pretrained(float_dir, dtype=torch.float32)
    model.resize_token_embeddings(VOCABULARY + 14)
    quantized = gptj_q8.quantize_(model, QUICK)
    assert quantized.lm_head.codes.shape[0] == VOCABULARY + 14
    with torch.no_grad():
        assert quantized(torch.tensor([[VOCABULARY + 13]])).logits.shape[-1] == VOCABULARY + 14


def test_resizing_to_the_same_size_is_no_change(model):
    assert model.resize_token_embeddings(VOCABULARY) is model.get_input_embeddings()
    assert model.resize_token_embeddings(pad_to_multiple_of=65) is model.get_input_embeddings()


def test_every_layer_is_still_8_bit(model):
    """The tests above share the model; none may have changed it."""
    assert len(list(layers(model))) == 14
