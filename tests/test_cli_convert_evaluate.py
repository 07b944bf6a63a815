"""`gptj-q8 convert` and `gptj-q8 evaluate`."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from command_line import byte_ids, float32, read_json, run, save_byte_gptj

from gptj_q8.evaluate import compare, perplexity

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "En el principio crió Dios los cielos y la tierra. " * 8


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_gptj(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


# convert


def test_convert_prints_sizes_and_the_error_of_each_kind_of_layer(
    byte_dir: Path, tmp_path: Path
) -> None:
    result = run("convert", byte_dir, tmp_path / "8bit")
    assert result.exit_code == 0, result.output
    before = (byte_dir / "model.safetensors").stat().st_size
    after = (tmp_path / "8bit" / "model.safetensors").stat().st_size
    assert f"{before / 1e3:.2f} kB before, {after / 1e3:.2f} kB after" in result.stdout
    errors = dict(re.findall(r"^(\S+) .* ([\d.]+) %$", result.stdout, flags=re.MULTILINE))
    layers = {"attn.q_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out", "wte", "lm_head"}
    assert layers <= set(errors)
    assert all(0.3 < float(error) < 0.7 for error in errors.values())
    assert f"Saved in {tmp_path / '8bit'}" in result.stdout


def test_convert_then_evaluate_and_generate(byte_dir: Path, data: Path, tmp_path: Path) -> None:
    converted = read_json(run("convert", byte_dir, tmp_path / "8bit", "--json"))
    assert converted["bytes_after"] < 0.7 * converted["bytes_before"]
    assert converted["bits_per_weight"] == pytest.approx(
        9.0, abs=0.1
    )  # small: a codebook a layer weighs
    assert [layer["kind"] for layer in converted["layers"]].count("mlp.fc_in") == 1
    found = read_json(
        run("evaluate", tmp_path / "8bit", "--against", byte_dir, "--data", data, "--json")
    )
    assert 0 < found["kl"] < 0.01
    assert found["top1_agreement"] > 0.9
    made = read_json(run("generate", tmp_path / "8bit", "En el", "-n", 3, "--seed", 1, "--json"))
    assert made["new_tokens"] == 3


def test_convert_obeys_its_options(byte_dir: Path, tmp_path: Path) -> None:
    options = ("--block-size", 64, "--codebook", "linear", "--keep", "lm_head", "--keep", "wte")
    report = read_json(run("convert", byte_dir, tmp_path / "8bit", *options, "--json"))
    assert report["kept"] == ["lm_head", "transformer.wte"]
    config = json.loads((tmp_path / "8bit" / "config.json").read_text())["quantization_config"]
    assert (config["block_size"], config["codebook"]) == (64, "linear")
    printed = run("convert", byte_dir, tmp_path / "again", "--keep", "lm_head").stdout
    assert "Left as they were: lm_head" in printed


def test_convert_replaces_only_when_asked(byte_dir: Path, tmp_path: Path) -> None:
    assert run("convert", byte_dir, tmp_path / "8bit").exit_code == 0
    refused = run("convert", byte_dir, tmp_path / "8bit")
    assert refused.exit_code == 1
    assert "not empty" in refused.stderr
    assert run("convert", byte_dir, tmp_path / "8bit", "--overwrite").exit_code == 0


def test_convert_refuses_nan_and_writes_nothing(byte_dir: Path, tmp_path: Path) -> None:
    network = float32(byte_dir)
    with torch.no_grad():
        network.transformer.h[1].mlp.fc_in.weight[2, :3] = math.nan
    network.save_pretrained(tmp_path / "nan")
    result = run("convert", tmp_path / "nan", tmp_path / "8bit")
    assert result.exit_code == 1
    assert "transformer.h.1.mlp.fc_in.weight has 3 NaN or Inf values" in result.stderr
    assert not (tmp_path / "8bit").exists()


def test_float64_weights_are_one_sentence_too(byte_dir: Path, tmp_path: Path) -> None:
    float32(byte_dir).double().save_pretrained(tmp_path / "double")
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
    byte_dir: Path, tmp_path: Path, options: tuple[str, str], message: str
) -> None:
    result = run("convert", byte_dir, tmp_path / "8bit", *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


# evaluate


def test_evaluate_json_is_the_perplexity(byte_dir: Path, data: Path) -> None:
    found = read_json(run("evaluate", byte_dir, "--data", data, "--window", 16, "--json"))
    truth = perplexity(float32(byte_dir), byte_ids(TEXT, byte_dir), window=16)
    assert found["perplexity"]["value"] == pytest.approx(truth.value)
    assert found["perplexity"]["standard_error"] == pytest.approx(truth.standard_error)
    assert found["perplexity"]["tokens"] == len(TEXT.encode()) - 1


def test_evaluate_against_an_original(byte_dir: Path, other: Path, data: Path) -> None:
    arguments = ("evaluate", byte_dir, "--against", other, "--data", data, "--max-tokens", 100)
    found = read_json(run(*arguments, "--json"))
    truth = compare(float32(byte_dir), float32(other), byte_ids(TEXT, byte_dir)[:100])
    for name in ("kl", "kl_standard_error", "kl_max", "top1_agreement", "perplexity_change"):
        assert found[name] == pytest.approx(getattr(truth, name)), name
    printed = run(*arguments).stdout
    assert f"{truth.perplexity.value:.2f} ± " in printed
    assert f"{truth.kl:.2e} ± " in printed
    assert "99 tokens" in printed


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_evaluate_reads_compressed_text(byte_dir: Path, tmp_path: Path, suffix: str) -> None:
    import bz2
    import gzip
    import lzma

    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    path = tmp_path / f"text{suffix}"
    path.write_bytes(compress(TEXT.encode()))
    found = read_json(run("evaluate", byte_dir, "--data", path, "--max-tokens", 40, "--json"))
    assert found["perplexity"]["tokens"] == 39


def test_json_has_no_nan(byte_dir: Path, data: Path) -> None:
    found = read_json(run("evaluate", byte_dir, "--data", data, "--max-tokens", 2, "--json"))
    assert found["perplexity"]["standard_error"] is None
    printed = run("evaluate", byte_dir, "--data", data, "--max-tokens", 2).stdout
    assert "nan" not in printed.splitlines()[-1]


def test_a_model_without_a_tokenizer_borrows_one(
    byte_dir: Path, data: Path, tmp_path: Path
) -> None:
    float32(byte_dir).save_pretrained(tmp_path / "bare")
    arguments = ("evaluate", tmp_path / "bare", "--data", data)
    result = run(*arguments)
    assert result.exit_code == 1
    assert "has no tokenizer; name one with --tokenizer" in result.stderr
    truth = read_json(run("evaluate", byte_dir, "--data", data, "--json"))["perplexity"]
    for option in ("--tokenizer", "--against"):
        found = read_json(run(*arguments, option, byte_dir, "--json"))["perplexity"]
        assert found["value"] == pytest.approx(truth["value"])


def test_the_tokenizer_asked_for_is_taken_or_missed(
    byte_dir: Path, data: Path, tmp_path: Path
) -> None:
    float32(byte_dir).save_pretrained(tmp_path / "bare")
    arguments = ("evaluate", byte_dir, "--data", data, "--tokenizer", tmp_path / "bare")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "bare has no tokenizer" in result.stderr
    (tmp_path / "bare" / "tokenizer.json").write_text("{")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "bare: its tokenizer cannot be read: " in result.stderr


def test_nan_weights_are_told_not_averaged(byte_dir: Path, data: Path, tmp_path: Path) -> None:
    network = float32(byte_dir)
    with torch.no_grad():
        network.lm_head.weight[3, 3] = math.nan
    network.save_pretrained(tmp_path / "nan")
    result = run("evaluate", tmp_path / "nan", "--data", data, "--tokenizer", byte_dir)
    assert result.exit_code == 1
    assert "the model predicts NaN at" in result.stderr


def test_ctrl_c_is_quiet_and_exits_130(
    byte_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gptj_q8.evaluate.perplexity", interrupted)
    result = run("evaluate", byte_dir, "--data", data)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr == "\nStopped.\n"
