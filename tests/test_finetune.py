"""Fine-tuning: it learns, tells what it did, and fits its memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import SETTINGS, TEXT, StopAt, load
from peft import PeftModel
from tiny import gpt2
from transformers.models.gptj.modeling_gptj import GPTJMLP

from gptj_q8.checkpoint import adapters
from gptj_q8.train import device, folder
from gptj_q8.train.listener import Listener
from gptj_q8.train.plot import smoothed
from gptj_q8.train.report import Report
from gptj_q8.train.settings import Settings
from gptj_q8.train.texts import Document

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_learns_and_tells_how(whole_run: tuple[Report, Path]) -> None:
    report, out = whole_run
    assert report.finished
    assert report.packed
    assert report.steps == report.of_steps == len(report.losses) == len(report.learning_rates)
    assert report.held_out[0][0] == 0
    assert report.held_out[-1][0] == report.steps
    assert report.held_out[-1][1] < 0.8 * report.held_out[0][1]
    rates = [rate for _, rate in report.learning_rates]
    assert max(rates) == SETTINGS.learning_rate
    assert rates[-1] < 0.2 * SETTINGS.learning_rate
    (sample,) = report.samples
    assert sample.prompt == "gato y"
    assert sample.before != sample.after
    assert json.loads((out / "summary.json").read_text())["steps"] == report.steps
    assert Path(report.plot).read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{report.steps}"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_the_held_out_loss_is_that_of_the_adapter_on_disk(
    whole_run: tuple[Report, Path], byte_dir: Path, byte_tokenizer: Any
) -> None:
    report, out = whole_run
    model = load(byte_dir)
    plain = json.loads((out / "summary.json").read_text())["held_out"][0][1]
    begin = TEXT.rfind("\n", 0, int(len(TEXT) * 0.9)) + 1
    ids = [*byte_tokenizer(TEXT[begin:]).input_ids, byte_tokenizer.eos_token_id]

    def loss(network: Any) -> float:
        total = 0.0
        for start in range(0, len(ids) - 1, SETTINGS.sequence_length - 1):
            row = torch.tensor(ids[start : start + SETTINGS.sequence_length])[None]
            with torch.no_grad():
                total += float(network(input_ids=row, labels=row).loss) * (row.shape[1] - 1)
        return total / (len(ids) - 1)

    assert report.held_out_tokens == len(ids) - 1
    assert loss(model) == pytest.approx(plain, rel=1e-5)
    tuned = PeftModel.from_pretrained(model, out).eval()
    assert loss(tuned) == pytest.approx(report.held_out[-1][1], rel=1e-5)


def test_bad_settings_are_named() -> None:
    cases: dict[str, Any] = {
        "rank": 0, "batch_size": 0, "alpha": 0, "learning_rate": float("nan"), "epochs": -1,
        "dropout": 1.0, "held_out": 1.5, "warmup": -0.1, "max_steps": 0, "save_every": 0,
        "sequence_length": 1, "weight_decay": -1, "targets": (), "seed": -1,
    }  # fmt: skip
    for name, value in cases.items():
        with pytest.raises(ValueError, match=f"^{name} must be "):
            Settings(**{name: value})


def test_what_does_not_fit_the_model_is_refused(tune: Any, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "sequence_length of 65 is beyond the model's context of 64": {"sequence_length": 65},
        "nowhere": {"targets": ("nowhere",)},
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=message):
            tune(settings=Settings(**{**vars(SETTINGS), **change}))
    assert not (tmp_path / "out").exists(), "refused before anything is written"


def test_without_held_out_data_and_with_records(tune: Any) -> None:
    records = [Document(f"son {i}.", f"Cuántos, {i}? ") for i in range(40)]
    settings = Settings(**{**vars(SETTINGS), "held_out": 0, "sequence_length": 64, "epochs": 1})
    report = tune(documents=records, settings=settings)
    assert report.held_out == []
    assert report.held_out_tokens == 0
    # A completion and the end token; not the prompt.
    assert report.tokens == sum(len(record.text) + 1 for record in records)
    assert report.rows < 40
    assert report.samples[0].prompt.startswith("Cuántos")


def test_activations_are_computed_again_where_memory_is_short(
    whole_run: tuple[Report, Path], tune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    forward = GPTJMLP.forward

    def counting(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(self.training)
        return forward(self, x)

    monkeypatch.setattr(GPTJMLP, "forward", counting)
    tune()
    plain = sum(calls)
    calls.clear()
    monkeypatch.setattr(device, "host_memory", lambda: 7 * 10**8)  # the step takes 0.37 GB
    losses = [loss for _, loss in tune(overwrite=True).losses]
    assert sum(calls) == 2 * plain
    assert losses == pytest.approx([loss for _, loss in whole_run[0].losses], rel=1e-4)


def test_activations_are_computed_again_where_nothing_is_known(
    byte_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device.recomputes(gpt2(), 32, 4)
    assert not device.recomputes(load(byte_dir), 32, 4)
    monkeypatch.setattr(device, "host_memory", lambda: None)
    assert device.recomputes(load(byte_dir), 32, 4)


def test_the_dtype_is_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for has, dtype in (({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert device.best_dtype(cpu) == dtype
    for has, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        # Asked for what the GPU computes, not for what it emulates.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated, has=has: has)
        assert device.best_dtype(gpu) == dtype


def test_it_tells_what_a_step_takes_and_where_that_is_too_much(
    tune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(Listener):
        summary = ""

        def prepared(self, summary: str) -> None:
            self.summary = summary

    told = Told()
    tune(listener=told, settings=Settings(**{**vars(SETTINGS), "max_steps": 1}))
    assert "a step on 4 x 32 tokens takes about 0.37 GB in all, keeping all" in told.summary
    monkeypatch.setattr(device, "host_memory", lambda: 10**8)
    with pytest.warns(UserWarning, match=r"takes about 0\.37 GB, and cpu has 0\.10 GB; shorter"):
        tune(listener=told, overwrite=True)
    assert "keeping one activation a block" in told.summary


def test_biases_and_norms_train_and_come_back(
    tune: Any, tmp_path: Path, byte_dir: Path, byte_tokenizer: Any
) -> None:
    settings = Settings(**{**vars(SETTINGS), "train_1d": True, "dropout": 0.0})
    assert not tune(settings=settings, listener=StopAt(5)).finished
    resumed = tune(settings=settings, resume=True)
    straight = tune(settings=settings, output=tmp_path / "straight")
    assert resumed.losses == straight.losses
    base = load(byte_dir)
    row = torch.tensor(byte_tokenizer("gato y gato").input_ids)[None]
    norm = base.transformer.h[0].ln_1.weight.clone()
    bias = base.transformer.h[0].mlp.fc_in.bias.clone()
    tuned = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    block = tuned.base_model.model.transformer.h[0]
    assert not torch.equal(block.ln_1.modules_to_save["default"].weight, norm)
    assert not torch.equal(block.mlp.fc_in.base_layer.bias, bias)
    with torch.no_grad():
        plain = load(byte_dir)(input_ids=row, labels=row).loss
        assert tuned(input_ids=row, labels=row).loss < 0.5 * plain


def test_without_matplotlib_all_is_done_but_the_plot(
    tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = tune(settings=Settings(**{**vars(SETTINGS), "max_steps": 1}))
    assert (report.finished, report.plot) == (True, "")
    assert (tmp_path / "out" / adapters.WEIGHTS).exists()
    assert not (tmp_path / "out" / folder.PLOT).exists()


def test_smoothing_is_a_mean_of_neighbours() -> None:
    assert smoothed([0.0, 3.0, 6.0]) == [1.5, 3.0, 4.5]
    assert smoothed([5.0]) == [5.0]
