"""Checkpoints of the hivemind family, loaded and converted, against what the old code computes."""

from __future__ import annotations

import json

import hivemind_layout as old
import pytest
import torch
from families import family, make
from safetensors.torch import load_file
from tiny import IDS, load, logits, relative
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import gptj_q8
from gptj_q8.checkpoint import convert_checkpoint
from gptj_q8.config import Q8Config
from gptj_q8.hf import layers
from gptj_q8.hivemind import GPTJForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("scales", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", old.FORMS)
def test_loading(tmp_path, form, scales):
    state = old.state_dict(scales=scales)
    model = gptj_q8.from_pretrained(old.write(tmp_path, state, form))
    old.assert_same_weights(model, state)
    assert float(model.lm_head.codebook[0]) == -1
    assert relative(logits(model), old.old_logits(state)) < old.CLOSE
    assert model.dtype == torch.float32
    assert model.config.quantization_config.block_size == 4096


@pytest.mark.parametrize("read", ["load", "hivemind", "convert"])
def test_pickles_are_read_as_tensors_only_and_stay_mapped(tmp_path, monkeypatch, read):
    """A file of 6 GB must not be read into memory, nor asked to run anything."""
    calls: list[dict[str, object]] = []
    original = torch.load

    def watched(*args, **options):
        calls.append(options)
        return original(*args, **options)

    monkeypatch.setattr(torch, "load", watched)
    path = old.write(tmp_path / "old", old.state_dict(adapters="attention"))
    {
        "load": gptj_q8.from_pretrained,
        "hivemind": GPTJForCausalLM.from_pretrained,
        "convert": lambda path: convert_checkpoint(path, tmp_path / "new"),
    }[read](path)
    assert {options["weights_only"] for options in calls} == {True}
    with_data = [options for options in calls if options.get("map_location") != "meta"]
    assert with_data
    assert all(options.get("mmap") for options in with_data)


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
    old.assert_same_weights(again, state)
    assert torch.equal(logits(gptj_q8.from_pretrained(tmp_path / "new")), logits(model))
    assert "lm_head.code" not in load_file(tmp_path / "new" / "model.safetensors")


def test_other_ways_to_load(tmp_path):
    state = old.state_dict()
    old.write(tmp_path, state, "safetensors")
    by_class = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Q8Config())
    old.assert_same_weights(by_class, state)
    placed = gptj_q8.from_pretrained(tmp_path, device_map="auto")
    old.assert_same_weights(placed, state)


@pytest.mark.parametrize("form", old.FORMS[:2])
def test_disk_offload(tmp_path, form):
    state = old.state_dict(scales=torch.float16)
    model = gptj_q8.from_pretrained(
        old.write(tmp_path / "old", state, form),
        device_map={"transformer": "cpu", "lm_head": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert model.lm_head.codes.is_meta
    assert relative(logits(model), old.old_logits(state)) < old.CLOSE


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
        old.assert_same_weights(model, state)
    for name, layer in layers(model):
        parts = (state[f"{name}.{part}"] for part in ("weight", "absmax", "code"))
        assert torch.equal(layer.dequantize(), old.decode(*parts)), name
        assert torch.equal(layer.codebook, table.sort().values)
    assert relative(logits(model), old.old_logits(state)) < old.CLOSE


# Other models and places


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
        assert relative(logits(model), old.old_logits(state)) < old.CLOSE


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
        assert relative(logits(each), expected) < old.CLOSE
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
            assert relative(each(IDS, decoder_input_ids=IDS).logits, expected) < old.CLOSE


def test_float_checkpoints_are_none_of_these(float_dir, stored_dir):
    assert gptj_q8.from_pretrained(float_dir).lm_head.block_size == 256
    assert gptj_q8.from_pretrained(stored_dir).lm_head.block_size == 256
