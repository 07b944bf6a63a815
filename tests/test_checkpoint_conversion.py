"""Conversion of checkpoints from file to file: what is written, where, and the report."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import QUICK, contents, gpt2, gptj, load, logits
from torch import nn
from transformers import AutoModelForCausalLM, GPTJForCausalLM

from gptj_q8.checkpoint import convert_checkpoint, shards
from gptj_q8.checkpoint.report import kind
from gptj_q8.config import Q8Config
from gptj_q8.nn import Q8Linear


def test_converting_equals_loading(source, tmp_path):
    convert_checkpoint(source, tmp_path / "new")
    model, expected = load(tmp_path / "new"), load(source, quantization_config=Q8Config())
    state = expected.state_dict()
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert tensor.dtype == state[name].dtype
    assert model.dtype == torch.float16
    assert model.config.quantization_config.to_dict() == Q8Config().to_dict()


def test_what_is_written(source, tmp_path):
    convert_checkpoint(source, tmp_path, QUICK)
    assert contents(tmp_path).keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "LICENSE",
        "README.md",
    }
    assert (tmp_path / "merges.txt").read_bytes() == (source / "merges.txt").read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["GPTJForCausalLM"]
    assert shards.Shard(tmp_path / "model.safetensors").metadata["format_version"] == "1"


def test_folders_stay_behind(source, tmp_path):
    """Even where their names are those of files that go along."""
    shutil.copytree(source, tmp_path / "old")
    (tmp_path / "old" / "tokenizer_sources").mkdir()
    convert_checkpoint(tmp_path / "old", tmp_path / "new", QUICK)
    assert (tmp_path / "new" / "tokenizer.json").exists()
    assert not (tmp_path / "new" / "tokenizer_sources").exists()


def test_plain_transformers_raises(source, tmp_path):
    """As for a model saved by save_pretrained: a size mismatch, not random weights."""
    convert_checkpoint(source, tmp_path, QUICK)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_shards_in_and_out(source, tmp_path):
    convert_checkpoint(source, tmp_path / "one", QUICK)
    convert_checkpoint(source, tmp_path / "many", QUICK, max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "many")), logits(load(tmp_path / "one")))


def test_dtype(source, tmp_path):
    convert_checkpoint(source, tmp_path, QUICK, dtype=torch.bfloat16)
    model, expected = load(tmp_path), load(source, quantization_config=QUICK, dtype=torch.bfloat16)
    assert model.dtype == model.lm_head.dtype == model.lm_head.bias.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(expected))


def test_dtype_where_config_says_nothing(source, tmp_path):
    shutil.copytree(source, tmp_path / "old")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    convert_checkpoint(tmp_path / "old", tmp_path / "new", QUICK)
    assert load(tmp_path / "new").dtype == torch.float16


def test_exemptions(source, tmp_path):
    config = Q8Config(codebook="dynamic", modules_to_not_convert=["lm_head"])
    report = convert_checkpoint(source, tmp_path, config)
    assert report.kept == ["lm_head"]
    assert type(load(tmp_path).lm_head) is nn.Linear


def test_pickles(source, tmp_path):
    model = GPTJForCausalLM.from_pretrained(source)
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    report = convert_checkpoint(tmp_path / "pickled", tmp_path / "new", QUICK)
    assert report.bytes_before == (tmp_path / "pickled" / "pytorch_model.bin").stat().st_size
    assert torch.equal(
        logits(load(tmp_path / "new")), logits(load(source, quantization_config=QUICK))
    )


def test_checkpoint_of_the_body(tmp_path):
    """Its names lack the prefix that the model with the head puts before them."""
    body = gptj().transformer
    body.save_pretrained(tmp_path / "body")
    report = convert_checkpoint(tmp_path / "body", tmp_path / "new", QUICK)
    assert [layer.kind for layer in report.layers][-1] == "wte"
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight", "lm_head.bias"}
    assert isinstance(model.transformer.h[1].mlp.fc_in, Q8Linear)


def test_leftovers_of_old_checkpoints_are_dropped(tmp_path):
    model = gptj()
    model.config.save_pretrained(tmp_path / "old")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    save_file(state, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(tmp_path / "old", tmp_path / "new", QUICK)
    load(tmp_path / "new")  # raises for unexpected tensors


@pytest.mark.parametrize("stored", ["once", "twice"])
def test_tied_embeddings(tmp_path, stored):
    model = gpt2()
    model.save_pretrained(tmp_path / "old")
    if stored == "twice":
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(state, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(tmp_path / "old", tmp_path / "new", QUICK)
    again = load(tmp_path / "new")
    assert again.lm_head.codes is again.transformer.wte.codes
    expected = load(tmp_path / "old", quantization_config=QUICK)
    assert torch.equal(logits(again), logits(expected))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_hub_id(source, tmp_path, monkeypatch, kind):
    """Downloads pickles only where there are no safetensors."""
    repository = tmp_path / "repository"
    shutil.copytree(source, repository)
    model = GPTJForCausalLM.from_pretrained(source)
    torch.save(model.state_dict(), repository / "pytorch_model.bin")
    if kind == "bin":
        for path in repository.glob("model*"):
            path.unlink()
    local = tmp_path / "local"

    def download(repo_id, *, revision, allow_patterns):
        assert (repo_id, revision) == ("someone/gpt-j", "float16")
        local.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for path in repository.glob(pattern):
                shutil.copy(path, local)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    convert_checkpoint("someone/gpt-j", tmp_path / "new", QUICK, revision="float16")
    assert (local / "pytorch_model.bin").exists() == (kind == "bin")
    assert torch.equal(
        logits(load(tmp_path / "new")), logits(load(source, quantization_config=QUICK))
    )


@pytest.mark.parametrize("there", ["model", "nothing", "dangling"])
def test_target_behind_a_link(source, tmp_path, there):
    place, link = tmp_path / "disk" / "place", tmp_path / "link"
    if there == "model":
        convert_checkpoint(source, place, Q8Config(block_size=32, codebook="linear"))
        (place / "README.md").write_text("mine")
    elif there == "nothing":
        place.mkdir(parents=True)
    link.symlink_to(place)
    convert_checkpoint(source, link, QUICK, overwrite=True)
    assert link.is_symlink()
    assert [path.name for path in place.parent.iterdir()] == ["place"]
    assert ((place / "README.md").read_text() == "mine") == (there == "model")
    assert torch.equal(logits(load(link)), logits(load(source, quantization_config=QUICK)))


def test_overwriting(source, tmp_path):
    """Old weights go, other files stay."""
    target = tmp_path / "target"
    convert_checkpoint(source, target, Q8Config(block_size=32), max_shard_size="40KB")
    for name in ("README.md", "model_card.json"):
        (target / name).write_text("mine")
    convert_checkpoint(source, target, QUICK, overwrite=True)
    assert not list(target.glob("model-*"))
    assert (target / "README.md").read_text() == (target / "model_card.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    load(target)


def test_overwriting_mixes_no_two_models(source, tmp_path):
    """Generation settings and tokenizers of another model would be taken for this one's."""
    target = tmp_path / "target"
    source = shutil.copytree(source, tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "generation_config.json"):
        (source / name).unlink(missing_ok=True)
    convert_checkpoint(source, target, QUICK)
    for name in ("added_tokens.json", "chat_template.jinja", "NOTICE", "generation_config.json"):
        (target / name).write_text("old")
    convert_checkpoint(source, target, QUICK, overwrite=True)
    assert (target / "added_tokens.json").exists(), "the new one brought no tokenizer"
    assert not (target / "generation_config.json").exists()
    (source / "tokenizer.json").write_text("{}")
    convert_checkpoint(source, target, QUICK, overwrite=True)
    assert (target / "tokenizer.json").exists()
    assert not (target / "added_tokens.json").exists()
    assert not (target / "chat_template.jinja").exists()
    assert (target / "NOTICE").read_text() == "old"


