"""Loading, saving and dequantizing through Transformers."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import contents, gpt2, gptj, logits, relative
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTJForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import gptj_q8
from gptj_q8.config import Q8Config
from gptj_q8.hf import Q8HfQuantizer, layers
from gptj_q8.nn import Q8Embedding, Q8Linear

QUICK = Q8Config(codebook="dynamic")  # where the codebook does not matter


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-J in float16, in several shards."""
    path = tmp_path_factory.mktemp("float")
    gptj().half().save_pretrained(path, max_shard_size="50KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture(scope="module")
def stored_dir(float_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in 8 bits, in several shards."""
    path = tmp_path_factory.mktemp("stored")
    load(float_dir, quantization_config=Q8Config()).save_pretrained(path, max_shard_size="30KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def one_file(float_dir: Path, tmp_path: Path) -> Path:
    """The same in 8 bits in one file, to be damaged."""
    load(float_dir, quantization_config=QUICK).save_pretrained(tmp_path / "stored")
    return tmp_path / "stored"


def load(path: Path, **kwargs):
    """from_pretrained that loads everything that it should."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def change_tensors(directory: Path, change) -> None:
    """Rewrite the only weight file, its tensors changed by `change`."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt", "format_version": "1"})


def change_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# Loading a float checkpoint


@pytest.mark.parametrize("dtype", ["auto", torch.float16, torch.bfloat16, torch.float32])
def test_loading_equals_quantize_(float_dir, dtype):
    """Whatever dtype the model has, its codes come from the weights as they are stored."""
    model = load(float_dir, quantization_config=Q8Config(), dtype=dtype)
    expected = gptj_q8.quantize_(GPTJForCausalLM.from_pretrained(float_dir, dtype=torch.float16))
    wanted = torch.float16 if dtype == "auto" else dtype
    pairs = list(zip(layers(model), layers(expected), strict=True))
    assert len(pairs) == 14
    for (name, layer), (other_name, other) in pairs:
        assert name == other_name
        for part in ("codes", "absmax", "codebook"):
            assert torch.equal(getattr(layer, part), getattr(other, part)), f"{name}.{part}"
        assert layer.dtype == wanted
    assert {p.dtype for p in model.parameters()} == {torch.uint8, wanted}
    assert model.dtype == wanted
    assert not model.lm_head.codes.requires_grad
    assert model.lm_head.bias.requires_grad
    assert {b.dtype for _, layer in layers(model) for b in layer.buffers()} == {torch.float32}


def test_loading_is_close_to_the_original(float_dir):
    expected = logits(GPTJForCausalLM.from_pretrained(float_dir, dtype=torch.float32))
    model = load(float_dir, quantization_config=Q8Config(), dtype=torch.float32)
    assert relative(logits(model), expected) < 0.02
    assert isinstance(model.lm_head, Q8Linear)
    assert isinstance(model.transformer.wte, Q8Embedding)
    assert not model.training


def test_gptj_q8_from_pretrained(float_dir, stored_dir):
    expected = logits(load(float_dir, quantization_config=Q8Config()))
    assert torch.equal(logits(gptj_q8.from_pretrained(float_dir)), expected)
    assert torch.equal(logits(gptj_q8.from_pretrained(str(stored_dir))), expected)
    coarse = gptj_q8.from_pretrained(
        float_dir, quantization_config=Q8Config(block_size=4096), dtype=torch.float32
    )
    assert coarse.lm_head.block_size == 4096
    assert coarse.dtype == torch.float32


@pytest.mark.parametrize("present", [None, {"quant_method": "gptq", "bits": 4}])
def test_quantization_config_of_others(float_dir, tmp_path, present):
    for name, data in contents(float_dir).items():
        (tmp_path / name).write_bytes(data)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": present}))
    if present is None:
        assert isinstance(gptj_q8.from_pretrained(tmp_path).lm_head, Q8Linear)
    else:
        with pytest.raises(ValueError, match=r"is quantized already \(gptq\)"):
            gptj_q8.from_pretrained(tmp_path)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(float_dir, stored_dir, device_map):
    model = load(float_dir, quantization_config=QUICK, device_map=device_map)
    again = load(stored_dir, device_map=device_map)
    assert {p.device.type for p in (*model.parameters(), *again.parameters())} == {"cpu"}
    assert relative(logits(model), logits(again)) < 0.03


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("kind", ["float", "stored"])
def test_disk_offload(float_dir, stored_dir, tmp_path, kind, offload_buffers):
    kept = [f"transformer.{name}" for name in ("wte", "drop", "h.0", "ln_f")]
    device_map = {**dict.fromkeys(kept, "cpu"), "transformer.h.1": "disk", "lm_head": "disk"}
    model = load(
        float_dir if kind == "float" else stored_dir,
        device_map=device_map,
        offload_folder=tmp_path,
        offload_buffers=offload_buffers,
        **({"quantization_config": Q8Config()} if kind == "float" else {}),
    )
    assert model.lm_head.codes.is_meta
    assert torch.equal(logits(model), logits(load(stored_dir)))


def test_what_transformers_reserves_on_a_gpu(float_dir):
    quantizer = Q8HfQuantizer(Q8Config(), pre_quantized=False)
    with torch.device("meta"):
        model = gptj().half()
    quantizer.preprocess_model(model, dtype=torch.float16, checkpoint_files=None)
    sizes = {n: quantizer.param_element_size(model, n, p) for n, p in model.named_parameters()}
    assert sizes["lm_head.weight"] == sizes["transformer.wte.weight"] == 1 + 4 / 256
    assert sizes["lm_head.bias"] == sizes["transformer.ln_f.weight"] == 2


def test_exemptions_hold_while_loading_and_after_saving(float_dir, tmp_path):
    config = Q8Config(codebook="dynamic", modules_to_not_convert=["lm_head", "h.0.attn"])
    model = load(float_dir, quantization_config=config)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    for each in (model, again):
        assert type(each.lm_head) is nn.Linear
        assert type(each.transformer.h[0].attn.q_proj) is nn.Linear
        assert isinstance(each.transformer.h[1].attn.q_proj, Q8Linear)
    assert torch.equal(logits(again), logits(model))


def test_pickled_checkpoint(float_dir, tmp_path):
    model = GPTJForCausalLM.from_pretrained(float_dir)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    expected = load(float_dir, quantization_config=QUICK)
    assert torch.equal(logits(load(tmp_path, quantization_config=QUICK)), logits(expected))


def test_bad_weights_are_all_named_while_loading(tmp_path):
    model = gptj()
    with torch.no_grad():
        model.lm_head.weight[0, :5] = float("nan")
        model.transformer.h[1].mlp.fc_in.weight[3, 3] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="NaN or Inf") as caught:
        load(tmp_path, quantization_config=QUICK)
    assert "lm_head.weight has 5 NaN or Inf values" in str(caught.value)
    assert "transformer.h.1.mlp.fc_in.weight has 1 NaN or Inf values" in str(caught.value)


def test_dtype_that_no_layer_can_have(float_dir):
    with pytest.raises(TypeError, match=r"from_pretrained: .*\.weight must be .*, got float64"):
        load(float_dir, quantization_config=QUICK, dtype=torch.float64)


# Saving and loading the 8-bit model


def test_reload_is_exact(float_dir, stored_dir):
    model, again = load(float_dir, quantization_config=Q8Config()), load(stored_dir)
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(logits(again), logits(model))
    assert again.dtype == again.lm_head.dtype == torch.float16
    assert not again.lm_head.codes.requires_grad


def test_what_is_stored(stored_dir):
    config = json.loads((stored_dir / "config.json").read_text())["quantization_config"]
    assert config == {
        "block_size": 256,
        "codebook": "fitted",
        "format_version": 1,
        "modules_to_not_convert": None,
        "quant_method": "gptj_q8",
    }
    names = []
    for path in stored_dir.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "format_version": "1"}
            names += file.keys()
    assert [name for name in names if name.startswith("lm_head")]
    assert {n.rpartition(".")[2] for n in names} == {
        "codes",
        "absmax",
        "codebook",
        "bias",
        "weight",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reload_in_another_dtype(stored_dir, dtype):
    model = load(stored_dir, dtype=dtype)
    assert model.dtype == model.lm_head.dtype == model.transformer.wte.dtype == dtype
    assert model.lm_head.absmax.dtype == model.lm_head.codebook.dtype == torch.float32
    assert relative(logits(model), logits(load(stored_dir))) < 0.02


def test_model_that_initializes_the_weights_of_its_parts(tmp_path):
    """T5's modules do, and from_pretrained calls on them even where every weight was loaded."""
    config = T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4, vocab_size=130)
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "float")
    loaded = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "float", quantization_config=QUICK
    )
    loaded.save_pretrained(tmp_path / "stored")
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "stored")
    expected = gptj_q8.quantize_(model, QUICK)
    ids = torch.arange(9)[None]
    for each in (loaded, again):
        outputs = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (each, expected))
        assert torch.equal(*outputs)


