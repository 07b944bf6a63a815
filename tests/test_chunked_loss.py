"""A GPT-J that computes its loss in chunks: alone, under PEFT, in Trainer."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from tiny import IDS, QUICK, VOCABULARY, gpt2, gptj
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTJForCausalLM, Trainer, TrainingArguments

import gptj_q8
from gptj_q8.models.gptj_attention import SDPA
from gptj_q8.models.gptj_modules import CACHE, LossOutput

pytestmark = pytest.mark.usefixtures("one_thread")


def pair() -> tuple[GPTJForCausalLM, GPTJForCausalLM]:
    """The same 8-bit model with Transformers' loss and with the one in chunks."""
    whole = gptj_q8.quantize_(gptj(), QUICK)
    chunks = copy.deepcopy(whole)
    gptj_q8.set_chunked_loss(chunks)
    return whole, chunks


def test_the_loss_and_every_gradient_are_the_same() -> None:
    labels = IDS.masked_fill(IDS % 5 == 0, -100)
    losses = []
    models = pair()
    for model in models:
        losses.append(model(IDS, labels=labels, num_items_in_batch=7).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(two.grad, one.grad)


def test_save_memory_does_all_three_and_leaves_other_models(tmp_path: Path) -> None:
    whole, _ = pair()
    lean = copy.deepcopy(whole)
    wrapped = get_peft_model(lean, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    assert gptj_q8.save_memory(wrapped)
    output = wrapped(IDS, labels=IDS)
    torch.testing.assert_close(output.loss, whole(IDS, labels=IDS).loss)
    assert isinstance(output, LossOutput)
    assert type(lean.transformer.h[0].mlp.act) is torch.nn.GELU
    assert lean.config._attn_implementation == SDPA
    assert not gptj_q8.save_memory(gpt2())


def test_prepare_for_finetuning_applies_them() -> None:
    whole, _ = pair()
    model = gptj_q8.prepare_for_finetuning(gptj_q8.add_lora(copy.deepcopy(whole)), verbose=False)
    output = model(IDS, labels=IDS)
    assert isinstance(output, LossOutput)
    assert model.config._attn_implementation == SDPA
    torch.testing.assert_close(output.loss, whole(IDS, labels=IDS).loss)


def test_logits_are_missed_loudly_and_come_without_labels() -> None:
    whole, chunks = pair()
    output = chunks(IDS, labels=IDS)
    with pytest.raises(AttributeError, match=r"set_chunked_loss\(model, False\)"):
        output.logits  # noqa: B018
    with pytest.raises(KeyError):
        output["logits"]
    assert output.past_key_values is None
    assert torch.equal(chunks(IDS).logits, whole(IDS).logits)
    with pytest.raises(ValueError, match="return_dict"):
        chunks(IDS, labels=IDS, return_dict=False)
    with pytest.raises(ValueError, match="logits_to_keep"):
        chunks(IDS, labels=IDS, logits_to_keep=3)
    with pytest.raises(TypeError, match="label_smoothing"):
        chunks(IDS, labels=IDS, label_smoothing=0.1)
    gptj_q8.set_chunked_loss(chunks, False)
    assert torch.equal(chunks(IDS, labels=IDS).logits, whole(IDS).logits)


def test_takes_what_transformers_takes_by_place_and_by_name() -> None:
    whole, chunks = pair()
    assert inspect.signature(chunks.forward) == inspect.signature(whole.forward)
    by_place = (IDS, None, torch.ones_like(IDS), None, None, None, IDS)
    torch.testing.assert_close(chunks(*by_place).loss, whole(*by_place).loss)
    with pytest.raises(TypeError, match="labels"):
        chunks(*by_place, labels=IDS)
    first, last = IDS.split([7, 5], 1)
    for name in {CACHE, "past_key_values"}:  # Transformers 5.24 takes both
        past = [model(first)[CACHE] for model in (whole, chunks)]
        one, two = (
            model(last, labels=last, output_hidden_states=True, **{name: cache})
            for model, cache in zip((whole, chunks), past, strict=True)
        )
        torch.testing.assert_close(two.loss, one.loss)
        assert two[CACHE] is past[1]
        assert two[CACHE].get_seq_length() == 12
        assert all(map(torch.equal, two.hidden_states, one.hidden_states))


def test_its_forward_stays_when_accelerate_unwraps_the_model() -> None:
    _, chunks = pair()
    AcceleratorState._reset_state(reset_partial_state=True)  # of a Trainer before
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    try:
        unwrapped = accelerator.unwrap_model(accelerator.prepare(chunks), keep_fp32_wrapper=False)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert isinstance(unwrapped(IDS, labels=IDS), LossOutput)


def test_without_labels_it_compiles_into_one_graph() -> None:
    whole, chunks = pair()
    compiled = torch.compile(chunks, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, whole(IDS).logits)


def test_a_loss_of_the_users_own_is_used() -> None:
    _, chunks = pair()
    chunks.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 42
    assert chunks(IDS, labels=IDS).loss == 42


def test_saves_copies_and_pickles_under_its_own_name(tmp_path: Path) -> None:
    whole, chunks = pair()
    chunks.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is GPTJForCausalLM
    assert loaded.config.architectures == ["GPTJForCausalLM"]
    for twin in (copy.deepcopy(chunks), pickle.loads(pickle.dumps(chunks))):
        assert isinstance(twin(IDS, labels=IDS), LossOutput)
    assert torch.equal(
        chunks.generate(IDS, max_new_tokens=5, do_sample=False),
        whole.generate(IDS, max_new_tokens=5, do_sample=False),
    )


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="GPT2LMHeadModel is no GPT-J language model"):
        gptj_q8.set_chunked_loss(gpt2())


def trained(model: GPTJForCausalLM, folder: Path, **changes: object) -> list[float]:
    """Losses of a few steps with gradient accumulation, and of an evaluation."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "fc_in"], init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    generator = torch.manual_seed(3)
    data = []
    for length in (9, 12, 7, 12, 5, 11, 12, 8):
        ids = torch.randint(2, VOCABULARY, (12,), generator=generator)
        labels = ids.masked_fill(torch.arange(12) >= length, -100)
        data.append({"input_ids": ids, "labels": labels})
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=0.01,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **changes,
    )
    trainer = Trainer(wrapped, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*losses, trainer.evaluate()["eval_loss"]]


@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"label_smoothing_factor": 0.1}])
def test_trainer_reaches_the_same_losses(tmp_path: Path, changes: dict) -> None:
    """With uneven batches, where only num_items_in_batch gives the right mean."""
    whole, chunks = (trained(model, tmp_path, **changes) for model in pair())
    assert len(whole) == 5
    tolerance = 2e-3 if "bf16" in changes else 1e-5
    torch.testing.assert_close(torch.tensor(chunks), torch.tensor(whole), rtol=tolerance, atol=0)
    assert whole[0] != whole[-2]


def test_metrics_that_need_logits_do_not_get_something_else(tmp_path: Path) -> None:
    _, chunks = pair()

    def accuracy(prediction: object) -> dict[str, float]:
        logits: Tensor = prediction.predictions  # type: ignore[attr-defined]
        return {"accuracy": float((logits.argmax(-1) == 0).mean())}

    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    model = get_peft_model(chunks, LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = Trainer(model, arguments, eval_dataset=data, compute_metrics=accuracy)
    with pytest.raises(AttributeError, match="argmax"):
        trainer.evaluate()
