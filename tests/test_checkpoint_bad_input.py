"""What a conversion refuses or fails at, leaving the target as it was."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import QUICK, change_tensors, contents, gpt2, gptj
from transformers import GPTJForCausalLM

from gptj_q8.checkpoint import convert_checkpoint, shards
from gptj_q8.config import Q8Config


@pytest.fixture(params=["new", "old"])
def target(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Path:
    """Where to convert to: nothing is there, or a model."""
    path = tmp_path / "place" / "target"
    path.parent.mkdir()
    if request.param == "old":
        convert_checkpoint(source, path, Q8Config(block_size=32, codebook="linear"))
    return path


def assert_untouched(target: Path, before: dict[str, bytes]) -> None:
    """`target` is as it was and nothing lies beside it."""
    assert [path.name for path in target.parent.iterdir()] == ([target.name] if before else [])
    if before:
        assert contents(target) == before


def fails(error: type[Exception], message: str, source: Path | str, target: Path) -> None:
    before = contents(target) if target.exists() else {}
    with pytest.raises(error, match=message):
        convert_checkpoint(source, target, QUICK, overwrite=True)
    assert_untouched(target, before)


def copy_of(source: Path, tmp_path: Path, change: Callable[[Path], object]) -> Path:
    """A copy of the checkpoint with its second shard changed."""
    path = tmp_path / "copy"
    shutil.copytree(source, path)
    change(next(path.glob("model-00002-*")))
    return path


def test_truncated_shard(source, target, tmp_path):
    bad = copy_of(source, tmp_path, lambda shard: shard.write_bytes(shard.read_bytes()[:-1]))
    fails(ValueError, "model-00002-of-.*truncated or damaged", bad, target)


def test_missing_shard(source, target, tmp_path):
    bad = copy_of(source, tmp_path, Path.unlink)
    fails(FileNotFoundError, r"lists \d shards, missing: model-00002-of", bad, target)


def test_truncated_pickle(source, target, tmp_path):
    bad = tmp_path / "bad"
    model = GPTJForCausalLM.from_pretrained(source)
    model.config.save_pretrained(bad)
    torch.save(model.state_dict(), bad / "pytorch_model.bin")
    data = (bad / "pytorch_model.bin").read_bytes()
    (bad / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    fails(ValueError, r"pytorch_model\.bin: truncated or damaged", bad, target)


def test_pickle_that_runs_code(target, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    bad = tmp_path / "bad"
    gptj().config.save_pretrained(bad)
    torch.save({"transformer.wte.weight": Evil()}, bad / "pytorch_model.bin")
    fails(ValueError, r"pytorch_model\.bin: refused, for it is no plain state dict", bad, target)
    assert not (tmp_path / "ran").exists()


def test_bad_weight(source, target, tmp_path):
    def spoil(shard):
        tensors = load_file(shard)
        name = next(name for name in tensors if tensors[name].dim() == 2)
        tensors[name][1, 2:4] = float("nan")
        save_file(tensors, shard, metadata={"format": "pt"})

    bad = copy_of(source, tmp_path, spoil)
    fails(ValueError, r"transformer\.h\.0\..*\.weight has 2 NaN or Inf values", bad, target)


def test_full_disk(source, target, monkeypatch):
    write = shards.Writer.write

    def fill_up(self, name, tensor):
        if name.startswith("transformer.h.1"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(shards.Writer, "write", fill_up)
    fails(OSError, "No space left", source, target)


def test_too_little_space(source, target, monkeypatch):
    usage = shutil.disk_usage(target.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    fails(OSError, r"No space left: .* GB needed", source, target)


def test_failed_rename(source, target, monkeypatch):
    rename = Path.rename

    def fail(self, to):
        if self.name.endswith(".partial"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    fails(OSError, "resource busy", source, target)


def test_interrupted(source, target):
    before = contents(target) if target.exists() else {}

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, target, QUICK, overwrite=True, on_progress=interrupt)
    assert_untouched(target, before)


def test_quantized_already(source, target, tmp_path):
    convert_checkpoint(source, tmp_path / "done", QUICK)
    fails(ValueError, r"is quantized already \(gptj_q8\)", tmp_path / "done", target)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"weight_map": [1]}'])
def test_damaged_index(source, target, tmp_path, text):
    bad = tmp_path / "bad"
    shutil.copytree(source, bad)
    (bad / "model.safetensors.index.json").write_text(text)
    fails(ValueError, r"index\.json: truncated or damaged", bad, target)


@pytest.fixture
def float_file(tmp_path: Path) -> Path:
    gptj().save_pretrained(tmp_path / "one")
    return tmp_path / "one"


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.h.1.mlp.fc_in.weight"])
def test_missing_weight(float_file, target, name):
    change_tensors(float_file, lambda tensors: tensors.pop(name))
    fails(ValueError, f"one: lacks {name}", float_file, target)


def test_weight_of_another_shape(float_file, target):
    name = "transformer.h.1.mlp.fc_in.weight"
    change_tensors(float_file, lambda t: t.update({name: t[name][:5].clone()}))
    message = r"fc_in\.weight must have shape \[192, 48\] for this model, got \[5, 48\]"
    fails(ValueError, message, float_file, target)


def test_tied_weights_that_differ_are_refused(tmp_path):
    model = gpt2()
    model.config.save_pretrained(tmp_path / "old")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] += 1
    save_file(state, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        convert_checkpoint(tmp_path / "old", tmp_path / "new", QUICK)


def test_exemption_that_matches_nothing(source, tmp_path):
    config = Q8Config(modules_to_not_convert=["lmhead"])
    with pytest.raises(ValueError, match="matches no module: lmhead"):
        convert_checkpoint(source, tmp_path / "new", config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_dtype_that_no_layer_can_have(source, tmp_path, dtype):
    with pytest.raises(TypeError, match="convert_checkpoint: dtype must be float32 or bfloat16"):
        convert_checkpoint(source, tmp_path / "new", QUICK, dtype=dtype)


def test_no_weights(source, target, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    shutil.copy(source / "config.json", bad)
    fails(FileNotFoundError, r"holds neither model\.safetensors nor", bad, target)


def test_no_such_directory(target, tmp_path):
    fails(FileNotFoundError, "neither a directory nor a Hub id", tmp_path / "nowhere", target)
    fails(FileNotFoundError, "neither a directory nor a Hub id", "./no/where", target)


# The place to write to


def test_place_taken(source, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        convert_checkpoint(source, tmp_path, QUICK)
    with pytest.raises(FileExistsError, match="holds no model to overwrite"):
        convert_checkpoint(source, tmp_path, QUICK, overwrite=True)
    with pytest.raises(FileExistsError, match=r"note\.txt is a file"):
        convert_checkpoint(source, tmp_path / "note.txt", QUICK, overwrite=True)
    assert contents(tmp_path) == {"note.txt": b"mine"}


def test_what_is_no_model_is_not_overwritten(source, tmp_path):
    """Other programs, too, have a config.json."""
    (tmp_path / "config.json").write_text('{"port": 80}')
    with pytest.raises(FileExistsError, match="holds no model to overwrite"):
        convert_checkpoint(source, tmp_path, QUICK, overwrite=True)
    assert contents(tmp_path) == {"config.json": b'{"port": 80}'}


def test_mount_point_is_refused_at_once(source, tmp_path, monkeypatch):
    target = tmp_path / "volume"
    target.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == target)
    with pytest.raises(FileExistsError, match="is a mount point, which cannot be renamed"):
        convert_checkpoint(source, target, QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


@pytest.mark.parametrize("size", [0, -1, "5", "GB", "-1GB", "0MB"])
def test_bad_shard_sizes(size):
    with pytest.raises(ValueError, match="max_shard_size"):
        shards.parse_size(size)


def test_the_source_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(source, copy)
    before = contents(copy)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is the source itself"):
            convert_checkpoint(copy, copy / "." / ".." / "model", overwrite=overwrite)
    assert contents(copy) == before


def test_what_cannot_be_fetched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="nowhere/x is no folder here and could not be"):
        convert_checkpoint("nowhere/x", tmp_path / "target")