def test_quantize_then_save(float_dir, stored_dir, tmp_path):
    model = GPTJForCausalLM.from_pretrained(float_dir)
    config = Q8Config()
    gptj_q8.quantize_(model, config).save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(load(stored_dir)))
    assert model.config.quantization_config is not config  # it stays the caller's own
    assert model.is_quantized


def test_save_over_the_directory_it_came_from(one_file):
    """Its tensors are pages of the very file that is written."""
    model = load(one_file)
    expected = logits(model)
    model.save_pretrained(one_file)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(load(one_file)), expected)


def test_body_of_a_stored_model(stored_dir):
    body, info = AutoModel.from_pretrained(stored_dir, output_loading_info=True)
    assert isinstance(body.wte, Q8Embedding)
    assert not info["missing_keys"]
    assert {name.partition(".")[0] for name in info["unexpected_keys"]} == {"lm_head"}
    whole = load(stored_dir).transformer
    ids = torch.arange(5)[None]
    assert torch.equal(body(ids).last_hidden_state, whole(ids).last_hidden_state)


def test_stored_body_with_a_new_head(float_dir, tmp_path):
    body = AutoModel.from_pretrained(float_dir, quantization_config=QUICK)
    body.save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight", "lm_head.bias"}
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.transformer.wte.codes, body.wte.codes)


