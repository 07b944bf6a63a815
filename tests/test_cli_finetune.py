"""`gptj-q8 finetune` and the adapter that `generate` and `evaluate` take from it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import read_json, run

import gptj_q8
from gptj_q8.checkpoint import adapters
from gptj_q8.cli.finetune import say_losses
from gptj_q8.cli.screen import open_screen

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = (
    "".join(f"{word} y {word} son dos {word}s.\n" for word in ("gato", "perro", "pan", "mes")) * 9
)
QUICK = ("--lr", "2e-2", "--epochs", 2, "--batch-size", 4, "--sequence-length", 32, "--rank", 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.txt"
    path.write_text(TEXT)
    return path


def test_it_shows_losses_samples_and_where_to_go(
    byte_dir: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shown = run("finetune", byte_dir, "--data", data, "-o", out, *QUICK, "--prompt", "gato y")
    assert shown.exit_code == 0, shown.output
    for part in ("held-out tokens", "perplexity", "Before:\ngato y", "After:\ngato y", "loss.png"):
        assert part in shown.stdout
    first, second = re.findall(r"Step \d+ of.*", shown.stderr)[:2]
    assert first.startswith("Step 1 of")
    assert "left" not in first, "nothing is known yet"
    assert second.endswith(" s left")
    assert "held-out loss" in shown.stderr
    assert "\x1b" not in shown.output, "plain lines where there is no terminal"
    # The line it ends with does what it says.
    words = shlex.split(shown.stdout.rstrip().splitlines()[-1])
    assert words[:2] == ["gptj-q8", "generate"]
    spoken = run(*words[1:], "--greedy", "-n", 3)
    assert spoken.exit_code == 0, spoken.output
    assert spoken.stdout.startswith("gato y")


@pytest.mark.parametrize(
    ("steps", "held_out", "told"),
    [
        (8, [3.0, 2.0, 2.5], "lowest, 2.000, after step 4 of 8"),
        (8, [3.0, 2.5, 2.0], "8 steps are few"),
        (80, [3.0, 2.5, 2.0], ""),
    ],
)
def test_it_tells_what_may_lower_the_held_out_loss(
    capsys: pytest.CaptureFixture[str], steps: int, held_out: list[float], told: str
) -> None:
    report = SimpleNamespace(
        held_out=list(zip((0, steps // 2, steps), held_out, strict=True)),
        held_out_tokens=9,
        steps=steps,
        finished=True,
    )
    with open_screen(False) as screen:
        say_losses(screen, report)
    note = capsys.readouterr().err
    assert told in note if told else not note


def test_evaluate_agrees_that_the_adapter_helps(byte_dir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = read_json(run("finetune", byte_dir, "--data", data, "-o", out, *QUICK, "--json"))
    assert made["held_out"][-1][1] < 0.9 * made["held_out"][0][1]
    assert made["adapter"] == str(out)
    assert {"before", "after", "prompt"} == set(made["samples"][0])
    plain = read_json(run("evaluate", byte_dir, "--data", data, "--json"))
    tuned = read_json(run("evaluate", byte_dir, "--data", data, "--adapter", out, "--json"))
    assert tuned["perplexity"]["value"] < 0.8 * plain["perplexity"]["value"]
    assert (plain["adapter"], tuned["adapter"]) == (None, str(out))


@pytest.mark.parametrize("stored", ["float", "8bit"])
@pytest.mark.parametrize("form", ["8bit", "float16", "float32"])
def test_a_merged_model_answers_as_the_adapter_did(
    byte_dir: Path,
    data: Path,
    tmp_path: Path,
    stored: str,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if stored == "8bit":
        assert run("convert", byte_dir, tmp_path / "8bit").exit_code == 0
        byte_dir = tmp_path / "8bit"
    out, merged = tmp_path / "out", tmp_path / "merged"
    settings = (*QUICK[:2], *QUICK[4:], "--max-steps", 8)
    made = run("finetune", byte_dir, "--data", data, "-o", out, *settings)
    assert made.exit_code == 0, made.output
    told = read_json(run("merge", byte_dir, out, "-o", merged, "--to", form, "--json"))
    assert (told["form"], told["output"]) == (form, str(merged))
    assert not (merged / "adapter_config.json").exists()
    measured = [
        read_json(run("evaluate", *arguments, "--data", data, "--json"))["perplexity"]["nll"]
        for arguments in ((byte_dir, "--adapter", out), (merged,), (byte_dir,))
    ]
    with_adapter, in_weights, without = measured
    # Rounding to 8 bits moves a weight by 0.6 %, to float16 by 0.03 %.
    within = {"8bit": 0.02, "float16": 1e-3, "float32": 1e-5}[form]
    assert in_weights == pytest.approx(with_adapter, rel=within)
    assert abs(without - with_adapter) > 10 * within * with_adapter
    stored_as = json.loads((merged / "config.json").read_text())
    assert ("quantization_config" in stored_as) == (form == "8bit")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    told = read_json(run("merge", byte_dir, out, "--output=~/merged", "--to", form, "--json"))
    assert told["output"] == str(tmp_path / "home" / "merged")
    assert told["bytes"] > 0
    again = run("merge", byte_dir, out, "-o", merged)
    assert again.exit_code == 1
    assert (
        "is not empty; choose another place, or overwrite it: overwrite=True, on the command line "
        "--overwrite" in again.stderr
    )


def test_ctrl_c_saves_and_the_command_it_prints_goes_on(
    byte_dir: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a folder"
    arguments = ["finetune", byte_dir, "--data", data, "-o", out, *QUICK, "--dropout", 0.1]
    command = [sys.executable, "-m", "gptj_q8", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        told = ""
        while "Step 2 of" not in told:
            line = process.stderr.readline()
            assert line, told
            told += line
        process.send_signal(signal.SIGINT)
        stdout, rest = process.communicate(timeout=60)
    assert process.returncode == 130, told + rest
    assert "Stopping after this step" in rest
    assert "Try it" not in stdout
    line = rest[rest.index("To go on: ") :].splitlines()[0].removeprefix("To go on: ")
    assert line.endswith(" --resume")
    resumed = read_json(run(*shlex.split(line)[1:], "--json"))
    other = read_json(run(*arguments[:5], tmp_path / "other", *arguments[6:], "--json"))
    assert resumed["losses"] == other["losses"]
    assert resumed["samples"] == other["samples"]


def test_bad_input_is_one_sentence_and_exit_1(byte_dir: Path, data: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "p" * 60, "completion": "c" * 9}) + "\n")
    small = tmp_path / "small"
    small.mkdir()
    for path in byte_dir.iterdir():
        (small / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "out"
    cases: list[tuple[tuple[object, ...], str]] = [
        ((byte_dir, "--data", empty), "is empty: there is nothing to learn in it"),
        ((byte_dir, "--data", tmp_path / "absent.txt"), "there is no file or folder"),
        ((byte_dir, "--data", data, "--rank", 0), "rank must be at least 1, got 0"),
        ((byte_dir, "--data", data, "--target", "nowhere"), "nowhere"),
        ((byte_dir, "--data", data, "--sequence-length", 65), "beyond the model's context of 64"),
        (
            (byte_dir, "--data", long, "--held-out", 0),
            "line 1: prompt and completion are 70 tokens",
        ),
        ((byte_dir, "--data", data, "--tokenizer", "demo"), "beyond the model's vocabulary of 257"),
        (
            (byte_dir, "--data", data, "--dtype", "float16", "--device", "cpu"),
            "float16 trains on a",
        ),
        ((byte_dir, "--data", data, "--resume"), "holds no run to resume"),
    ]
    for arguments, expected in cases:
        result = run("finetune", *arguments, "-o", out)
        assert result.exit_code == 1, (arguments, result.output)
        assert expected in result.stderr, (arguments, result.stderr)
        assert result.stderr.startswith("gptj-q8: "), result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert not out.exists()


@pytest.mark.parametrize(("asked", "threads"), [(None, 1), ("2", 2)])
def test_a_small_model_takes_one_thread_unless_told(
    asked: str | None, threads: int, byte_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    for command, status in (
        (("finetune", byte_dir, "--data", data, "-o", "x", "--target", "nowhere"), 1),
        (("generate", byte_dir, "En", "-n", 1), 0),
        (("evaluate", byte_dir, "--data", data, "--max-tokens", 8), 0),
    ):
        torch.set_num_threads(2)
        assert run(*command).exit_code == status
        assert torch.get_num_threads() == threads, command


def test_a_damaged_adapter_is_named(byte_dir: Path, tmp_path: Path) -> None:
    config, weights = tmp_path / adapters.CONFIG, tmp_path / adapters.WEIGHTS
    whole = '{"peft_type": "LORA"}'
    cases = [
        (whole[:-1], b"", f"{config}: truncated or damaged"),
        ("[]", b"", f"{config}: is no adapter's configuration"),
        ("{}", b"", f"{config}: is no adapter's configuration"),
        (whole, b"\x08", f"{weights}: truncated or damaged"),
        (whole, None, f"{tmp_path}: the adapter's weights, {weights.name}, are missing"),
    ]
    for text, content, expected in cases:
        config.write_text(text)
        weights.unlink(missing_ok=True)
        if content is not None:
            weights.write_bytes(content)
        for arguments in (
            ("generate", byte_dir, "x", "--adapter", tmp_path),
            ("merge", byte_dir, tmp_path, "-o", tmp_path / "merged"),
        ):
            result = run(*arguments)
            assert result.exit_code == 1, (arguments, result.output)
            assert result.stderr.startswith(f"gptj-q8: {expected}"), result.stderr
            assert result.stderr.count("\n") == 1, result.stderr
        for load in (
            lambda: gptj_q8.from_pretrained(tmp_path),
            lambda: gptj_q8.merge(byte_dir, tmp_path, tmp_path / "merged"),
        ):
            with pytest.raises((ValueError, FileNotFoundError), match=re.escape(expected)):
                load()


def test_an_adapter_is_told_from_a_model(byte_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "run.json").write_text("{}")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((tmp_path, "x"), "holds an adapter: name its model, and it with --adapter"),
        ((byte_dir, "x", "--adapter", byte_dir), "holds no adapter: it has no adapter_config.json"),
        ((byte_dir, "x", "--adapter", stopped), "holds a run that has not ended: go on with it"),
        ((byte_dir, "x", "--adapter", tmp_path / "no"), "is no folder with an adapter_config.json"),
    ]
    for arguments, expected in cases:
        result = run("generate", *arguments)
        assert result.exit_code == 1, (arguments, result.output)
        assert expected in result.stderr
