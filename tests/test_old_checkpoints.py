"""Checkpoints of the hivemind family, loaded and converted, against what the old code computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hivemind_layout as old
import pytest
import torch
from command_line import float32, read_json, run, save_byte_gptj
from families import family, make
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import IDS, contents, load, logits, relative
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import gptj_q8
from gptj_q8.checkpoint import convert_checkpoint
from gptj_q8.config import Q8Config
from gptj_q8.hf import layers
from gptj_q8.hivemind import GPTJForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")

# float32 against float64; the old code was in float32 too.
CLOSE = 1e-6
FORMS = ("bin", "safetensors", "bin-shards", "safetensors-shards")


def assert_same_weights(model, state) -> None:
    """Every 8-bit layer has the codes, scales and table that are stored, and decodes to them."""
    stored = {name.removesuffix(".code") for name in state if name.endswith(".code")}
    found = dict(layers(model))
    assert {name.removesuffix(".base_layer") for name in found} == stored
    for name, layer in found.items():
        weight, absmax, code = (
            state[f"{name.removesuffix('.base_layer')}.{part}"]
            for part in ("weight", "absmax", "code")
        )
        assert layer.block_size == 4096
        assert torch.equal(layer.codes, weight), name
        assert torch.equal(layer.absmax, absmax.float()), name
        assert torch.equal(layer.codebook, code.float()), name
        assert torch.equal(layer.dequantize(), old.decode(weight, absmax, code)), name


@pytest.mark.parametrize("scales", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_loading(tmp_path, form, scales):
    state = old.state_dict(scales=scales)
    model = gptj_q8.from_pretrained(old.write(tmp_path, state, form))
    assert_same_weights(model, state)
    assert float(model.lm_head.codebook[0]) == -1
    assert relative(logits(model), old.old_logits(state)) < CLOSE
    assert model.dtype == torch.float32
    assert model.config.quantization_config.block_size == 4096


@pytest.mark.parametrize("kind", old.ADAPTERS[1:])
@pytest.mark.parametrize("form", FORMS[:2])
def test_loading_with_adapters(tmp_path, form, kind):
    state = old.state_dict(adapters=kind)
    model = gptj_q8.from_pretrained(old.write(tmp_path, state, form))
    assert_same_weights(model, state)
    expected = old.old_logits(state)
    assert relative(logits(model), expected) < CLOSE
    assert relative(old.old_logits(old.state_dict()), expected) > 0.01  # adapters matter


def test_nothing_is_told_missing_or_left(tmp_path):
    """Masks and adapters are known, and no weight is drawn at random."""
    old.write(tmp_path, old.state_dict(adapters="hivemind"))
    gptj_q8_model, info = gptj_q8.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert gptj_q8_model.is_quantized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtype(tmp_path, dtype):
    state = old.state_dict()
    model = gptj_q8.from_pretrained(old.write(tmp_path, state), dtype=dtype)
    assert model.dtype == dtype
    assert {layer.absmax.dtype for _, layer in layers(model)} == {torch.float32}
    assert relative(logits(model), old.old_logits(state)) < 0.02


def test_dtype_of_the_floats_where_config_says_nothing(tmp_path):
    state = old.state_dict(floats=torch.float16, scales=torch.float16)
    old.write(tmp_path / "old", state)
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    del config["torch_dtype"]
    path.write_text(json.dumps(config))
    convert_checkpoint(tmp_path / "old", tmp_path / "new")
    assert load(tmp_path / "new").dtype == torch.float16
    assert gptj_q8.from_pretrained(tmp_path / "old").dtype == torch.float16


def test_saving_what_was_loaded(tmp_path):
    state = old.state_dict()
    model = gptj_q8.from_pretrained(old.write(tmp_path / "old", state))
    model.save_pretrained(tmp_path / "new")
    again = load(tmp_path / "new")
    assert_same_weights(again, state)
    assert torch.equal(logits(gptj_q8.from_pretrained(tmp_path / "new")), logits(model))
    assert "lm_head.code" not in load_file(tmp_path / "new" / "model.safetensors")


def saved_with_adapters(tmp_path, change: float) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model that came with adapters, trained on and saved; and what the old code would hold."""
    state = old.state_dict(adapters="hivemind")
    model = gptj_q8.from_pretrained(old.write(tmp_path / "old", state))
    with torch.no_grad():
        model.get_submodule("transformer.h.0.attn.q_proj").lora_B["default"].weight += change
    model.save_pretrained(tmp_path / "tuned")
    name = "transformer.h.0.attn.q_proj.adapter.1.weight"
    return tmp_path / "tuned", {**state, name: state[name] + change}


