"""Checkpoints of the hivemind family, converted, against what the old code computes."""

from __future__ import annotations

import shutil

import hivemind_layout as old
import pytest
import torch
from command_line import float32, read_json, run, save_byte_gptj
from peft import PeftModel
from tiny import contents, load, logits, relative

import gptj_q8
from gptj_q8.checkpoint import convert_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("form", old.FORMS)
@pytest.mark.parametrize("kind", old.ADAPTERS)
def test_conversion(tmp_path, form, kind):
    state = old.state_dict(adapters=kind)
    old.write(tmp_path / "old", state, form)
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    report = convert_checkpoint(tmp_path / "old", tmp_path / "new", max_shard_size="60KB")
    base = load(tmp_path / "new")
    old.assert_same_weights(base, state)
    assert relative(logits(base), old.old_logits(old.state_dict())) < old.CLOSE
    names = set(contents(tmp_path / "new"))
    assert {name for name in names if name.startswith("adapter")} == (
        set()
        if kind == "none"
        else {f"adapter/adapter_{x}" for x in ("config.json", "model.safetensors")}
    )
    assert "tokenizer.json" in names
    assert report.rewritten
    assert report.adapters == {"none": 0, "attention": 8}.get(kind, 14)
    assert (report.kept, {layer.relative_rmse for layer in report.layers}) == ([], {0.0})
    assert report.weights == sum(t.numel() for t in state.values() if t.dtype == torch.uint8) - (
        2 * 64 * 64  # the masks
    )
    if kind != "none":
        tuned = PeftModel.from_pretrained(base, tmp_path / "new" / "adapter")
        assert relative(logits(tuned), old.old_logits(state)) < old.CLOSE


def test_adapters_go_to_any_model_of_the_kind(tmp_path):
    """They are plain PEFT: a scaling of 1, by short names, on a float model too."""
    state = old.state_dict(adapters="attention")
    convert_checkpoint(old.write(tmp_path / "old", state), tmp_path / "new")
    model = load(tmp_path / "new").dequantize()
    tuned = PeftModel.from_pretrained(model, tmp_path / "new" / "adapter")
    config = tuned.peft_config["default"]
    assert set(config.target_modules) == {"k_proj", "v_proj", "q_proj", "out_proj"}
    assert (config.r, config.lora_alpha) == (old.RANK, old.RANK)
    assert relative(logits(tuned), old.old_logits(state)) < old.CLOSE
    merged = tuned.merge_and_unload()
    assert relative(logits(merged), old.old_logits(state)) < old.CLOSE


def test_adapters_of_some_modules_and_several_ranks(tmp_path):
    state = old.state_dict(adapters="hivemind")
    for name in [n for n in state if ".adapter." in n and ".h.0.mlp" in n]:
        del state[name]
    state["lm_head.adapter.0.weight"] = torch.randn(5, 48) * 0.1
    state["lm_head.adapter.1.weight"] = torch.randn(130, 5) * 0.1
    convert_checkpoint(old.write(tmp_path / "old", state), tmp_path / "new")
    tuned = PeftModel.from_pretrained(load(tmp_path / "new"), tmp_path / "new" / "adapter")
    expected = old.old_logits(state)
    assert relative(logits(tuned), expected) < old.CLOSE
    assert relative(logits(gptj_q8.from_pretrained(tmp_path / "old")), expected) < old.CLOSE


def test_conversion_to_another_dtype(tmp_path):
    state = old.state_dict(adapters="hivemind")
    convert_checkpoint(old.write(tmp_path / "old", state), tmp_path / "new", dtype=torch.bfloat16)
    model = load(tmp_path / "new")
    assert model.dtype == model.lm_head.bias.dtype == torch.bfloat16
    old.assert_same_weights(load(tmp_path / "new", dtype=torch.float32), state)


