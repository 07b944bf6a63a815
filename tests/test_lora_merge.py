"""Merging: gptj_q8.merge from folder to folder, and PEFT's methods in memory."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import EXACT, attach, lora
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import QUICK, contents, gpt2, load, logits, relative
from torch import nn
from transformers import GPTJForCausalLM

import gptj_q8
from gptj_q8.nn import Q8Embedding, Q8Linear


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    torch.manual_seed(0)


def make_adapter(model_dir: Path, folder: Path, **options: Any) -> Path:
    """An adapter on everything that has moved far; norms and biases too."""
    model = gptj_q8.add_lora(
        load(model_dir, dtype=torch.float32), r=4, targets=["all", "lm_head", "wte"], **options
    )
    gptj_q8.prepare_for_finetuning(model, train_1d=True, verbose=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(stored_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    load(stored_dir).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def adapted(base: Path, adapter: Path) -> nn.Module:
    """The model with its adapter attached, in float32: what merging must give."""
    return PeftModel.from_pretrained(load(base, dtype=torch.float32), adapter)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
    ids=str,
)
def test_a_float_model_holds_the_merged_weights(
    dtype: torch.dtype, bound: float, options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    gptj_q8.merge(base, adapter, tmp_path / "out", dtype=dtype, max_shard_size="30KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    merged = load(tmp_path / "out")
    assert merged.dtype == dtype
    assert type(merged.lm_head) is nn.Linear
    right = logits(adapted(base, adapter))
    assert relative(logits(load(base)), right) > 0.1
    assert relative(logits(merged), right) < bound


def test_an_8_bit_model_stays_one(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    gptj_q8.merge(base, adapter, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert isinstance(merged.lm_head, Q8Linear)
    assert relative(logits(merged), logits(adapted(base, adapter))) < 0.03


def test_a_float_model_takes_the_adapter_too(float_dir: Path, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    gptj_q8.merge(float_dir, adapter, tmp_path / "out", dtype=torch.float32)
    right = logits(adapted(float_dir, adapter))
    assert relative(logits(load(tmp_path / "out")), right) < 2e-3  # the source is float16
    gptj_q8.merge(float_dir, adapter, tmp_path / "eight")
    merged = load(tmp_path / "eight")
    assert isinstance(merged.lm_head, Q8Linear)
    assert relative(logits(merged), right) < 0.03


def test_tied_embeddings_and_conv1d_merge(tmp_path: Path) -> None:
    model = gptj_q8.quantize_(gpt2())
    model.save_pretrained(tmp_path / "base")
    tuned = gptj_q8.add_lora(load(tmp_path / "base"), r=4, targets=["c_attn", "c_fc"])
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "adapter")
    right = logits(tuned.eval())
    assert relative(logits(load(tmp_path / "base")), right) > 0.05
    gptj_q8.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "float", dtype=torch.float32)
    assert relative(logits(load(tmp_path / "float")), right) < 1e-6
    stored = load_file(tmp_path / "float" / "model.safetensors")
    assert stored.keys() == gpt2().state_dict().keys() - {"lm_head.weight"}, "written once"
    gptj_q8.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "eight")
    assert relative(logits(load(tmp_path / "eight")), right) < 0.05


def change(adapter: Path, how: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path)


NAME = "base_model.model.transformer.h.0.mlp.fc_in.lora_B.weight"
DAMAGE = {
    "missing": (lambda t: t.pop(NAME), "lacks 1 tensors, such as .*fc_in.lora_B"),
    "surplus": (lambda t: t.update({NAME + "x": torch.ones(1)}), "no place for"),
    "shape": (lambda t: t.update({NAME: torch.ones(3, 4)}), "does not fit the model"),
    "nan": (lambda t: t[NAME].fill_(torch.nan), r"h\.0\.mlp\.fc_in.lora_B.default.weight has NaN"),
}


@pytest.mark.parametrize(("how", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_adapter_is_refused_and_nothing_written(
    how: Any, message: str, base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    change(adapter, how)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        gptj_q8.merge(base, adapter, tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_the_old_model(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    gptj_q8.merge(base, adapter, tmp_path / "out", dtype=torch.float16)
    before = contents(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gptj_q8.checkpoint.shards.Writer.write", full)
    with pytest.raises(OSError, match="No space left"):
        gptj_q8.merge(base, adapter, tmp_path / "out", dtype=torch.float16, overwrite=True)
    assert contents(tmp_path) == before


def test_overwriting_keeps_a_persons_card_and_no_untrue_one(base: Path, tmp_path: Path) -> None:
    adapter, out = make_adapter(base, tmp_path / "adapter"), tmp_path / "out"
    gptj_q8.merge(base, adapter, out)
    assert "codebook `fitted`" in (out / "README.md").read_text()
    gptj_q8.merge(base, adapter, out, dtype=torch.float16, overwrite=True)
    assert not (out / "README.md").exists(), "it told of 8 bits"
    (out / "README.md").write_text("mine")
    for dtype in (torch.float16, None):
        gptj_q8.merge(base, adapter, out, dtype=dtype, overwrite=True)
        assert (out / "README.md").read_text() == "mine"


def test_config_tells_the_codebook_of_what_was_merged(float_dir: Path, tmp_path: Path) -> None:
    gptj_q8.convert_checkpoint(float_dir, tmp_path / "base", gptj_q8.Q8Config(codebook="dynamic"))
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter")
    gptj_q8.merge(tmp_path / "base", adapter, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["codebook"] == "fitted"


def test_the_place_must_be_free(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    before = contents(tmp_path)
    for place in (base, adapter):
        with pytest.raises(FileExistsError, match="is what is to be merged"):
            gptj_q8.merge(base, adapter, place, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="not empty"):
        gptj_q8.merge(base, adapter, tmp_path / "other")
    assert contents(tmp_path) == before
    with pytest.raises(TypeError, match="dtype"):
        gptj_q8.merge(base, adapter, tmp_path / "out", dtype=torch.int8)


# In memory, by PEFT's methods.


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merging_is_right_within_one_rounding_and_unmerging_exact(
    options: dict[str, Any], eight_bit_gptj: GPTJForCausalLM, decoded_gptj: GPTJForCausalLM
) -> None:
    a, b = attach(eight_bit_gptj, lora(**options)), attach(decoded_gptj, lora(**options))
    before, codes = logits(a), {n: t.clone() for n, t in a.state_dict().items()}
    a.merge_adapter(safe_merge=True)
    b.merge_adapter()
    layers = dict(b.named_modules())
    for name, layer in a.named_modules():
        if isinstance(layer, Q8Linear | Q8Embedding):
            assert 0 < relative(layer.dequantize(), layers[name].weight) < 7e-3, name
    assert relative(logits(a), before) < 0.05
    a.unmerge_adapter()
    assert torch.equal(logits(a), before)
    assert all(torch.equal(codes[name], tensor) for name, tensor in a.state_dict().items())


def test_merge_and_unload_gives_an_8_bit_model_that_saves(
    eight_bit_gptj: GPTJForCausalLM, tmp_path: Path
) -> None:
    a = attach(eight_bit_gptj, lora())
    before = logits(a)
    merged = a.merge_and_unload()
    assert isinstance(merged.lm_head, Q8Linear)
    assert relative(logits(merged), before) < 0.05
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(merged))


def test_dequantized_under_its_adapters_it_merges_exactly(eight_bit_gptj: GPTJForCausalLM) -> None:
    for options in ({}, {"use_dora": True}):
        a = attach(eight_bit_gptj, lora(**options))
        before = logits(a)
        gptj_q8.dequantize_(a.get_base_model())
        assert relative(logits(a), before) < EXACT
        if not options:
            assert relative(logits(a.merge_and_unload()), before) < EXACT


def test_unmerging_what_was_dequantized_since_is_refused(eight_bit_gptj: GPTJForCausalLM) -> None:
    a = attach(eight_bit_gptj, lora())
    a.merge_adapter()
    gptj_q8.dequantize_(a.get_base_model())
    merged = logits(a)
    with pytest.raises(RuntimeError, match="default were merged into 8 bits and the model deq"):
        a.unmerge_adapter()
    assert torch.equal(logits(a), merged)


def test_merging_nan_or_tied_layers_is_refused_and_changes_nothing(
    eight_bit_gptj: GPTJForCausalLM,
) -> None:
    a = attach(eight_bit_gptj, lora())
    state = {name: tensor.clone() for name, tensor in a.state_dict().items()}
    layer = a.base_model.model.transformer.h[1].mlp.fc_in
    layer.lora_B["default"].weight.data[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.fc_in\.lora_B\.default\.weight has NaN"):
        a.merge_adapter()
    for name, tensor in a.state_dict().items():
        assert "fc_in.lora_B" in name or torch.equal(state[name], tensor)

    tied = get_peft_model(gptj_q8.quantize_(gpt2(), QUICK), lora(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="share their codes"):
        tied.merge_and_unload()
    # Where only other layers have adapters, tied embeddings are in no one's way.
    other = attach(gptj_q8.quantize_(gpt2(), QUICK), lora(target_modules=["c_attn"]))
    before = logits(other)
    assert relative(logits(other.merge_and_unload()), before) < 0.05
