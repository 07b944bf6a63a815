"""A run that is stopped, breaks off or finds another in its place keeps what was saved."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import SETTINGS, TEXT, StopAt
from tiny import contents

from gptj_q8.checkpoint import adapters
from gptj_q8.optim import AdamW8bit
from gptj_q8.train import folder
from gptj_q8.train.report import Report
from gptj_q8.train.settings import Settings
from gptj_q8.train.texts import Document

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_resumes_to_the_same_losses(
    whole_run: tuple[Report, Path], tune: Any, number: int
) -> None:
    expected, _ = whole_run
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


def test_the_last_checkpoint_is_the_one_of_most_steps(tmp_path: Path) -> None:
    """A run killed between writing one and removing the one before leaves both."""
    assert folder.last_checkpoint(tmp_path / "none") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.part", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").write_text("a file")
    assert folder.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


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
    written = [tmp_path / name / adapters.WEIGHTS for name in ("out", "straight")]
    assert written[0].read_bytes() == written[1].read_bytes()


def test_a_run_goes_on_only_as_it_began(tune: Any, tmp_path: Path, byte_dir: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no run to resume: it has no run\.json"):
        tune(resume=True)
    tune(listener=StopAt(1))
    record = tmp_path / "out" / folder.RECORD
    written = record.read_text()
    for damaged in (written[:-9], "null", '"text"', "[1]", "{}", '{"settings": 3}'):
        record.write_text(damaged)
        with pytest.raises(ValueError, match=r"run\.json is no record of a run"):
            tune(resume=True)
    record.write_text(written)
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
    with pytest.raises(ValueError, match=r"goes on .* or is replaced .*, not both"):
        tune(resume=True, overwrite=True)
    tune(resume=True)
    with pytest.raises(ValueError, match="has ended; there is nothing to resume"):
        tune(resume=True)


def test_a_run_that_was_killed_while_the_adapter_moved_is_ended(tune: Any, tmp_path: Path) -> None:
    report = tune()
    out = tmp_path / "out"
    (out / folder.SUMMARY).unlink()
    (out / ".adapter").mkdir()
    (out / adapters.WEIGHTS).rename(out / ".adapter" / adapters.WEIGHTS)
    resumed = tune(resume=True)
    assert (resumed.finished, resumed.losses) == (True, report.losses)
    assert (out / adapters.WEIGHTS).exists()
    assert not (out / ".adapter").exists()


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
    whole_run: tuple[Report, Path],
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
    assert tune(resume=True).losses == whole_run[0].losses


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