def test_overwriting_and_progress(tmp_path):
    old.write(tmp_path / "old", old.state_dict(adapters="dropout"))
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        convert_checkpoint(
            tmp_path / "old",
            tmp_path / "new",
            overwrite=True,
            on_progress=lambda *step: seen.append(step),
        )
    assert seen[-1][0] == seen[-1][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.parametrize("kind", ["none", "attention"])
def test_adapters_of_an_earlier_conversion_go_with_its_model(tmp_path, kind):
    old.write(tmp_path / "old", old.state_dict(adapters="hivemind"))
    convert_checkpoint(tmp_path / "old", tmp_path / "new")
    before = contents(tmp_path / "new" / "adapter")
    (tmp_path / "new" / "notes.txt").write_text("mine")
    other = old.state_dict(adapters=kind)
    old.write(tmp_path / "other", other)
    convert_checkpoint(tmp_path / "other", tmp_path / "new", overwrite=True)
    after = contents(tmp_path / "new")
    assert after.pop("notes.txt") == b"mine"
    if kind == "none":
        assert not any(name.startswith("adapter") for name in after)
    else:
        assert contents(tmp_path / "new" / "adapter") != before
        tuned = PeftModel.from_pretrained(load(tmp_path / "new"), tmp_path / "new" / "adapter")
        assert relative(logits(tuned), old.old_logits(other)) < old.CLOSE


def test_trained_adapters_outlive_an_overwritten_model(tmp_path):
    """Where they are in the way, it is refused; else they stay."""
    old.write(tmp_path / "old", old.state_dict(adapters="hivemind"))
    old.write(tmp_path / "bare", old.state_dict())
    convert_checkpoint(tmp_path / "old", tmp_path / "new")
    place = tmp_path / "new" / "adapter"
    tuned = PeftModel.from_pretrained(load(tmp_path / "new"), place, is_trainable=True)
    tuned.save_pretrained(place)
    before = contents(tmp_path / "new")
    with pytest.raises(FileExistsError, match=r"new/adapter was not written by a conversion"):
        convert_checkpoint(tmp_path / "old", tmp_path / "new", overwrite=True)
    assert contents(tmp_path / "new") == before
    convert_checkpoint(tmp_path / "bare", tmp_path / "new", overwrite=True)
    assert contents(place) == {
        name.removeprefix("adapter/"): data
        for name, data in before.items()
        if name.startswith("adapter/")
    }


@pytest.mark.parametrize("kind", ["none", "hivemind"])
def test_command_line(tmp_path, kind):
    model = float32(save_byte_gptj(tmp_path / "old", seed=0))
    (tmp_path / "old" / "model.safetensors").unlink()
    state = old.state_dict(adapters=kind, model=model)
    old.write(tmp_path / "old", state, model=model)
    result = run("convert", tmp_path / "old", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "Its 8-bit weights were kept." in result.stdout
    adapter = tmp_path / "new" / "adapter"
    assert ("--adapter" in result.stdout) == adapter.exists()
    assert adapter.exists() == (kind != "none")
    again = run("convert", tmp_path / "old", tmp_path / "new", "--json", "--overwrite")
    assert {"block_size": 4096, "codebook": "dynamic"}.items() <= read_json(again).items()
    refused = run("convert", tmp_path / "old", tmp_path / "x", "--block-size", "64")
    assert (refused.exit_code, "is in 8 bits already" in refused.stderr) == (1, True)
    ask = ("En el", "--max-new-tokens", 8, "--greedy", "--json")
    texts = [read_json(run("generate", tmp_path / n, *ask))["text"] for n in ("old", "new")]
    assert (texts[0] == texts[1]) == (kind == "none")
    if kind != "none":
        tuned = run("generate", tmp_path / "new", *ask, "--adapter", adapter)
        assert read_json(tuned)["text"] == texts[0]
        # On top of those within, others would mix with them.
        data = tmp_path / "data.txt"
        data.write_text("En el principio\n" * 99)
        for refused in (
            run("generate", tmp_path / "old", *ask, "--adapter", adapter),
            run("finetune", tmp_path / "old", "--data", data, "--output", tmp_path / "x"),
        ):
            assert refused.exit_code == 1
            assert "old has adapters already" in " ".join(refused.stderr.split())


@pytest.mark.slow
def test_memory_of_a_full_size_checkpoint(tmp_path):
    """5.75 GiB, written, loaded both ways and converted: a minute and 12.4 GB of disk."""
    bench = pytest.importorskip("benchmarks.bench_old_checkpoint", reason="needs the repository")
    size = bench.write_apart(tmp_path / "old", layers=28)
    assert size > 5.75 * 2**30
    for name, watched in bench.measure(tmp_path / "old", tmp_path / "new").items():
        assert watched.peak < 7e9, name
    shutil.rmtree(tmp_path)
