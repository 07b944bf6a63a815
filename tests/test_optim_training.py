"""The 8-bit optimizers where people use them: Trainer, accelerate, GradScaler; convergence."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from adam_convergence import RECORD, SEEDS, train
from tiny import VOCABULARY, gptj
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from gptj_q8.optim import AdamW8bit

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(folder: Path, **changes: object) -> Trainer:
    """Six steps of a tiny GPT-J on two texts to learn by heart, a checkpoint after the third."""
    texts = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    rows = [texts[i % 2] for i in range(12)]
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "save_steps": 3,
        "logging_steps": 1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 0,
    }
    return Trainer(
        gptj().train(),
        TrainingArguments(**{**settings, **changes}),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizer_cls_and_kwargs=(AdamW8bit, {"lr": 1e-2, "min_8bit_size": 1024}),
    )


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_trainer_trains_and_resumes(bf16: bool, tmp_path: Path) -> None:
    through = trainer(tmp_path, bf16=bf16)
    through.train()
    optimizer = through.optimizer.optimizer  # inside accelerate's
    assert isinstance(optimizer, AdamW8bit)
    assert any("m_codes" in state for state in optimizer.state.values())
    assert losses(through)[-1] < losses(through)[0]

    resumed = trainer(tmp_path, bf16=bf16)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(through)
    for a, b in zip(through.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_grad_scaler_skips_a_step_that_overflows() -> None:
    p = nn.Parameter(torch.ones(5000))
    optimizer = AdamW8bit([p], lr=0.1, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((p * 2).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(p.detach(), torch.full((5000,), 0.9), rtol=1e-5, atol=0)
    optimizer.zero_grad()
    (p[:1] * torch.inf).sum().backward()
    before = p.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"] == 1
    assert scaler.get_scale() == 512.0


def test_accelerate_prepares_saves_and_loads(tmp_path: Path) -> None:
    from accelerate import Accelerator

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        accelerator.backward(model(x).square().sum())
        optimizer.step()
        optimizer.zero_grad()

    accelerator = Accelerator(cpu=True)
    model = nn.Linear(100, 70, dtype=torch.bfloat16)
    model, optimizer = accelerator.prepare(model, AdamW8bit(model.parameters(), lr=0.1))
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    run(model, optimizer, x)
    accelerator.save_state(tmp_path)
    run(model, optimizer, x)
    expected = [p.detach().clone() for p in model.parameters()]
    accelerator.load_state(tmp_path)
    run(model, optimizer, x)
    for p, value in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p, value)


def recorded(kind: str) -> list[float]:
    return json.loads(RECORD.read_text())[kind]


def assert_as_good(ours: float, seed: int, float32: list[float]) -> None:
    """As good as the float32 run of the same seed, within half of what other seeds change."""
    assert len(float32) == len(SEEDS)
    assert abs(ours - float32[seed]) < statistics.stdev(float32) / 2


def test_convergence_of_one_seed() -> None:
    """All of the demo's model from random weights: beside the recorded run in float32."""
    mean, optimizer = train(AdamW8bit, SEEDS[0])
    assert_as_good(mean, SEEDS[0], recorded("AdamW"))

    states = optimizer.state.values()
    params = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    in_8_bits = sum(s["m_codes"].numel() + s["v_codes"].numel() for s in states if "m_codes" in s)
    assert in_8_bits >= 0.95 * 2 * params
    tensors = [t for state in states for t in state.values() if isinstance(t, Tensor)]
    assert sum(t.nbytes for t in tensors) <= 0.26 * 2 * 4 * params


@pytest.mark.slow
def test_convergence_of_five_seeds() -> None:
    float32 = [train(torch.optim.AdamW, seed)[0] for seed in SEEDS]
    ours = [train(AdamW8bit, seed)[0] for seed in SEEDS]
    for seed, each in zip(SEEDS, ours, strict=True):
        assert_as_good(each, seed, float32)
