"""The command line: what it prints where, its JSON, its exit codes; `generate` and `demo`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import POSITIONS, byte_ids, float32, read_json, run, save_byte_gptj
from tiny import contents
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

import gptj_q8
from gptj_q8.cli.demo import _activation
from gptj_q8.train.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_gptj(tmp_path_factory.mktemp("model"), seed=0)


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
    [("nonsense",), ("generate",), ("evaluate", "m", "--window", "1"), ("convert", "only-one")],
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr


# generate


def test_generate_prints_prompt_and_text_and_then_its_speed(model: Path) -> None:
    result = run("generate", model, "En el", "--max-new-tokens", 12, "--seed", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("En el")
    assert "12 tokens at" in result.stderr
    assert "seed 1" in result.stderr


def test_generate_json_is_the_same_text_with_its_timing(model: Path) -> None:
    arguments = ("generate", model, "En el", "-n", 12, "--seed", 1)
    printed = run(*arguments).stdout
    made = read_json(run(*arguments, "--json"))
    assert printed == f"En el{made['text']}\n"
    assert (made["prompt_tokens"], made["new_tokens"], made["seed"]) == (5, 12, 1)
    assert made["tokens_per_second"] == pytest.approx(11 / made["decode_seconds"])
    assert made["dtype"] == "float16"


def test_generate_greedily_follows_the_largest_logit(model: Path) -> None:
    made = read_json(
        run("generate", model, "En", "-n", 5, "--greedy", "--dtype", "float32", "--json")
    )
    network = float32(model)
    ids = byte_ids("En", model)
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    assert made["text"] == tokenizer.decode(ids[2:])
    assert made["seed"] is None


def test_generate_without_a_seed_says_which_it_took(model: Path) -> None:
    arguments = ("generate", model, "En", "-n", 20, "--json")
    first, second = read_json(run(*arguments)), read_json(run(*arguments))
    assert first["text"] != second["text"]
    again = read_json(run(*arguments, "--seed", first["seed"]))
    assert again["text"] == first["text"]


def test_generate_stops_at_the_end_of_the_context(model: Path) -> None:
    made = read_json(run("generate", model, "x" * 60, "-n", 100, "--seed", 1, "--json"))
    assert made["prompt_tokens"] + made["new_tokens"] == POSITIONS


def test_generate_from_nothing_and_with_too_much(model: Path) -> None:
    assert read_json(run("generate", model, "", "-n", 2, "--json"))["prompt_tokens"] == 1
    result = run("generate", model, "x" * POSITIONS)
    assert result.exit_code == 1
    assert "the prompt has 64 tokens; of the model's 64 it may take 63" in result.stderr
    assert not result.stdout, "refused before it is shown"


def test_generate_refuses_another_models_tokenizer(model: Path, tmp_path: Path) -> None:
    config = GPTJConfig(vocab_size=20, n_positions=64, n_embd=64, n_layer=1, n_head=2, rotary_dim=8)
    GPTJForCausalLM(config).save_pretrained(tmp_path / "small")
    result = run("generate", tmp_path / "small", "En", "--tokenizer", model)
    assert result.exit_code == 1
    assert "beyond the model's vocabulary of 20" in result.stderr


# demo


def test_demo_shows_the_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptj_q8.cli.demo.TOKENS", 1024)
    monkeypatch.setattr("gptj_q8.cli.demo.TIMED_TOKENS", 4)
    lesson = Settings(learning_rate=4e-3, sequence_length=128, max_steps=2, save_every=2)
    monkeypatch.setattr("gptj_q8.cli.demo.LESSON", lesson)
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()  # must not be taken for the model or the text
    output = tmp_path / "copy"
    shown = run("demo", "--output", output)
    assert shown.exit_code == 0, shown.output
    for part in (
        "bits/weight",
        "perplexity",
        "KL (nats)",
        "tokens/s",
        "\nEn el principio",
        "After:\nQuien mucho",
    ):
        assert part in shown.stdout
    # The lines it prints do what it says.
    python = shown.stdout.partition("In Python:")[2]
    lines = [line.strip() for line in python.splitlines() if line.startswith("    ")]
    names: dict[str, Any] = {}
    exec("\n".join(lines[:2]), names)
    assert names["model"].get_memory_footprint() < 7e6

    measured = read_json(run("demo", "--output", output, "--overwrite", "--json"))
    assert measured["python"] == lines[:2]
    ours, old = measured["copies"]
    assert old["divergence"]["kl"] > 2 * ours["divergence"]["kl"]
    assert measured["generation"] in shown.stdout
    assert measured["finetuning"]["samples"][0]["after"].strip() in shown.stdout


def test_demo_tells_how_its_commands_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `make demo` they are in .venv alone."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setenv("PATH", "")
    assert _activation() == "source .venv/bin/activate"
    command = tmp_path / "gptj-q8"
    command.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _activation() is None


@pytest.mark.slow
def test_demo_learns_proverbs(tmp_path: Path) -> None:
    """A minute: the lesson as `make demo` gives it."""
    lesson = read_json(run("demo", "--output", tmp_path / "copy", "--json"))["finetuning"]
    assert lesson["held_out_tokens"] > 3000
    assert lesson["held_out"][-1][1] <= 0.8 * lesson["held_out"][0][1]


def test_demo_replaces_no_other_model(model: Path) -> None:
    before = contents(model)
    result = run("demo", "--output", model)
    assert result.exit_code == 1
    assert "is not empty; overwrite it (--overwrite)" in result.stderr
    assert contents(model) == before


# What goes wrong


def test_missing_and_bad_inputs_are_one_sentence_and_exit_1(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("crió Dios".encode("latin-1"))
    monkeypatch.chdir(Path(__file__).parent.parent)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    short = tmp_path / "short.txt"
    short.write_text("hola\n")
    cases = {
        ("evaluate", model, "--data", tmp_path / "absent.txt"): "No such file or directory",
        ("evaluate", model, "--data", latin): "is not UTF-8 text (byte 3)",
        ("evaluate", model, "--data", empty): "is empty",
        ("evaluate", model, "--data", tmp_path): "Is a directory",
        ("generate", tmp_path / "absent", "x"): f"there is no model at {tmp_path}/absent",
        ("generate", latin, "x"): "is a file; a model is a folder",
        ("generate", tmp_path, "x"): f"{tmp_path} holds no model",
        ("generate", "tests/absent", "x"): "there is no model at tests/absent",
        ("generate", model, "x", "--device", "gpu"): "device gpu",
        ("evaluate", model, "--data", empty.parent / "latin.txt", "--json"): "UTF-8",
        ("finetune", model, "--data", short, "--output", tmp_path / "run"): "(--held-out 0)",
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


def test_debug_shows_the_trace(tmp_path: Path) -> None:
    result = run("--debug", "generate", tmp_path / "absent", "x")
    assert result.exit_code == 1
    assert result.exception is not None
    assert "there is no model" in str(result.exception)


def test_a_reader_that_leaves_early_is_no_error(model: Path) -> None:
    command = f"{sys.executable} -m gptj_q8 generate {model} x -n 60 --seed 1 | head -c 1"
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
