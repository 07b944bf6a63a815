"""Fine-tuning: it learns, resumes to the same losses, and keeps what it saved, whatever happens."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import save_byte_gptj
from peft import PeftModel
from tiny import QUICK, contents, gpt2
from transformers import AutoTokenizer
from transformers.models.gptj.modeling_gptj import GPTJMLP

import gptj_q8
from gptj_q8.optim import AdamW8bit
from gptj_q8.train import device, folder
from gptj_q8.train.listener import Listener
from gptj_q8.train.plot import smoothed
from gptj_q8.train.report import Report
from gptj_q8.train.run import finetune
from gptj_q8.train.settings import Settings
from gptj_q8.train.texts import Document

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = (
    "".join(f"{word} y {word} son dos {word}s.\n" for word in ("gato", "perro", "pan", "mes")) * 9
)
DOCUMENTS = [Document(TEXT, where="text", is_file=True)]
SETTINGS = Settings(
    rank=4, alpha=8, dropout=0.1, learning_rate=2e-2, epochs=2, batch_size=4, sequence_length=32,
    held_out=0.1, save_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_gptj(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def tokenizer(source: Path) -> Any:
    return AutoTokenizer.from_pretrained(source)


def load(source: Path) -> Any:
    return gptj_q8.from_pretrained(source, dtype=torch.float32, quantization_config=QUICK)


@pytest.fixture
def tune(source: Path, tokenizer: Any, tmp_path: Path) -> Any:
    """Fine-tunes a fresh model into `out`."""

    def run(**changes: Any) -> Report:
        options = {"documents": DOCUMENTS, "settings": SETTINGS, "output": tmp_path / "out"}
        return finetune(load(source), tokenizer, **{**options, **changes})

    return run


@pytest.fixture(scope="module")
def whole(
    source: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Report, Path]:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    report = finetune(load(source), tokenizer, DOCUMENTS, out, SETTINGS, prompts=["gato y"])
    return report, out


class StopAt(Listener):
    """Sends a signal after a step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.at, self.number, self.told = step, number, 0

    def step(self, step: int, *_: float) -> None:
        if step == self.at:
            os.kill(os.getpid(), self.number)

    def stopping(self) -> None:
        self.told += 1


def test_it_learns_and_tells_how(whole: tuple[Report, Path]) -> None:
    report, out = whole
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
    whole: tuple[Report, Path], source: Path, tokenizer: Any
) -> None:
    report, out = whole
    model = load(source)
    plain = json.loads((out / "summary.json").read_text())["held_out"][0][1]
    begin = TEXT.rfind("\n", 0, int(len(TEXT) * 0.9)) + 1
    ids = [*tokenizer(TEXT[begin:]).input_ids, tokenizer.eos_token_id]

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_resumes_to_the_same_losses(
    whole: tuple[Report, Path], tune: Any, number: int
) -> None:
    expected, _ = whole
    handler = signal.getsignal(number)
    listener = StopAt(5, number)
    stopped = tune(listener=listener, prompts=["gato y"])
    assert signal.getsignal(number) is handler
    assert (stopped.finished, stopped.adapter, listener.told) == (False, "", 1)
    # The signal comes when step 5 is told of; what is in hand then is step 6.
    assert stopped.steps in (5, 6)
    assert Path(stopped.checkpoint).name == f"checkpoint-{stopped.steps}"
    resumed = tune(resume=True)
    assert resumed.losses == expected.losses
    assert resumed.learning_rates == expected.learning_rates
    assert dict(resumed.held_out).items() <= dict(expected.held_out).items()
    assert resumed.held_out[-1] == expected.held_out[-1]
    assert resumed.samples == expected.samples


def test_a_second_signal_stops_at_once(tune: Any, tmp_path: Path) -> None:
    class Twice(StopAt):
        def stopping(self) -> None:
            os.kill(os.getpid(), self.number)

    with pytest.raises(KeyboardInterrupt):
        tune(listener=Twice(3))
    assert folder.last_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"


