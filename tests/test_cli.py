"""The command line: what it prints where, its exit codes, what goes wrong."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import run

import gptj_q8
from gptj_q8.cli.errors import is_expected

pytestmark = pytest.mark.usefixtures("one_thread")


# What a stranger meets first


@pytest.mark.parametrize(
    "command",
    [
        "bench",
        "convert",
        "demo",
        "doctor",
        "evaluate",
        "finetune",
        "generate",
        "memory",
        "merge",
        "tune",
    ],
)
def test_help_tells_of_every_command(command: str) -> None:
    assert command in run("--help").stdout
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_version_names_what_matters() -> None:
    lines = run("--version").stdout.splitlines()
    assert lines == [
        f"gptj_q8 {gptj_q8.__version__}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
    ]


def test_module_and_script_are_the_same_program() -> None:
    module = subprocess.run(
        [sys.executable, "-m", "gptj_q8", "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage: gptj-q8" in module.stdout


def test_help_waits_for_no_heavy_import() -> None:
    code = (
        "import sys, types; before = set(sys.modules); import gptj_q8.cli; "
        "print({'torch', 'transformers', 'peft', 'accelerate'} & (set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("generate",),
        ("generate", "m", "x", "--seed", str(2**64)),
        ("evaluate", "m", "--window", "1"),
        ("convert", "only-one"),
        ("memory", "--device-memory", "inf"),
    ],
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr


# What goes wrong


def test_missing_and_bad_inputs_are_one_sentence_and_exit_1(
    byte_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("crió Dios".encode("latin-1"))
    monkeypatch.chdir(Path(__file__).parent.parent)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    short = tmp_path / "short.txt"
    short.write_text("hola\n")
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text('{"model_type": "gptj", "n_embd": "many"}')
    cases = {
        ("evaluate", byte_dir, "--data", tmp_path / "absent.txt"): "No such file or directory",
        ("evaluate", byte_dir, "--data", latin): "is not UTF-8 text (byte 3)",
        ("evaluate", byte_dir, "--data", empty): "is empty",
        ("evaluate", byte_dir, "--data", tmp_path): "Is a directory",
        ("generate", tmp_path / "absent", "x"): f"there is no model at {tmp_path}/absent",
        ("generate", latin, "x"): "is a file; a model is a folder",
        ("generate", tmp_path, "x"): f"{tmp_path} holds no model",
        ("generate", "tests/absent", "x"): "there is no model at tests/absent",
        ("generate", byte_dir, "x", "--device", "gpu"): "device 'gpu' cannot be used here",
        ("generate", byte_dir, "x", "--device", "meta"): "device 'meta' cannot be used here",
        ("generate", byte_dir, "x", "--device", "hpu"): "device 'hpu' cannot be used here",
        ("generate", byte_dir, "\udcff"): "surrogates not allowed",
        ("memory", "--model", odd): "n_embd",
        ("evaluate", byte_dir, "--data", empty.parent / "latin.txt", "--json"): "UTF-8",
        ("finetune", byte_dir, "--data", short, "--output", tmp_path / "run"): "(--held-out 0)",
    }
    for arguments, expected in cases.items():
        result = run(*arguments)
        assert result.exit_code == 1, (arguments, result.output)
        assert result.stdout == "", arguments
        assert expected in result.stderr, (arguments, result.stderr)
        assert result.stderr.startswith("gptj-q8: "), result.stderr
        assert result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize(
    "command", [("generate", "out/absent", "x"), ("memory", "--model", "out/absent")]
)
def test_a_name_that_is_not_found_offline_is_said(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("We couldn't connect to the Hub.\nCheck your connection.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", offline)
    result = run(*command)
    assert result.exit_code == 1
    assert result.stderr.startswith("gptj-q8: out/absent is no folder here and could not be")


def test_memory_that_runs_out_is_told() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_expected(raised.value)
    assert not is_expected(RuntimeError("a bug"))


def test_debug_shows_the_trace(tmp_path: Path) -> None:
    result = run("--debug", "generate", tmp_path / "absent", "x")
    assert result.exit_code == 1
    assert result.exception is not None
    assert "there is no model" in str(result.exception)


def test_a_reader_that_leaves_early_is_no_error(byte_dir: Path) -> None:
    command = f"{sys.executable} -m gptj_q8 generate {byte_dir} x -n 60 --seed 1 | head -c 1"
    out = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert out.stdout == "x"
    assert out.stderr == ""


def test_tune_without_a_gpu_says_what_is_missing() -> None:
    result = run("tune", "--device", "cpu")
    assert result.exit_code == 1
    assert "tune needs a GPU" in result.stderr


def test_retries_of_the_hub_are_not_told() -> None:
    code = (
        "import logging\n"
        "from gptj_q8.cli.load import quieten\n"
        "quieten()\n"
        "import datasets\n"
        "print(logging.getLogger('huggingface_hub.utils._http').isEnabledFor(logging.WARNING))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
