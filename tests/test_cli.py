"""The command line: what it prints where, its JSON, its exit codes."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from tiny import contents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from gptj_q8.cli import app
from gptj_q8.evaluate import compare, perplexity

pytestmark = pytest.mark.usefixtures("one_thread")

POSITIONS = 64
TEXT = "En el principio crió Dios los cielos y la tierra. " * 8


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})


def read_json(result: Result) -> dict:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def save_tiny_gptj(folder: Path, seed: int) -> Path:
    """A random GPT-J whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>"
    )
    torch.manual_seed(seed)
    config = GPTJConfig(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=64,
        n_layer=2,
        n_head=2,
        rotary_dim=8,
        initializer_range=0.2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPTJForCausalLM(config).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_gptj(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_gptj(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def float32(folder: Path) -> GPTJForCausalLM:
    return GPTJForCausalLM.from_pretrained(folder, dtype=torch.float32)


def byte_ids(text: str, folder: Path) -> list[int]:
    return PreTrainedTokenizerFast.from_pretrained(folder)(text).input_ids


# What a stranger meets first


@pytest.mark.parametrize("command", ["demo", "convert", "generate", "evaluate"])
def test_help_tells_of_every_command(command: str) -> None:
    assert command in run("--help").stdout
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_version_names_what_matters() -> None:
    lines = run("--version").stdout.split("\n")
    assert [line.split()[0] for line in lines if line] == ["gptj_q8", "torch", "transformers"]


def test_module_and_script_are_the_same_program() -> None:
    module = subprocess.run(
        [sys.executable, "-m", "gptj_q8", "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage: gptj-q8" in module.stdout


def test_help_waits_for_no_heavy_import() -> None:
    code = (
        "import sys, types; before = set(sys.modules); import gptj_q8.cli; "
        "print({'transformers', 'peft', 'accelerate'} & (set(sys.modules) - before))"
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
    assert "the prompt has 64 tokens, the model has room for 63" in result.stderr


def test_generate_refuses_another_models_tokenizer(model: Path, tmp_path: Path) -> None:
    config = GPTJConfig(vocab_size=20, n_positions=64, n_embd=64, n_layer=1, n_head=2, rotary_dim=8)
    GPTJForCausalLM(config).save_pretrained(tmp_path / "small")
    result = run("generate", tmp_path / "small", "En", "--tokenizer", model)
    assert result.exit_code == 1
    assert "beyond the model's vocabulary of 20" in result.stderr


# evaluate


def test_evaluate_json_is_the_perplexity(model: Path, data: Path) -> None:
    found = read_json(run("evaluate", model, "--data", data, "--window", 16, "--json"))
    truth = perplexity(float32(model), byte_ids(TEXT, model), window=16)
    assert found["perplexity"]["value"] == pytest.approx(truth.value)
    assert found["perplexity"]["standard_error"] == pytest.approx(truth.standard_error)
    assert found["perplexity"]["tokens"] == len(TEXT.encode()) - 1


def test_evaluate_against_an_original(model: Path, other: Path, data: Path) -> None:
    arguments = ("evaluate", model, "--against", other, "--data", data, "--max-tokens", 100)
    found = read_json(run(*arguments, "--json"))
    truth = compare(float32(model), float32(other), byte_ids(TEXT, model)[:100])
    for name in ("kl", "kl_standard_error", "kl_max", "top1_agreement", "perplexity_change"):
        assert found[name] == pytest.approx(getattr(truth, name)), name
    printed = run(*arguments).stdout
    assert f"{truth.perplexity.value:.2f} ± " in printed
    assert f"{truth.kl:.2e} ± " in printed
    assert "99 tokens" in printed


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_evaluate_reads_compressed_text(model: Path, tmp_path: Path, suffix: str) -> None:
    import bz2
    import gzip
    import lzma

    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    path = tmp_path / f"text{suffix}"
    path.write_bytes(compress(TEXT.encode()))
    found = read_json(run("evaluate", model, "--data", path, "--max-tokens", 40, "--json"))
    assert found["perplexity"]["tokens"] == 39


def test_json_has_no_nan(model: Path, data: Path) -> None:
    found = read_json(run("evaluate", model, "--data", data, "--max-tokens", 2, "--json"))
    assert found["perplexity"]["standard_error"] is None
    printed = run("evaluate", model, "--data", data, "--max-tokens", 2).stdout
    assert "nan" not in printed.splitlines()[-1]


# convert


def test_convert_prints_sizes_and_the_error_of_each_kind_of_layer(
    model: Path, tmp_path: Path
) -> None:
    result = run("convert", model, tmp_path / "8bit")
    assert result.exit_code == 0, result.output
    before = (model / "model.safetensors").stat().st_size
    after = (tmp_path / "8bit" / "model.safetensors").stat().st_size
    assert f"{before / 1e3:.2f} kB before, {after / 1e3:.2f} kB after" in result.stdout
    errors = dict(re.findall(r"^(\S+) .* ([\d.]+) %$", result.stdout, flags=re.MULTILINE))
    layers = {"attn.q_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out", "wte", "lm_head"}
    assert layers <= set(errors)
    assert all(0.3 < float(error) < 0.7 for error in errors.values())
    assert f"Saved in {tmp_path / '8bit'}" in result.stdout


def test_convert_then_evaluate_and_generate(model: Path, data: Path, tmp_path: Path) -> None:
    converted = read_json(run("convert", model, tmp_path / "8bit", "--json"))
    assert converted["bytes_after"] < 0.7 * converted["bytes_before"]
    assert converted["bits_per_weight"] == pytest.approx(
        9.0, abs=0.1
    )  # small: a codebook a layer weighs
    assert [layer["kind"] for layer in converted["layers"]].count("mlp.fc_in") == 1
    found = read_json(
        run("evaluate", tmp_path / "8bit", "--against", model, "--data", data, "--json")
    )
    assert 0 < found["kl"] < 0.01
    assert found["top1_agreement"] > 0.9
    made = read_json(run("generate", tmp_path / "8bit", "En el", "-n", 3, "--seed", 1, "--json"))
    assert made["new_tokens"] == 3


def test_convert_obeys_its_options(model: Path, tmp_path: Path) -> None:
    options = ("--block-size", 64, "--codebook", "linear", "--keep", "lm_head", "--keep", "wte")
    report = read_json(run("convert", model, tmp_path / "8bit", *options, "--json"))
    assert report["kept"] == ["lm_head", "transformer.wte"]
    config = json.loads((tmp_path / "8bit" / "config.json").read_text())["quantization_config"]
    assert (config["block_size"], config["codebook"]) == (64, "linear")
    printed = run("convert", model, tmp_path / "again", "--keep", "lm_head").stdout
    assert "Left as they were: lm_head" in printed


def test_convert_replaces_only_when_asked(model: Path, tmp_path: Path) -> None:
    assert run("convert", model, tmp_path / "8bit").exit_code == 0
    refused = run("convert", model, tmp_path / "8bit")
    assert refused.exit_code == 1
    assert "not empty" in refused.stderr
    assert run("convert", model, tmp_path / "8bit", "--overwrite").exit_code == 0


def test_convert_refuses_nan_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    network = float32(model)
    with torch.no_grad():
        network.transformer.h[1].mlp.fc_in.weight[2, :3] = math.nan
    network.save_pretrained(tmp_path / "nan")
    result = run("convert", tmp_path / "nan", tmp_path / "8bit")
    assert result.exit_code == 1
    assert "transformer.h.1.mlp.fc_in.weight has 3 NaN or Inf values" in result.stderr
    assert not (tmp_path / "8bit").exists()


def test_float64_weights_are_one_sentence_too(model: Path, tmp_path: Path) -> None:
    float32(model).double().save_pretrained(tmp_path / "double")
    result = run("convert", tmp_path / "double", tmp_path / "8bit")
    assert result.exit_code == 1
    assert "must be float32 or bfloat16 or float16, got float64" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--block-size", "100"), "block_size must be a power of two"),
        (("--codebook", "nf4"), "codebook must be one of dynamic, fitted, linear"),
        (("--max-shard-size", "large"), "max_shard_size must look like"),
    ],
)
def test_convert_explains_bad_options(
    model: Path, tmp_path: Path, options: tuple[str, str], message: str
) -> None:
    result = run("convert", model, tmp_path / "8bit", *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


# demo


def test_demo_shows_the_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptj_q8.cli.demo.TOKENS", 1024)
    monkeypatch.setattr("gptj_q8.cli.demo.TIMED_TOKENS", 4)
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()  # must not be taken for the model or the text
    output = tmp_path / "copy"
    shown = run("demo", "--output", output)
    assert shown.exit_code == 0, shown.output
    for part in ("bits/weight", "perplexity", "KL (nats)", "tokens/s", "\nEn el principio"):
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


def test_demo_replaces_no_other_model(model: Path) -> None:
    before = contents(model)
    result = run("demo", "--output", model)
    assert result.exit_code == 1
    assert "is not empty; ask to overwrite it" in result.stderr
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
    }
    for arguments, expected in cases.items():
        result = run(*arguments)
        assert result.exit_code == 1, (arguments, result.output)
        assert result.stdout == "", arguments
        assert expected in result.stderr, (arguments, result.stderr)
        assert result.stderr.startswith("gptj-q8: "), result.stderr
        assert result.stderr.count("\n") == 1, result.stderr


def test_a_model_without_a_tokenizer_borrows_one(model: Path, data: Path, tmp_path: Path) -> None:
    float32(model).save_pretrained(tmp_path / "bare")
    arguments = ("evaluate", tmp_path / "bare", "--data", data)
    result = run(*arguments)
    assert result.exit_code == 1
    assert "has no tokenizer; name one with --tokenizer" in result.stderr
    truth = read_json(run("evaluate", model, "--data", data, "--json"))["perplexity"]
    for option in ("--tokenizer", "--against"):
        found = read_json(run(*arguments, option, model, "--json"))["perplexity"]
        assert found["value"] == pytest.approx(truth["value"])


def test_nan_weights_are_told_not_averaged(model: Path, data: Path, tmp_path: Path) -> None:
    network = float32(model)
    with torch.no_grad():
        network.lm_head.weight[3, 3] = math.nan
    network.save_pretrained(tmp_path / "nan")
    result = run("evaluate", tmp_path / "nan", "--data", data, "--tokenizer", model)
    assert result.exit_code == 1
    assert "the model predicts NaN at" in result.stderr


def test_debug_shows_the_trace(tmp_path: Path) -> None:
    result = run("--debug", "generate", tmp_path / "absent", "x")
    assert result.exit_code == 1
    assert result.exception is not None
    assert "there is no model" in str(result.exception)


def test_ctrl_c_is_quiet_and_exits_130(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gptj_q8.evaluate.perplexity", interrupted)
    result = run("evaluate", model, "--data", data)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr == "\nStopped.\n"


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