def test_a_run_that_broke_off_after_its_last_step_is_only_ended(
    tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    settings = Settings(**{**vars(SETTINGS), "max_steps": 5})  # in the midst of an epoch
    expected = tune(settings=settings, output=tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(folder, "put_whole", full)
        with pytest.raises(OSError, match="No space left"):
            tune(settings=settings)
    resumed = tune(settings=settings, resume=True)
    assert (resumed.steps, resumed.finished) == (5, True)
    assert resumed.losses == expected.losses
    assert resumed.held_out == expected.held_out
    assert resumed.samples == expected.samples
    adapters = [tmp_path / name / folder.ADAPTER for name in ("out", "straight")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_run_goes_on_only_as_it_began(tune: Any, tmp_path: Path, source: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no run to resume: it has no run\.json"):
        tune(resume=True)
    tune(listener=StopAt(1))
    before = contents(tmp_path / "out")
    changed = Settings(**{**vars(SETTINGS), "rank": 2, "seed": 7})
    with pytest.raises(ValueError, match=r"changed are rank \(2, before 4\); seed \(7, before 0\)"):
        tune(resume=True, settings=changed)
    other = [Document(TEXT.replace("gato", "pato"), is_file=True)]
    with pytest.raises(ValueError, match="changed are the data"):
        tune(resume=True, documents=other)
    with pytest.raises(ValueError, match=r"changed are model \(other, before"):
        tune(resume=True, name="other")
    assert contents(tmp_path / "out") == before
    tune(resume=True)
    with pytest.raises(ValueError, match="has ended; there is nothing to resume"):
        tune(resume=True)


def test_another_run_is_replaced_only_when_told(tune: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tune(listener=StopAt(3))
    before = contents(out)
    with pytest.raises(FileExistsError, match=r"holds another run, saved up to checkpoint-\d;"):
        tune()
    assert contents(out) == before
    (out / "mine.txt").write_text("stays")
    report = tune(overwrite=True, settings=Settings(**{**vars(SETTINGS), "max_steps": 1}))
    assert report.steps == 1
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-1"}
    assert (out / "mine.txt").exists()


def test_a_folder_of_something_else_is_left_alone(tune: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, message in (("thesis", "is not empty and holds no run"), ("file", "is a file")):
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match=message):
                tune(output=tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "thesis" / "a.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["torch", "system"])
def test_a_full_disk_keeps_the_last_checkpoint(
    whole: tuple[Report, Path],
    tune: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    save, calls = torch.save, []

    def full(value: object, path: Any, *arguments: object) -> None:
        calls.append(path)
        if "checkpoint-4" not in str(path) or not str(path).endswith("optimizer.pt"):
            return save(value, path, *arguments)
        Path(path).write_bytes(b"half of it")
        if kind == "torch":
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    message = r"checkpoint-4 could not be written .* MB are free now.*checkpoint-2 is kept"
    with pytest.raises(OSError, match=message):
        tune()
    assert any("optimizer.pt" in str(path) for path in calls)
    out = tmp_path / "out"
    assert [path.name for path in out.iterdir() if "checkpoint" in path.name] == ["checkpoint-2"]
    monkeypatch.undo()
    assert tune(resume=True).losses == whole[0].losses


def test_nan_stops_with_step_and_learning_rate(
    tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=r"the (loss|gradient) is (nan|inf) at step \d+ \(learning rate [\d.e+]+\)"
    ):
        tune(settings=Settings(**{**vars(SETTINGS), "learning_rate": 1e30}))

    step, done = AdamW8bit.step, []

    def spoil(self: Any, *arguments: Any) -> Any:
        found = step(self, *arguments)
        done.append(found)
        if len(done) == 3:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))
        return found

    monkeypatch.setattr(AdamW8bit, "step", spoil)
    with pytest.raises(ValueError, match=r"the loss is nan at step 4 .*checkpoint-2 is kept"):
        tune(overwrite=True)
    assert folder.last_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"


def test_bad_settings_are_named() -> None:
    cases: dict[str, Any] = {
        "rank": 0, "batch_size": 0, "alpha": 0, "learning_rate": float("nan"), "epochs": -1,
        "dropout": 1.0, "held_out": 1.5, "warmup": -0.1, "max_steps": 0, "save_every": 0,
        "sequence_length": 1, "weight_decay": -1, "targets": (),
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
    whole: tuple[Report, Path], tune: Any, monkeypatch: pytest.MonkeyPatch
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
    assert losses == pytest.approx([loss for _, loss in whole[0].losses], rel=1e-4)


def test_activations_are_computed_again_where_nothing_is_known(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device.recomputes(gpt2(), 32, 4)
    assert not device.recomputes(load(source), 32, 4)
    monkeypatch.setattr(device, "host_memory", lambda: None)
    assert device.recomputes(load(source), 32, 4)


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
    tune: Any, tmp_path: Path, source: Path, tokenizer: Any
) -> None:
    settings = Settings(**{**vars(SETTINGS), "train_1d": True, "dropout": 0.0})
    assert not tune(settings=settings, listener=StopAt(5)).finished
    resumed = tune(settings=settings, resume=True)
    straight = tune(settings=settings, output=tmp_path / "straight")
    assert resumed.losses == straight.losses
    base = load(source)
    row = torch.tensor(tokenizer("gato y gato").input_ids)[None]
    norm = base.transformer.h[0].ln_1.weight.clone()
    bias = base.transformer.h[0].mlp.fc_in.bias.clone()
    tuned = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    block = tuned.base_model.model.transformer.h[0]
    assert not torch.equal(block.ln_1.modules_to_save["default"].weight, norm)
    assert not torch.equal(block.mlp.fc_in.base_layer.bias, bias)
    with torch.no_grad():
        plain = load(source)(input_ids=row, labels=row).loss
        assert tuned(input_ids=row, labels=row).loss < 0.5 * plain


def test_without_matplotlib_all_is_done_but_the_plot(
    tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = tune(settings=Settings(**{**vars(SETTINGS), "max_steps": 1}))
    assert (report.finished, report.plot) == (True, "")
    assert (tmp_path / "out" / folder.ADAPTER).exists()
    assert not (tmp_path / "out" / folder.PLOT).exists()


def test_smoothing_is_a_mean_of_neighbours() -> None:
    assert smoothed([0.0, 3.0, 6.0]) == [1.5, 3.0, 4.5]
    assert smoothed([5.0]) == [5.0]
