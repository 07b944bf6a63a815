"""prepare_for_finetuning, and training by Trainer and DDP."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import trained
from peft import LoraConfig, PeftModel
from tiny import IDS, QUICK, gptj, load, logits, relative
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GPTJForCausalLM, Trainer, TrainingArguments

import gptj_q8
from gptj_q8.lora.prepare import summary
from gptj_q8.nn import Q8Linear
from gptj_q8.nn.norm import Float32LayerNorm


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    torch.manual_seed(0)


def model_8bit(dtype: torch.dtype = torch.float32) -> GPTJForCausalLM:
    return gptj_q8.quantize_(gptj().to(dtype), QUICK)


def steps(model: nn.Module, count: int = 3, lr: float = 1e-3) -> None:
    optimizer = torch.optim.AdamW(trained(model).values(), lr=lr)
    for _ in range(count):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_prepared_it_checkpoints_and_every_adapter_gets_its_gradient(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = gptj_q8.add_lora(model_8bit(), r=4)
    for parameter in trained(plain).values():
        parameter.data.normal_(std=0.1)
    model = copy.deepcopy(plain).eval()
    assert gptj_q8.prepare_for_finetuning(model) is model
    assert model.training
    block = model.base_model.model.transformer.h[0]
    assert block.gradient_checkpointing
    calls = []
    block.attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    model(IDS, labels=IDS).loss.backward()
    assert len(calls) == 2  # once more in backward: the activations were not kept
    plain(IDS, labels=IDS).loss.backward()
    right = trained(plain)
    assert trained(model).keys() == right.keys()
    for name, parameter in trained(model).items():
        # Attention and GELU are computed another way here, and round another way.
        assert relative(parameter.grad, right[name].grad) < 3e-6, name
    count = sum(p.numel() for p in right.values())
    assert f"{count:,} parameters train" in capsys.readouterr().out


@pytest.mark.parametrize("hooked_first", [False, True])
@pytest.mark.parametrize("targets", [["all"], ["all", "wte"]], ids=str)
def test_reentrant_checkpointing_gets_gradients_too(targets: list[str], hooked_first: bool) -> None:
    """With adapters in the blocks alone, it once trained nothing."""
    base = model_8bit()
    if hooked_first:
        base.enable_input_require_grads()
    model = gptj_q8.add_lora(base, r=4, targets=targets)
    gptj_q8.prepare_for_finetuning(model, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name that Transformers 5.17 has, too
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in trained(model).values())


def test_checkpointing_can_be_left_off() -> None:
    model = gptj_q8.add_lora(model_8bit(), r=4)
    gptj_q8.prepare_for_finetuning(model, checkpointing=False, verbose=False)
    assert not model.base_model.model.transformer.h[0].gradient_checkpointing
    assert trained(model)


def test_an_adapter_loaded_for_inference_trains_again(tmp_path: Path) -> None:
    gptj_q8.add_lora(model_8bit(), r=4).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(model_8bit(), tmp_path)
    assert not trained(model)
    gptj_q8.prepare_for_finetuning(model, verbose=False)
    assert trained(model)
    assert all("lora_" in name for name in trained(model))
    native = model_8bit()
    native.load_adapter(str(tmp_path))
    gptj_q8.prepare_for_finetuning(native, verbose=False)
    assert all("lora_" in name for name in trained(native))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_and_biases_train_in_float32_and_load_with_the_adapter(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = gptj_q8.add_lora(model_8bit(dtype), r=4)
    gptj_q8.prepare_for_finetuning(model, train_1d=True, verbose=False)
    names = {
        name.replace("base_model.model.", "").replace(".base_layer", "")
        for name in trained(model)
        if "lora_" not in name
    }
    assert names == {
        f"transformer.{norm}.modules_to_save.default.{part}"
        for norm in ("h.0.ln_1", "h.1.ln_1", "ln_f")
        for part in ("weight", "bias")
    } | {f"transformer.h.{i}.mlp.{fc}.bias" for i in (0, 1) for fc in ("fc_in", "fc_out")} | {
        "lm_head.bias"
    }
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    steps(model, lr=1e-4)
    # lora_A waits for lora_B to leave zero in the first step only.
    assert all(not torch.equal(before[name], p) for name, p in trained(model).items())

    right = logits(model.eval())
    assert right.dtype == dtype
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model_8bit(dtype), tmp_path)
    gptj_q8.prepare_for_finetuning(again, train_1d=True, verbose=False)
    assert {name: p.dtype for name, p in trained(again).items()} == {
        name: p.dtype for name, p in trained(model).items()
    }
    again.eval()
    assert relative(logits(again), right) < (1e-6 if dtype == torch.float32 else 0.01)
    merged = PeftModel.from_pretrained(model_8bit(dtype), tmp_path).merge_and_unload()
    weight = model.base_model.model.transformer.ln_f.modules_to_save["default"].weight
    assert (
        relative(merged.transformer.ln_f.weight, weight)
        < (0 if dtype == torch.float32 else 4e-3) + 1e-9
    )


def test_norms_and_biases_train_without_adapters() -> None:
    model = gptj_q8.prepare_for_finetuning(model_8bit(torch.bfloat16), True, verbose=False)
    assert all(p.dim() == 1 and p.dtype == torch.float32 for p in trained(model).values())
    assert len(trained(model)) == 3 * 2 + 2 * 2 + 1
    assert isinstance(model.transformer.ln_f, Float32LayerNorm)
    before = logits(model)
    steps(model)
    assert relative(logits(model), before) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_float32_norm_is_as_exact_as_pytorchs(dtype: torch.dtype) -> None:
    norm = nn.LayerNorm(64).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
    ours = Float32LayerNorm.like(norm)
    x = torch.randn(5, 64, dtype=dtype)
    y = ours(x)
    assert y.dtype == dtype
    assert torch.equal(y, norm(x))
    y.sum().backward()
    assert ours.weight.grad.dtype == torch.float32


def test_preparing_refuses_what_would_train_nothing_or_lose_it() -> None:
    model = model_8bit()
    with pytest.raises(ValueError, match="nothing would train"):
        gptj_q8.prepare_for_finetuning(model)
    assert not model.is_gradient_checkpointing
    with pytest.raises(TypeError, match="Linear has no gradient_checkpointing_enable"):
        gptj_q8.prepare_for_finetuning(nn.Linear(2, 2), train_1d=True)
    two = gptj_q8.add_lora(model, r=2)
    gptj_q8.add_lora(two, r=2, adapter_name="more")
    two.base_model.set_adapter(["default", "more"])
    with pytest.raises(ValueError, match=r"one active adapter.*default, more"):
        gptj_q8.prepare_for_finetuning(two, train_1d=True)
    native = model_8bit()
    native.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="add_lora"):
        gptj_q8.prepare_for_finetuning(native, train_1d=True)


def test_the_summary_warns_of_16_bit_parameters() -> None:
    model = gptj_q8.add_lora(model_8bit(torch.bfloat16), r=4)
    assert "lost" not in summary(model)
    model.base_model.model.transformer.ln_f.weight.requires_grad_(True)
    assert "norm or bias: 48 in bfloat16; small steps on these are lost" in summary(model)


# Trainer.


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "num_train_epochs": 3,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "logging_steps": 1,
    }
    return TrainingArguments(folder, **{**settings, **options})


def texts() -> Any:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [(IDS[0] + i).tolist() for i in range(8)]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("train_1d", [False, True], ids=["adapters", "and 1-D"])
def test_trainer_trains_and_saves(
    train_1d: bool, bf16: bool, stored_dir: Path, tmp_path: Path
) -> None:
    model = gptj_q8.add_lora(load(stored_dir, dtype=torch.float32), r=4)
    gptj_q8.prepare_for_finetuning(model, train_1d, verbose=False)
    Trainer(model, arguments(tmp_path / "log", bf16=bf16), train_dataset=texts()).train()
    before = float(load(stored_dir, dtype=torch.float32)(IDS, labels=IDS).loss)
    model.eval()
    assert float(model(IDS, labels=IDS).loss) < 0.9 * before
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(stored_dir, dtype=torch.float32), tmp_path / "adapter")
    # Trainer leaves its autocast around the model.
    assert relative(logits(again), logits(model)) < (0.02 if bf16 else 1e-6)


def test_trainer_trains_norms_and_biases_of_a_quantized_model(
    stored_dir: Path, tmp_path: Path
) -> None:
    """Transformers refuses quantized models without adapters, unless told otherwise."""
    model = gptj_q8.prepare_for_finetuning(load(stored_dir), train_1d=True, verbose=False)
    codes = model.lm_head.codes.clone()
    trainer = Trainer(model, arguments(tmp_path / "log"), train_dataset=texts())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert torch.equal(model.lm_head.codes, codes)
    model.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    assert relative(logits(again), logits(model.eval())) < 0.01


def test_trainer_resumes_to_the_same_losses(stored_dir: Path, tmp_path: Path) -> None:
    def train(folder: Path, resume: bool) -> list[float]:
        torch.manual_seed(0)
        model = gptj_q8.add_lora(load(stored_dir), r=4, dropout=0.1)
        gptj_q8.prepare_for_finetuning(model, train_1d=True, verbose=False)
        options = arguments(folder, save_strategy="steps", save_steps=6, seed=1)
        trainer = Trainer(model, options, train_dataset=texts())
        trainer.train(resume_from_checkpoint=resume and str(folder / "checkpoint-6"))
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert train(tmp_path, resume=False) == train(tmp_path, resume=True)


# DDP.


def test_ddp_leaves_the_scales_out_of_its_broadcasts(tmp_path: Path) -> None:
    model = gptj_q8.prepare_for_finetuning(gptj_q8.add_lora(model_8bit(), r=4), verbose=False)
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        wrapped = DistributedDataParallel(model)
        scales = {id(m.absmax) for m in model.modules() if isinstance(m, Q8Linear)}
        assert scales
        assert not scales & {id(buffer) for buffer in wrapped.modules_buffers}
        wrapped(IDS, labels=IDS).loss.backward()
        assert all(parameter.grad is not None for parameter in trained(model).values())
    finally:
        distributed.destroy_process_group()
