"""Loading float checkpoints through Transformers, in 8 bits."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny import QUICK, contents, gptj, load, logits, relative
from torch import nn
from transformers import GPTJForCausalLM

import gptj_q8
from gptj_q8.config import Q8Config
from gptj_q8.hf import Q8HfQuantizer, layers
from gptj_q8.nn import Q8Embedding, Q8Linear


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
    # Our loader's own choice of attention is SDPA, which rounds otherwise.
    eager = load(float_dir, quantization_config=Q8Config(), attn_implementation="eager")
    expected = logits(eager)
    for source in (float_dir, str(stored_dir)):
        model = gptj_q8.from_pretrained(source, attn_implementation="eager")
        assert torch.equal(logits(model), expected)
        assert relative(logits(gptj_q8.from_pretrained(source)), expected) < 0.002
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


# Registration, in processes of their own


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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


@pytest.mark.parametrize("order", ["gptj_q8, transformers", "transformers, gptj_q8"])
def test_methods_of_transformers_are_guarded_once_whatever_the_order(order):
    code = f"""if True:
        import {order}, importlib
        from transformers import PreTrainedModel
        import gptj_q8.hf.patches
        importlib.reload(gptj_q8.hf.patches)
        for name in ("_load_pretrained_model", "_get_resized_embeddings"):
            method = getattr(PreTrainedModel, name)
            print(method.gptj_q8_checks.__name__, hasattr(method.__wrapped__, "gptj_q8_checks"))"""
    result = run_python(code)
    expected = ["check_load False", "check_resize False"]
    assert result.stdout.splitlines() == expected, result.stderr


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
