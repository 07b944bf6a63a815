"""What else people do with GPT-J every day, on a quantized one: pipelines, devices, heads.

The truth for each is the float model with the decoded weights, which Transformers alone runs.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import GREEDY, LONG, QUICK, gptj, load, padded_batch, relative
from torch import nn
from transformers import (
    GenerationConfig,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    pipeline,
)

import gptj_q8
from gptj_q8.nn import Q8Linear

pytestmark = pytest.mark.usefixtures("one_thread")


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