def test_new_head_on_a_stored_model(stored_dir):
    model, info = AutoModelForSequenceClassification.from_pretrained(
        stored_dir, num_labels=3, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    assert type(model.score) is nn.Linear
    assert model.score.weight.abs().max() > 0
    assert isinstance(model.transformer.h[0].mlp.fc_in, Q8Linear)


def test_generate(stored_dir):
    model = load(stored_dir, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    tokens = model.generate(ids, **arguments)
    plain = model.dequantize()
    assert torch.equal(tokens, plain.generate(ids, **arguments))
    assert tokens.shape == (1, 11)


def test_cast_keeps_scales(stored_dir):
    model = load(stored_dir)
    before = model.lm_head.absmax.clone()
    model.to(torch.bfloat16)
    assert model.lm_head.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.absmax, before)
    assert model.lm_head.absmax.dtype == torch.float32


def test_push_to_hub(stored_dir, monkeypatch):
    """Uploads what save_pretrained writes."""
    from transformers.utils import hub

    uploaded = {}

    def create_repo(*args, **kwargs):
        return SimpleNamespace(repo_id="someone/gptj")

    def upload(self, folder, *args, **kwargs):
        uploaded.update(contents(Path(folder)))

    # 5.17 calls the function, later versions the method.
    monkeypatch.setattr(hub, "create_repo", create_repo, raising=False)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: MagicMock())
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    load(stored_dir).push_to_hub("someone/gptj")
    assert {"config.json", "model.safetensors"} <= uploaded.keys()


# Tied embeddings


def test_tied_embeddings(tmp_path):
    original = gpt2()
    original.save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", quantization_config=QUICK)
    model.save_pretrained(tmp_path / "stored")
    again = load(tmp_path / "stored")
    quantized = gptj_q8.quantize_(original, QUICK)
    for each in (model, again, quantized):
        for part in ("codes", "absmax", "codebook"):
            assert getattr(each.lm_head, part) is getattr(each.transformer.wte, part)
        assert torch.equal(logits(each), logits(model))
        each.tie_weights()
        assert torch.equal(logits(each), logits(model))
    stored = load_file(tmp_path / "stored" / "model.safetensors")
    assert not [name for name in stored if name.startswith("lm_head")]