def test_saving_adapters_that_came_along(tmp_path):
    """They alone are written, and loading them brings the model back, trained as they are."""
    tuned, state = saved_with_adapters(tmp_path, change=0.1)
    written = load_file(tuned / "adapter_model.safetensors")
    assert not any(tensor.dtype == torch.uint8 for tensor in written.values())
    expected = old.old_logits(state)
    before = gptj_q8.from_pretrained(tmp_path / "old")
    assert relative(logits(before), expected) > 0.001
    again, info = gptj_q8.from_pretrained(tuned, output_loading_info=True)
    assert not any(info.values()), info
    assert relative(logits(again), expected) < CLOSE
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert len(trainable) == 28
    assert all(".lora_" in name for name in trainable)


def test_new_adapters_do_not_mix_with_those_that_came_along(tmp_path):
    """PEFT would have overwritten some and kept the others."""
    state = old.state_dict(adapters="hivemind")
    model = gptj_q8.from_pretrained(old.write(tmp_path, state))
    own = model.peft_config["default"]
    for add in (lambda: get_peft_model(model, lora()), lambda: gptj_q8.add_lora(model)):
        with pytest.raises(ValueError, match="loaded with an adapter named 'default'"):
            add()
    assert model.peft_config == {"default": own}
    assert relative(logits(model), old.old_logits(state)) < CLOSE
    both = get_peft_model(model, lora(), adapter_name="new")
    bare = old.old_logits(old.state_dict())
    assert relative(logits(both), bare) < CLOSE  # the new one is active, and changes nothing yet
    both.base_model.set_adapter(["default", "new"])
    assert relative(logits(both), old.old_logits(state)) < CLOSE


def test_new_adapters_in_the_place_of_those_that_came_along(tmp_path):
    model = gptj_q8.from_pretrained(old.write(tmp_path, old.state_dict(adapters="hivemind")))
    model.delete_adapter("default")
    tuned = get_peft_model(model, lora())
    assert relative(logits(tuned), old.old_logits(old.state_dict())) < CLOSE


