"""Conversion of checkpoints from file to file."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import contents, gpt2, gptj, logits
from torch import nn
from transformers import AutoModelForCausalLM, GPTJForCausalLM, PreTrainedModel

from gptj_q8.checkpoint import convert_checkpoint, shards
from gptj_q8.checkpoint.report import kind
from gptj_q8.config import Q8Config
from gptj_q8.nn import Q8Linear

QUICK = Q8Config(codebook="dynamic")  # where the codebook does not matter


def load(path: Path, **kwargs) -> PreTrainedModel:
    """from_pretrained that loads everything that it should."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-J in float16 in several shards, with a tokenizer."""
    path = tmp_path_factory.mktemp("source")
    gptj().half().save_pretrained(path, max_shard_size="50KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "LICENSE"):
        (path / name).write_text(f'{{"this is": "{name}"}}')
    (path / "optimizer.pt").write_text("none of ours")
    return path


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


def test_tied_weights_that_differ_are_refused(tmp_path):
    model = gpt2()
    model.config.save_pretrained(tmp_path / "old")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] += 1
    save_file(state, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        convert_checkpoint(tmp_path / "old", tmp_path / "new", QUICK)


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


# What goes wrong


def assert_untouched(target: Path, before: dict[str, bytes]) -> None:
    """`target` is as it was and nothing lies beside it."""
    assert [path.name for path in target.parent.iterdir()] == ([target.name] if before else [])
    if before:
        assert contents(target) == before


@pytest.fixture(params=["new", "old"])
def target(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Path:
    """Where to convert to: nothing is there, or a model."""
    path = tmp_path / "place" / "target"
    path.parent.mkdir()
    if request.param == "old":
        convert_checkpoint(source, path, Q8Config(block_size=32, codebook="linear"))
    return path


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
    fails(ValueError, r"pytorch_model\.bin: truncated or damaged", bad, target)
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
def one_file(tmp_path: Path) -> Path:
    gptj().save_pretrained(tmp_path / "one")
    return tmp_path / "one"


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.h.1.mlp.fc_in.weight"])
def test_missing_weight(one_file, target, name):
    change_tensors(one_file, lambda tensors: tensors.pop(name))
    fails(ValueError, f"one: lacks {name}", one_file, target)


def test_weight_of_another_shape(one_file, target):
    name = "transformer.h.1.mlp.fc_in.weight"
    change_tensors(one_file, lambda t: t.update({name: t[name][:5].clone()}))
    message = r"fc_in\.weight must have shape \[192, 48\] for this model, got \[5, 48\]"
    fails(ValueError, message, one_file, target)


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
    assert (place / "README.md").exists() == (there == "model")
    assert torch.equal(logits(load(link)), logits(load(source, quantization_config=QUICK)))


def test_mount_point_is_refused_at_once(source, tmp_path, monkeypatch):
    target = tmp_path / "volume"
    target.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == target)
    with pytest.raises(FileExistsError, match="is a mount point, which cannot be renamed"):
        convert_checkpoint(source, target, QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


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


def test_converting_in_place(source, tmp_path):
    """The source is mapped into memory while its successor is written."""
    shutil.copytree(source, tmp_path / "model")
    expected = logits(load(source, quantization_config=QUICK))
    convert_checkpoint(tmp_path / "model", tmp_path / "model", QUICK, overwrite=True)
    assert torch.equal(logits(load(tmp_path / "model")), expected)


@pytest.mark.parametrize(
    ("size", "bytes_"), [(7, 7), ("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20B", 20)]
)
def test_shard_sizes(size, bytes_):
    assert shards.parse_size(size) == bytes_


@pytest.mark.parametrize("size", [0, -1, "5", "GB", "-1GB", "0MB"])
def test_bad_shard_sizes(size):
    with pytest.raises(ValueError, match="max_shard_size"):
        shards.parse_size(size)


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
