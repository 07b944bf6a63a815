"""quantize_ and dequantize_ on models in memory."""

from __future__ import annotations

import copy
import logging

import peft
import pytest
import torch
from tiny import QUICK, gpt2, gptj, logits, relative
from torch import nn

from gptj_q8.config import Q8Config
from gptj_q8.convert import dequantize_, quantize_
from gptj_q8.nn import Q8Embedding, Q8Linear


def layered() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(40, 40) for _ in range(12)))


def test_every_layer_of_gptj_becomes_8_bit():
    model = gptj()
    expected = logits(model)
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
    assert quantize_(model, Q8Config()) is model
    assert not [m for m in model.modules() if type(m) in (nn.Linear, nn.Embedding)]
    assert isinstance(model.lm_head, Q8Linear)
    assert isinstance(model.transformer.wte, Q8Embedding)
    assert all(dict(model.named_parameters())[n] is p for n, p in biases.items())
    assert relative(logits(model), expected) < 0.02


def test_layer_equals_from_float():
    model = layered()
    linear = copy.deepcopy(model[3])
    quantize_(model, Q8Config(block_size=64, codebook="dynamic"))
    expected = Q8Linear.from_float(linear, "dynamic", 64)
    assert torch.equal(model[3].codes, expected.codes)
    assert torch.equal(model[3].absmax, expected.absmax)
    assert model[3].block_size == 64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_value_in_the_tenth_weight_changes_nothing(bad):
    model = layered()
    with torch.no_grad():
        model[9].weight[3, 5:8] = bad
    before = [(module, module.weight.clone()) for module in model]
    with pytest.raises(ValueError, match=r"9\.weight has 3 NaN or Inf values"):
        quantize_(model)
    for module, (old, weight) in zip(model, before, strict=True):
        assert module is old
        assert torch.equal(module.weight.nan_to_num(), weight.nan_to_num())


def test_every_bad_weight_is_named():
    model = layered()
    with torch.no_grad():
        model[2].weight[0, 0] = model[7].weight[1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"2\.weight has 1 .*; 7\.weight has 1 "):
        quantize_(model)


@pytest.mark.parametrize(
    ("entry", "kept"),
    [
        ("lm_head", ["lm_head"]),
        ("transformer.wte", ["transformer.wte"]),
        ("mlp.fc_in", ["transformer.h.0.mlp.fc_in", "transformer.h.1.mlp.fc_in"]),
        ("h.1.mlp", ["transformer.h.1.mlp.fc_in", "transformer.h.1.mlp.fc_out"]),
    ],
)
def test_modules_to_not_convert(entry, kept):
    model = quantize_(gptj(), Q8Config(codebook="dynamic", modules_to_not_convert=[entry]))
    floats = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)]
    assert floats == kept


def test_an_exemption_is_of_whole_names():
    model = nn.ModuleDict({"proj": nn.Linear(32, 32), "proj_out": nn.Linear(32, 32)})
    quantize_(model, Q8Config(modules_to_not_convert=["proj"]))
    assert type(model["proj"]) is nn.Linear
    assert type(model["proj_out"]) is Q8Linear


@pytest.mark.parametrize("entry", ["lmhead", "fc", "h.2", "transformer.wt"])
def test_exemption_that_matches_nothing_is_refused(entry):
    model = gptj()
    with pytest.raises(ValueError, match=f"matches no module: {entry}"):
        quantize_(model, Q8Config(modules_to_not_convert=["lm_head", entry]))
    assert type(model.lm_head) is nn.Linear


def test_subclasses_stay():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(8, 8), nn.Linear(8, 8))
    quantize_(model)
    assert type(model[0]) is Scaled
    assert isinstance(model[1], Q8Linear)


def test_nothing_left_is_refused():
    model = quantize_(layered(), QUICK)
    with pytest.raises(ValueError, match=r"no nn\.Linear or nn\.Embedding left"):
        quantize_(model)
    with pytest.raises(ValueError, match=r"no nn\.Linear or nn\.Embedding left"):
        quantize_(nn.Sequential(nn.LayerNorm(4)))


def test_weights_without_data_are_refused():
    with torch.device("meta"):
        model = layered()
    with pytest.raises(ValueError, match=r"0\.weight has no data \(meta device\)"):
        quantize_(model)


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"0\.weight must be .*, got float64"):
        quantize_(layered().double())


def test_a_model_has_one_block_size():
    """config.json holds one, and what save_pretrained wrote of two would not load."""
    model = quantize_(gptj(), Q8Config(codebook="dynamic", modules_to_not_convert=["lm_head"]))
    with pytest.raises(ValueError, match=r"wte has block_size 256 already, .* got 64"):
        quantize_(model, Q8Config(block_size=64))
    assert type(model.lm_head) is nn.Linear
    assert isinstance(quantize_(model, QUICK).lm_head, Q8Linear)


