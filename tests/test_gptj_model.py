"""What Transformers' own tests of GPT-J ask of it, on a quantized one.

The release that is installed has no tests in it, so they are written anew. The truth for numbers is
the float model with the decoded weights, which Transformers alone runs.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from command_line import float32, save_byte_gptj
from tiny import LONG, QUICK, VOCABULARY, padded_batch, relative
from torch import nn
from transformers import (
    AutoTokenizer,
    GPTJForSequenceClassification,
    GPTJModel,
    pipeline,
)

import gptj_q8

pytestmark = pytest.mark.usefixtures("one_thread")


def test_forward_signature_and_outputs(model):
    with torch.no_grad():
        output = model(LONG, output_hidden_states=True)
    assert output.logits.shape == (1, 7, VOCABULARY)
    assert len(output.hidden_states) == 3
    assert {state.shape for state in output.hidden_states} == {(1, 7, 48)}
    assert len(output.past_key_values) == 2


def test_attentions(decoded):
    model = gptj_q8.quantize_(copy.deepcopy(decoded), QUICK)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(LONG, output_attentions=True).attentions
    assert len(attentions) == 2
    for attention in attentions:
        assert attention.shape == (1, 4, 7, 7)
        assert torch.allclose(attention.sum(-1), torch.ones(1, 4, 7))
        assert torch.equal(attention.triu(1), torch.zeros_like(attention))


def test_past_equals_the_whole(model):
    """With and without a mask; a step after a past gives what one pass gives."""
    ids, mask = padded_batch()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for keywords in ({}, {"attention_mask": mask}):
        whole_keywords = {**keywords, "position_ids": positions} if keywords else {}
        with torch.no_grad():
            whole = model(ids, **whole_keywords).logits
            first = model(
                ids[:, :5],
                **{name: value[:, :5] for name, value in whole_keywords.items()},
                use_cache=True,
            )
            rest_keywords = dict(keywords)
            if keywords:
                rest_keywords["position_ids"] = positions[:, 5:]
            rest = model(ids[:, 5:], past_key_values=first.past_key_values, **rest_keywords).logits
        assert torch.allclose(rest, whole[:, 5:], atol=1e-4)


def test_input_embeddings_in_place_of_ids(model):
    with torch.no_grad():
        rows = model.get_input_embeddings()(LONG)
        assert torch.equal(model(inputs_embeds=rows).logits, model(LONG).logits)


def test_loss_and_gradients_with_checkpointing(model):
    """Recomputed activations give the gradients that kept ones give."""
    gradients = []
    for checkpointing in (False, True):
        each = copy.deepcopy(model).train()
        each.config.embd_pdrop = each.config.resid_pdrop = each.config.attn_pdrop = 0.0
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            each.gradient_checkpointing_enable({"use_reentrant": False})
        each(LONG, labels=LONG).loss.backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("ln_1" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_batches_do_not_leak_into_each_other(model):
    ids = torch.cat([LONG, LONG.flip(1)])
    with torch.no_grad():
        together = model(ids).logits
        alone = model(ids[1:]).logits
    assert relative(together[1:], alone) < 1e-5


def test_causality(model):
    changed = LONG.clone()
    changed[0, -1] = 99
    with torch.no_grad():
        before, after = model(LONG).logits, model(changed).logits
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_token_types(model, decoded):
    """They are looked up among the words."""
    types = torch.tensor([[0, 1, 0, 1, 1, 0, 2]])
    with torch.no_grad():
        found, expected = (each(LONG, token_type_ids=types).logits for each in (model, decoded))
        without = model(LONG).logits
    assert relative(found, expected) < 1e-5
    assert relative(found, without) > 0.01


def test_several_tokens_after_a_past_with_holes_in_the_mask(model):
    torch.manual_seed(0)
    ids, types = torch.randint(VOCABULARY, (5, 10)), torch.randint(16, (5, 10))
    mask = torch.randint(2, (5, 10))
    mask[:, 0] = 1
    options = {"token_type_ids": types, "attention_mask": mask}
    with torch.no_grad():
        whole = model(ids, **options).logits
        first = model(ids[:, :7], **{name: value[:, :7] for name, value in options.items()})
        rest = model(
            ids[:, 7:],
            token_type_ids=types[:, 7:],
            attention_mask=mask,
            past_key_values=first.past_key_values,
        ).logits
    assert torch.allclose(rest, whole[:, 7:], atol=1e-4)


def test_loss(model):
    ids, mask = padded_batch()
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, labels=labels)
    expected = F.cross_entropy(
        output.logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten()
    )
    assert float(output.loss) == pytest.approx(float(expected), rel=1e-6)


def test_a_tuple_holds_what_the_dictionary_holds(model):
    options = {"output_hidden_states": True, "use_cache": False}
    with torch.no_grad():
        named = model(LONG, **options)
        logits, hidden = model(LONG, **options, return_dict=False)
    assert torch.equal(logits, named.logits)
    assert all(map(torch.equal, hidden, named.hidden_states))


def test_generating_from_embeddings(model):
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    rows = model.get_input_embeddings()(LONG)
    tokens = model.generate(inputs_embeds=rows, **greedy)
    assert torch.equal(tokens, model.generate(LONG, **greedy)[:, LONG.shape[1] :])


def test_the_same_call_gives_the_same_bits(model):
    with torch.no_grad():
        assert torch.equal(model(LONG).logits, model(LONG).logits)


PIPELINES = {
    "feature-extraction": GPTJModel,
    "text-classification": GPTJForSequenceClassification,
}


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines(tmp_path, task):
    """Each answers as it does with the decoded model; text-generation's is in test_daily_use.py."""
    float32(save_byte_gptj(tmp_path, seed=0))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    torch.manual_seed(0)
    quantized = PIPELINES[task].from_pretrained(
        tmp_path, quantization_config=QUICK, dtype=torch.float32
    )
    plain = copy.deepcopy(quantized).dequantize()
    found, expected = (
        pipeline(task, model=each, tokenizer=tokenizer)("En el principio")[0]
        for each in (quantized, plain)
    )
    if task == "feature-extraction":
        assert relative(torch.tensor(found), torch.tensor(expected)) < 1e-5
    else:
        assert found.pop("score") == pytest.approx(expected.pop("score"), rel=1e-4)
        assert found == expected