def test_what_cannot_move_along_is_not_lost(source, tmp_path, monkeypatch):
    target = tmp_path / "target"
    convert_checkpoint(source, target, Q8Config(block_size=32))
    (target / "notes.txt").write_text("mine")
    rename = Path.rename

    def fail(path, other):
        if path.name == "notes.txt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return rename(path, other)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match=r"target is written, but .* is in .*\.old: "):
        convert_checkpoint(source, target, QUICK, overwrite=True)
    load(target)
    (old,) = tmp_path.glob(".target.*.old")
    assert (old / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("there", ["nothing", "empty", "model"])
def test_where_the_system_is_as_strict_as_windows(source, tmp_path, monkeypatch, there):
    """It opens no folders, flushes only what is open for writing, and renames onto nothing."""

    def strict_open(path, flags, *args, **kwargs):
        if (
            Path(path).is_dir() and "dir_fd" not in kwargs
        ):  # shutil's, which goes without on Windows
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return os_open(path, flags, *args, **kwargs)

    def strict_fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")

    def strict_rename(path, target):
        if Path(target).exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(target))
        return path_rename(path, target)

    target = tmp_path / "target"
    if there == "empty":
        target.mkdir()
    elif there == "model":
        convert_checkpoint(source, target, Q8Config(block_size=32))
    os_open, path_rename = os.open, Path.rename
    monkeypatch.setattr(os, "open", strict_open)
    monkeypatch.setattr(os, "fsync", strict_fsync)
    monkeypatch.setattr(Path, "rename", strict_rename)
    convert_checkpoint(source, target, QUICK, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert load(target).config.quantization_config.block_size == QUICK.block_size


@pytest.mark.parametrize(
    ("size", "bytes_"), [(7, 7), ("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20B", 20)]
)
def test_shard_sizes(size, bytes_):
    assert shards.parse_size(size) == bytes_


@pytest.mark.slow
def test_memory_of_a_conversion(tmp_path):
    """2.4 GB of GPT-J in float16: a few minutes, 4 GB of disk."""
    bench_convert = pytest.importorskip("benchmarks.bench_convert", reason="needs the repository")
    bench_convert.write_checkpoint(tmp_path / "float16", 4, 4096, bench_convert.SHARD_BYTES)
    done = bench_convert.convert_and_load(tmp_path / "float16", tmp_path / "8bit")
    assert done.bytes_before > 2e9
    assert done.peak <= done.limit
    assert done.quantizing_load_peak <= done.limit
    assert done.load_peak <= done.limit


# The report


def test_report(source, tmp_path):
    report = convert_checkpoint(source, tmp_path, Q8Config(block_size=64))
    model = GPTJForCausalLM.from_pretrained(source, dtype=torch.float32)
    stored = load(tmp_path, dtype=torch.float32)
    assert report.bytes_before == sum(p.stat().st_size for p in source.glob("*.safetensors"))
    assert report.bytes_after == (tmp_path / "model.safetensors").stat().st_size
    assert [layer.kind for layer in report.layers] == [
        "attn.q_proj",
        "attn.k_proj",
        "attn.v_proj",
        "attn.out_proj",
        "mlp.fc_in",
        "mlp.fc_out",
        "lm_head",
        "wte",
    ]
    for layer in report.layers:
        names = [
            n for n, m in stored.named_modules() if hasattr(m, "codes") and kind(n) == layer.kind
        ]
        weights = [model.get_submodule(n).weight.detach() for n in names]
        decoded = [stored.get_submodule(n).dequantize() for n in names]
        assert layer.tensors == len(names)
        assert layer.weights == sum(w.numel() for w in weights)
        error = sum(
            float((d - w).double().square().sum()) for d, w in zip(decoded, weights, strict=True)
        )
        square = sum(float(w.double().square().sum()) for w in weights)
        assert layer.relative_rmse == pytest.approx(math.sqrt(error / square), rel=1e-5)
    assert report.weights == sum(layer.weights for layer in report.layers)
    blocks = sum(m.absmax.numel() for m in stored.modules() if hasattr(m, "codes"))
    tables = 256 * sum(layer.tensors for layer in report.layers)
    assert report.bits_per_weight == 8 + 32 * (blocks + tables) / report.weights
    assert report.kept == []


def test_zero_weights_have_no_error(tmp_path):
    model = gptj()
    nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "old")
    report = convert_checkpoint(tmp_path / "old", tmp_path / "new", QUICK)
    assert {layer.kind: layer.relative_rmse for layer in report.layers}["lm_head"] == 0


def test_progress(source, tmp_path):
    seen: list[tuple[int, int]] = []
    convert_checkpoint(source, tmp_path, QUICK, on_progress=lambda *step: seen.append(step))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer.h.13.attn.q_proj", "attn.q_proj"),
        ("lm_head", "lm_head"),
        ("transformer.wte", "wte"),
        ("experts.0.layers.2.up", "up"),
    ],
)
def test_kind(name, expected):
    assert kind(name) == expected