def test_hooks_survive():
    model, seen = layered(), []
    handle = model[3].register_forward_hook(lambda *_: seen.append("after"))
    model[3].register_forward_pre_hook(lambda *_: seen.append("before"))
    quantize_(model, QUICK)
    model(torch.ones(1, 40))
    assert seen == ["before", "after"]
    handle.remove()
    model(torch.ones(1, 40))
    assert seen == ["before", "after", "before"]


def test_replaced_forward_is_refused():
    """As accelerate replaces it, to move what goes in and out."""
    model = layered()
    model[3].forward = lambda x: x.to(torch.float32)
    with pytest.raises(ValueError, match="3 has had its forward replaced"):
        quantize_(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_adapters_are_not_quantized(how):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    model = gptj()
    adapted = peft.get_peft_model(model, config) if how == "get_peft_model" else model
    if how == "add_adapter":
        model.add_adapter(config)
    with pytest.raises(ValueError, match="the model has adapters; quantize it before"):
        quantize_(adapted)
    assert any(p.requires_grad for p in adapted.parameters())


def test_max_norm_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(8, 8, max_norm=1.0))
    with pytest.raises(ValueError, match="1 has max_norm"):
        quantize_(model)
    assert type(model[0]) is nn.Linear


def test_shared_weight_keeps_being_shared():
    model = gpt2()
    expected = logits(model)
    quantize_(model)
    for part in ("codes", "absmax", "codebook"):
        assert getattr(model.lm_head, part) is getattr(model.transformer.wte, part)
    assert relative(logits(model), expected) < 0.02


def test_shared_module_keeps_being_shared():
    linear = nn.Linear(8, 8)
    model = quantize_(nn.Sequential(linear, nn.ReLU(), linear))
    assert model[0] is model[2]
    assert isinstance(model[2], Q8Linear)


def test_weight_shared_with_an_exempt_module_stays(caplog):
    model = gpt2()
    with caplog.at_level(logging.WARNING, "gptj_q8"):
        quantize_(model, Q8Config(modules_to_not_convert=["lm_head"]))
    assert type(model.lm_head) is nn.Linear
    assert model.transformer.wte.weight is model.lm_head.weight
    assert "transformer.wte.weight stays as it is" in caplog.text


def test_dequantize_gives_the_float_model_back():
    model = gptj()
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    quantize_(model)
    expected = logits(model)
    assert dequantize_(model) is model
    assert [name for name, _ in model.named_parameters()] == list(original)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert relative(parameter, original[name]) < 0.01
    assert relative(logits(model), expected) < 1e-5


def test_dequantize_to_a_dtype():
    model = dequantize_(quantize_(layered(), QUICK), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_dequantize_keeps_weights_shared():
    model = dequantize_(quantize_(gpt2(), QUICK))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_training_flag_and_options_survive():
    model = nn.Sequential(
        nn.Embedding(20, 8, padding_idx=3, sparse=True), nn.Linear(8, 8, bias=False)
    )
    model.eval()
    quantize_(model)
    assert (model[0].padding_idx, model[0].sparse, model[0].training) == (3, True, False)
    dequantize_(model)
    assert (model[0].padding_idx, model[0].sparse, model[0].training) == (3, True, False)
    assert model[1].bias is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "power of two from 32 to 4096, got 0"),
        ({"block_size": -64}, ValueError, "got -64"),
        ({"block_size": 100}, ValueError, "got 100"),
        ({"block_size": 8192}, ValueError, "got 8192"),
        ({"block_size": 256.0}, TypeError, "block_size must be an int, got float"),
        ({"block_size": True}, TypeError, "block_size must be an int, got bool"),
        ({"codebook": "fited"}, ValueError, "must be one of dynamic, fitted, linear; got 'fited'"),
        ({"codebook": "dynamic_unsigned"}, ValueError, "got 'dynamic_unsigned'"),
        ({"modules_to_not_convert": "lm_head"}, TypeError, "must be a list, got 'lm_head'"),
        ({"modules_to_not_convert": [3]}, ValueError, "must hold names, got 3"),
        ({"format_version": 2}, ValueError, "format_version 2 is newer than 1"),
        ({"format_version": 0}, ValueError, "must be a positive integer, got 0"),
        ({"quant_method": "gptq"}, ValueError, "must be 'gptj_q8', got 'gptq'"),
        ({"blocksize": 64}, TypeError, "blocksize"),
    ],
)
def test_bad_config(arguments, error, message):
    with pytest.raises(error, match=message):
        Q8Config(**arguments)


@pytest.mark.parametrize("module", [nn.Linear(8, 8), nn.Embedding(8, 8)])
def test_a_bare_module_is_told_how(module: nn.Module) -> None:
    kind = type(module).__name__
    with pytest.raises(ValueError, match=rf"a bare nn\.{kind} .*, use Q8{kind}\.from_float"):
        quantize_(module)