def test_tied_embeddings_dequantized(tmp_path):
    model = gptj_q8.quantize_(gpt2(), QUICK)
    expected = logits(model)
    plain = model.dequantize()
    assert plain.lm_head.weight is plain.transformer.wte.weight
    plain.save_pretrained(tmp_path)
    assert relative(logits(load(tmp_path)), expected) < 1e-5


@pytest.mark.parametrize("differ", [False, True])
def test_tied_embeddings_stored_twice(tmp_path, differ):
    """As Transformers has it: equal weights are tied, others not, whatever config.json says."""
    model = gpt2()
    model.config.save_pretrained(tmp_path / "float")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] *= -2 if differ else 1
    save_file(state, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    expected = logits(load(tmp_path / "float"))
    model = load(tmp_path / "float", quantization_config=QUICK)
    assert (model.lm_head.codes is model.transformer.wte.codes) is not differ
    assert relative(logits(model), expected) < 0.03
    model.save_pretrained(tmp_path / "stored")
    again = load(tmp_path / "stored")
    assert torch.equal(logits(again), logits(model))


# dequantize


def test_dequantize(stored_dir, tmp_path):
    model = load(stored_dir, dtype=torch.float32)
    expected = logits(model)
    plain = model.dequantize()
    assert plain is model
    assert not list(layers(plain))
    assert type(plain.transformer.h[0].attn.q_proj) is nn.Linear
    assert relative(logits(plain), expected) < 1e-5
    assert not hasattr(plain.config, "quantization_config")
    assert plain.half().dtype == torch.float16  # Transformers refuses this of a quantized model
    plain.float().save_pretrained(tmp_path)
    again = load(tmp_path)
    for name, parameter in plain.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_dequantize_(stored_dir):
    """The function does to a Transformers model what its method does."""
    model = load(stored_dir)
    assert gptj_q8.dequantize_(model) is model
    assert not hasattr(model.config, "quantization_config")
    assert not model.is_quantized
    assert model.lm_head.weight.dtype == torch.float16


def test_dequantize_after_a_cast(stored_dir):
    plain = load(stored_dir).to(torch.bfloat16).dequantize()
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}


def test_dequantize_to_a_dtype(stored_dir):
    plain = load(stored_dir).dequantize(torch.float32)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}


# Bad checkpoints


def test_absmax_of_the_wrong_length(one_file):
    change_tensors(
        one_file, lambda t: t.update({"lm_head.absmax": t["lm_head.absmax"][:-1].clone()})
    )
    with pytest.raises(ValueError, match=r"lm_head\.absmax must have shape \[25\] .*, got \[24\]"):
        load(one_file)


def test_block_size_that_does_not_fit(one_file):
    change_config(one_file, block_size=128)
    with pytest.raises(ValueError, match=r"absmax must have shape .* at block_size 128"):
        load(one_file)


@pytest.mark.parametrize("part", ["absmax", "codebook"])
def test_part_missing(one_file, part):
    change_tensors(one_file, lambda tensors: tensors.pop(f"lm_head.{part}"))
    with pytest.raises(
        ValueError, match=rf"lm_head\.codes is there but lm_head\.{part} is missing"
    ):
        load(one_file)


def test_codes_of_another_dtype(one_file):
    change_tensors(one_file, lambda t: t.update({"lm_head.codes": t["lm_head.codes"].float()}))
    with pytest.raises(TypeError, match=r"lm_head\.codes must be uint8, got float32"):
        load(one_file)


def test_codes_of_another_shape(one_file):
    def reshape(tensors):
        tensors["lm_head.codes"] = tensors["lm_head.codes"].T.contiguous()

    change_tensors(one_file, reshape)
    message = r"lm_head\.codes must have shape \[130, 48\] for this model, got \[48, 130\]"
    with pytest.raises(ValueError, match=message):
        load(one_file)