def lora():
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def test_an_adapter_that_does_not_name_its_model(tmp_path):
    tuned, _ = saved_with_adapters(tmp_path, change=0.1)
    config = json.loads((tuned / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (tuned / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"adapter_config\.json: does not say which model"):
        gptj_q8.from_pretrained(tuned)


def test_other_ways_to_load(tmp_path):
    state = old.state_dict()
    old.write(tmp_path, state, "safetensors")
    by_class = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Q8Config())
    assert_same_weights(by_class, state)
    placed = gptj_q8.from_pretrained(tmp_path, device_map="auto")
    assert_same_weights(placed, state)


@pytest.mark.parametrize("form", FORMS[:2])
def test_disk_offload(tmp_path, form):
    state = old.state_dict(scales=torch.float16)
    model = gptj_q8.from_pretrained(
        old.write(tmp_path / "old", state, form),
        device_map={"transformer": "cpu", "lm_head": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert model.lm_head.codes.is_meta
    assert relative(logits(model), old.old_logits(state)) < CLOSE


def test_adapters_of_layers_on_the_disk_are_refused(tmp_path):
    """Transformers would not find the layer's data under its name in PEFT: inf came out."""
    options = {
        "device_map": {"transformer": "cpu", "lm_head": "disk"},
        "offload_folder": tmp_path / "offload",
    }
    old.write(tmp_path / "old", old.state_dict(adapters="hivemind"))
    message = r"pytorch_model\.bin: lm_head\.adapter\.0\.weight is an adapter .*gptj-q8 convert"
    with pytest.raises(ValueError, match=message):
        gptj_q8.from_pretrained(tmp_path / "old", **options)
    state = old.state_dict(adapters="attention")  # none on what is offloaded
    model = gptj_q8.from_pretrained(old.write(tmp_path / "few", state), **options)
    assert relative(logits(model), old.old_logits(state)) < CLOSE


# Tables that our own format would not have


def unusual_tables() -> dict[str, torch.Tensor]:
    table = old.dynamic_map()
    shuffled = table[torch.randperm(256, generator=torch.Generator().manual_seed(3))]
    return {
        "unsorted": shuffled,
        "no zero": torch.linspace(-1, 1, 256),
        "repeated": table.clamp(min=-0.5),
    }


@pytest.mark.parametrize("which", ["unsorted", "no zero", "repeated"])
@pytest.mark.parametrize("convert", [False, True])
def test_unusual_tables_decode_to_the_same_bits(tmp_path, which, convert):
    """What is not sorted gets sorted, codes and all; a 0 is needed to encode only."""
    table = unusual_tables()[which]
    state = old.state_dict(table)
    old.write(tmp_path / "old", state)
    model = gptj_q8.from_pretrained(tmp_path / "old")
    if convert:
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
        model = load(tmp_path / "new")
    if which != "unsorted":
        assert_same_weights(model, state)
    for name, layer in layers(model):
        parts = (state[f"{name}.{part}"] for part in ("weight", "absmax", "code"))
        assert torch.equal(layer.dequantize(), old.decode(*parts)), name
        assert torch.equal(layer.codebook, table.sort().values)
    assert relative(logits(model), old.old_logits(state)) < CLOSE


# Conversion


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", old.ADAPTERS)
def test_conversion(tmp_path, form, kind):
    state = old.state_dict(adapters=kind)
    old.write(tmp_path / "old", state, form)
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    report = convert_checkpoint(tmp_path / "old", tmp_path / "new", max_shard_size="60KB")
    base = load(tmp_path / "new")
    assert_same_weights(base, state)
    assert relative(logits(base), old.old_logits(old.state_dict())) < CLOSE
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
        assert relative(logits(tuned), old.old_logits(state)) < CLOSE


def test_adapters_go_to_any_model_of_the_kind(tmp_path):
    """They are plain PEFT: a scaling of 1, by short names, on a float model too."""
    state = old.state_dict(adapters="attention")
    convert_checkpoint(old.write(tmp_path / "old", state), tmp_path / "new")
    model = load(tmp_path / "new").dequantize()
    tuned = PeftModel.from_pretrained(model, tmp_path / "new" / "adapter")
    config = tuned.peft_config["default"]
    assert set(config.target_modules) == {"k_proj", "v_proj", "q_proj", "out_proj"}
    assert (config.r, config.lora_alpha) == (old.RANK, old.RANK)
    assert relative(logits(tuned), old.old_logits(state)) < CLOSE
    merged = tuned.merge_and_unload()
    assert relative(logits(merged), old.old_logits(state)) < CLOSE


def test_adapters_of_some_modules_and_several_ranks(tmp_path):
    state = old.state_dict(adapters="hivemind")
    for name in [n for n in state if ".adapter." in n and ".h.0.mlp" in n]:
        del state[name]
    state["lm_head.adapter.0.weight"] = torch.randn(5, 48) * 0.1
    state["lm_head.adapter.1.weight"] = torch.randn(130, 5) * 0.1
    convert_checkpoint(old.write(tmp_path / "old", state), tmp_path / "new")
    tuned = PeftModel.from_pretrained(load(tmp_path / "new"), tmp_path / "new" / "adapter")
    expected = old.old_logits(state)
    assert relative(logits(tuned), expected) < CLOSE
    assert relative(logits(gptj_q8.from_pretrained(tmp_path / "old")), expected) < CLOSE


def test_conversion_to_another_dtype(tmp_path):
    state = old.state_dict(adapters="hivemind")
    convert_checkpoint(old.write(tmp_path / "old", state), tmp_path / "new", dtype=torch.bfloat16)
    model = load(tmp_path / "new")
    assert model.dtype == model.lm_head.bias.dtype == torch.bfloat16
    assert_same_weights(load(tmp_path / "new", dtype=torch.float32), state)


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
        assert relative(logits(tuned), old.old_logits(other)) < CLOSE


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


def test_a_head_of_another_kind(tmp_path):
    """The body of the model is there, the new head is reported as for any checkpoint."""
    from transformers import GPTJForSequenceClassification

    old.write(tmp_path, old.state_dict())
    model, info = GPTJForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=Q8Config(), output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}
    assert type(model.score) is torch.nn.Linear


def test_hub_id(tmp_path):
    """Known by its tensors from the Hub's cache as well, where files are links."""
    state = old.state_dict(adapters="attention")
    old.write(tmp_path / "blobs", state, "bin-shards")
    repository = tmp_path / "models--someone--gpt-j-6B-8bit"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for path in (tmp_path / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    for read in (gptj_q8.from_pretrained, GPTJForCausalLM.from_pretrained):
        model = read("someone/gpt-j-6B-8bit", **options)
        assert relative(logits(model), old.old_logits(state)) < CLOSE


@pytest.mark.parametrize(
    ("name", "leftover"),
    [("gpt_neo", "transformer.h.1.attn.attention.bias"), ("bloom", None)],
)
def test_other_families(tmp_path, name, leftover):
    """They were offered so as well; their tied matrices were stored twice."""
    model = family(name)
    state = old.state_dict(model=model)
    assert "lm_head.weight" in state
    assert leftover is None or leftover in state
    old.write(tmp_path / "old", state, model=model)
    with torch.no_grad():
        expected = old.old_model(state, model)(IDS).logits
    loaded = gptj_q8.from_pretrained(tmp_path / "old")
    loaded.save_pretrained(tmp_path / "saved")
    convert_checkpoint(tmp_path / "old", tmp_path / "new")
    for each in (loaded, load(tmp_path / "saved"), load(tmp_path / "new")):
        assert relative(logits(each), expected) < CLOSE
        assert each.lm_head.codes is each.get_input_embeddings().codes


def test_an_encoder_with_a_decoder(tmp_path):
    """As T0-3B-8bit is; through Transformers' class for such models."""
    options = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    tokens = {"vocab_size": 130, "decoder_start_token_id": 0}
    model = make("T5ForConditionalGeneration", "T5Config", {**options, **tokens})
    state = old.state_dict(model=model)
    old.write(tmp_path / "old", state, model=model)
    with torch.no_grad():
        expected = old.old_model(state, model)(IDS, decoder_input_ids=IDS).logits
    convert_checkpoint(tmp_path / "old", tmp_path / "new")
    for path, config in (
        (tmp_path / "old", {"quantization_config": Q8Config()}),
        (tmp_path / "new", {}),
    ):
        each = AutoModelForSeq2SeqLM.from_pretrained(path, **config)
        with torch.no_grad():
            assert relative(each(IDS, decoder_input_ids=IDS).logits, expected) < CLOSE


def test_float_checkpoints_are_none_of_these(float_dir, stored_dir):
    assert gptj_q8.from_pretrained(float_dir).lm_head.block_size == 256
    assert gptj_q8.from_pretrained(stored_dir).lm_head.block_size == 256


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