def test_state_dict_instead_of_files(stored_dir):
    model = load(stored_dir)
    config = AutoConfig.from_pretrained(stored_dir)
    state = dict(model.state_dict())
    again = GPTJForCausalLM.from_pretrained(None, config=config, state_dict=state)
    assert torch.equal(logits(again), logits(model))
    del state["lm_head.absmax"]
    config = AutoConfig.from_pretrained(stored_dir)
    with pytest.raises(ValueError, match=r"the state_dict lacks lm_head\.absmax"):
        GPTJForCausalLM.from_pretrained(None, config=config, state_dict=state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.flip(0), r"lm_head: codebook must be sorted"),
        (
            lambda table: table.index_fill(0, torch.tensor(7), torch.nan),
            r"lm_head: codebook .* nan",
        ),
        (lambda table: table * 2, r"lm_head: codebook must lie in \[-1, 1\]"),
        (lambda table: table[:255].clone(), r"lm_head\.codebook must have shape \[256\]"),
    ],
)
def test_bad_codebook(one_file, change, message):
    key = "lm_head.codebook"
    change_tensors(one_file, lambda tensors: tensors.update({key: change(tensors[key])}))
    with pytest.raises(ValueError, match=message):
        load(one_file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_bad_scale(one_file, value):
    change_tensors(one_file, lambda tensors: tensors["lm_head.absmax"][3:4].fill_(value))
    with pytest.raises(ValueError, match="lm_head: absmax"):
        load(one_file)


@pytest.mark.parametrize("kind", ["float", "stored"])
def test_truncated_shard(kind, float_dir, stored_dir, tmp_path):
    source = float_dir if kind == "float" else stored_dir
    for name, data in contents(source).items():
        (tmp_path / name).write_bytes(data[:-1] if name.startswith("model-00002") else data)
    options = {"quantization_config": QUICK} if kind == "float" else {}
    with pytest.raises(ValueError, match=r"model-00002-of-.*truncated or damaged"):
        load(tmp_path, **options)


@pytest.mark.parametrize("kind", ["float", "stored"])
def test_missing_shard(kind, float_dir, stored_dir, tmp_path):
    source = float_dir if kind == "float" else stored_dir
    for name, data in contents(source).items():
        if not name.startswith("model-00002"):
            (tmp_path / name).write_bytes(data)
    options = {"quantization_config": QUICK} if kind == "float" else {}
    with pytest.raises(OSError, match="model-00002-of"):
        load(tmp_path, **options)


def test_newer_format_is_refused(one_file):
    change_config(one_file, format_version=2, something_new=True)
    with pytest.raises(ValueError, match=r"config\.json: format_version 2 is newer than 1"):
        load(one_file)


def test_newer_format_in_the_weights_is_refused(one_file):
    path = one_file / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "format_version": "3"})
    with pytest.raises(ValueError, match=r"model\.safetensors: format_version 3 is newer than 1"):
        load(one_file)


def test_nothing_to_quantize(float_dir):
    everything = Q8Config(modules_to_not_convert=["transformer", "lm_head"])
    with pytest.raises(ValueError, match=r"no nn\.Linear or nn\.Embedding to quantize"):
        load(float_dir, quantization_config=everything)


def test_exemption_that_matches_nothing_is_told(float_dir, caplog):
    with caplog.at_level(logging.WARNING, "gptj_q8"):
        config = Q8Config(codebook="dynamic", modules_to_not_convert=["lmhead"])
        load(float_dir, quantization_config=config)
    assert "matches no module: lmhead" in caplog.text


# Registration, in processes of their own


def test_importing_gptj_q8_leaves_transformers_alone():
    code = "import sys, gptj_q8; print('transformers' in sys.modules)"
    assert run_python(code).stdout == "False\n"


def test_imported_before_transformers(stored_dir):
    code = """if True:
        import sys, gptj_q8, transformers
        model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
        print(type(model.lm_head).__name__)"""
    result = run_python(code, stored_dir)
    assert result.stdout.splitlines() == ["Q8Linear"], result.stderr


def test_imported_after_transformers_and_not_at_all(stored_dir):
    """Without gptj_q8 it raises, rather than go on with random weights."""
    code = """if True:
        import sys, transformers
        try:
            transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
        except RuntimeError:
            print("raises")
        import gptj_q8
        model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
        print(type(model.lm_head).__name__)"""
    result = run_python(code, stored_dir)
    assert result.stdout.splitlines() == ["raises", "Q8Linear"], result.stderr
    assert "transformer.wte.weight" in result.stderr
