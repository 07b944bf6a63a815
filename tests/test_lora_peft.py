"""Adapters of PEFT on 8-bit models: the same numbers as on the decoded model."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from adapters import EXACT, SIX, assert_trains_alike, attach, lora, scramble, trained
from families import family
from peft import IA3Config, LoHaConfig, TaskType, get_peft_model
from tiny import IDS, QUICK, logits, relative
from torch import Tensor, nn
from transformers import GPTJForCausalLM

import gptj_q8
from gptj_q8.lora import registration
from gptj_q8.lora.layers import Q8LoraEmbedding, Q8LoraLinear


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    torch.manual_seed(0)


LORAS = {
    "plain": {},
    "six": {"target_modules": SIX},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"fc_in": 1}},
    "biases": {"target_modules": ["fc_in", "fc_out", "lm_head"], "lora_bias": True},
    "bias=all": {"bias": "all"},
    "norms": {"modules_to_save": ["ln_1", "ln_f"]},
}


@pytest.mark.parametrize("options", LORAS.values(), ids=LORAS)
def test_lora_computes_and_trains_as_on_the_decoded_model(
    options: dict[str, Any], eight_bit_gptj: GPTJForCausalLM, decoded_gptj: GPTJForCausalLM
) -> None:
    a, b = attach(eight_bit_gptj, lora(**options)), attach(decoded_gptj, lora(**options))
    kinds = {type(m) for m in a.modules() if hasattr(m, "lora_A")}
    assert kinds <= {Q8LoraLinear, Q8LoraEmbedding}
    assert relative(logits(b), logits(decoded_gptj)) > 0.01
    assert_trains_alike(a, b)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_dropout_is_off_in_eval_and_on_in_training(
    options: dict[str, Any], eight_bit_gptj: GPTJForCausalLM, decoded_gptj: GPTJForCausalLM
) -> None:
    config = lora(lora_dropout=0.5, target_modules=["fc_in"], **options)
    a, b = attach(eight_bit_gptj, config).eval(), attach(decoded_gptj, config).eval()
    assert relative(logits(a), logits(b)) < EXACT
    a.train(), b.train()
    # The mean over many masks is the model without dropout, near enough to linear here.
    layer_a, layer_b = (m.base_model.model.transformer.h[0].mlp.fc_in for m in (a, b))
    x = torch.randn(1, 48).expand(4000, 48)
    with torch.no_grad():
        outputs = [layer(x) for layer in (layer_a, layer_b)]
        layer_a.eval()
        mean = layer_a(x[:1])
    assert relative(outputs[0].mean(0), mean[0]) < 0.05
    assert outputs[0].std(0).mean() == pytest.approx(float(outputs[1].std(0).mean()), rel=0.05)


OTHERS = {
    "ia3": IA3Config(target_modules=["k_proj", "fc_out"], feedforward_modules=["fc_out"]),
    "adalora": peft.AdaLoraConfig(target_modules=SIX, total_step=10, init_r=4),
    "loha": LoHaConfig(r=4, target_modules=SIX),
    "lokr": peft.LoKrConfig(r=4, target_modules=SIX),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=SIX),
    "oft": peft.OFTConfig(oft_block_size=4, r=0, target_modules=SIX),
    "hra": peft.HRAConfig(r=4, target_modules=SIX),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "shira": peft.ShiraConfig(r=4, target_modules=SIX),
    "miss": peft.MissConfig(r=4, target_modules=SIX),
    "fourier": peft.FourierFTConfig(n_frequency=20, target_modules=["q_proj", "fc_in"]),
    "trainable tokens": peft.TrainableTokensConfig(target_modules=["wte"], token_indices=[1, 5]),
    "layer norms": peft.LNTuningConfig(target_modules=["ln_1", "ln_f"]),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_other_methods_train_right_and_merge_right_or_refuse(
    config: Any, eight_bit_gptj: GPTJForCausalLM, decoded_gptj: GPTJForCausalLM
) -> None:
    config.task_type = TaskType.CAUSAL_LM
    a, b = (
        attach(eight_bit_gptj, copy.deepcopy(config)),
        attach(decoded_gptj, copy.deepcopy(config)),
    )
    assert relative(logits(b), logits(decoded_gptj)) > 1e-5
    assert_trains_alike(a, b)
    before = logits(a)
    for safe in (False, True):
        try:
            merged = copy.deepcopy(a).merge_and_unload(safe_merge=safe)
        except RuntimeError as error:
            assert "read-only" in str(error)  # noqa: PT017
        else:
            assert relative(logits(merged), before) < 1e-5


def test_trainable_tokens_beside_lora_are_right(
    eight_bit_gptj: GPTJForCausalLM, decoded_gptj: GPTJForCausalLM
) -> None:
    config = lora(target_modules=SIX, trainable_token_indices={"wte": [1, 5]})
    a = attach(eight_bit_gptj, config)
    assert_trains_alike(a, attach(decoded_gptj, config))
    state = {name: tensor.clone() for name, tensor in a.state_dict().items()}
    with pytest.raises(NotImplementedError, match="read-only"):
        a.merge_adapter()
    assert all(torch.equal(state[name], tensor) for name, tensor in a.state_dict().items())


def test_lora_mixes_with_another_method(
    eight_bit_gptj: GPTJForCausalLM, decoded_gptj: GPTJForCausalLM
) -> None:
    models = []
    for base in (eight_bit_gptj, decoded_gptj):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base), lora(target_modules=SIX), mixed=True)
        model.add_adapter("loha", LoHaConfig(r=4, target_modules=SIX))
        model.set_adapter(["default", "loha"])
        scramble(model)
        models.append(model.eval())
    a, b = (model(input_ids=IDS).logits for model in models)
    assert relative(b, logits(decoded_gptj)) > 0.01
    assert relative(a, b) < EXACT


def test_outputs_may_be_changed_in_place(eight_bit_gptj: GPTJForCausalLM) -> None:
    """The seed's layers raised "is a view and is being modified inplace" here."""
    model = attach(eight_bit_gptj, lora()).base_model.model
    hidden = torch.randn(2, 3, 48, requires_grad=True)
    for layer, x in ((model.transformer.h[0].mlp.fc_in, hidden), (model.transformer.wte, IDS)):
        grads = []
        for change in (Tensor.add, Tensor.add_):
            change(layer(x), 1.0).square().sum().backward()
            grads.append([p.grad.clone() for p in trained(layer).values()])
            layer.zero_grad()
        assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_several_adapters_switch_combine_and_mix_in_a_batch(
    eight_bit_gptj: GPTJForCausalLM, decoded_gptj: GPTJForCausalLM
) -> None:
    models = []
    for base in (eight_bit_gptj, decoded_gptj):
        model = attach(base, lora(), "one")
        model.add_adapter("two", lora(r=2, target_modules=["q_proj", "wte"]))
        model.set_adapter("two")
        scramble(model, seed=2)
        model.add_weighted_adapter(["one", "one"], [0.5, 0.25], "sum", combination_type="cat")
        models.append(model)
    a, b = models
    seen = []
    for name in ("one", "two", "sum"):
        for model in models:
            model.set_adapter(name)
        assert relative(logits(a), logits(b)) < EXACT
        seen.append(logits(a))
    assert min(relative(seen[0], seen[1]), relative(seen[0], seen[2])) > 0.01
    for model in models:
        model.base_model.set_adapter(["one", "two"])
    assert relative(logits(a), logits(b)) < EXACT
    assert relative(logits(a), seen[0]) > 0.01
    with a.disable_adapter():
        assert torch.equal(logits(a), logits(eight_bit_gptj))
    names = ["one", "two", "__base__"]
    a.eval()
    with torch.no_grad():
        mixed = a(IDS.expand(3, -1), adapter_names=names).logits
    for row, right in zip(mixed, (seen[0], seen[1], logits(eight_bit_gptj)), strict=True):
        assert relative(row, right[0]) < EXACT
    a.delete_adapter("two")
    a.set_adapter("one")
    assert torch.equal(logits(a), seen[0])


def test_dora_beside_another_active_adapter_is_refused(eight_bit_gptj: GPTJForCausalLM) -> None:
    model = attach(eight_bit_gptj, lora(use_dora=True), "one")
    model.add_adapter("two", lora())
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match=r"DoRA goes with no other adapter.*one, two"):
        logits(model)
    with pytest.raises(ValueError, match="DoRA goes with no other adapter"):
        model.merge_adapter()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_embedding_that_scales_its_rows_scales_what_is_added(options: dict[str, Any]) -> None:
    small = gptj_q8.quantize_(family("gemma2"), QUICK)
    float_model = gptj_q8.dequantize_(copy.deepcopy(small))
    config = lora(target_modules=["embed_tokens"], **options)
    assert_trains_alike(attach(small, config), attach(float_model, config))


def test_adding_an_adapter_decodes_nothing(
    eight_bit_gptj: GPTJForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(layer: nn.Module) -> None:
        raise AssertionError(f"decoded {layer}")

    monkeypatch.setattr("gptj_q8.nn.quantized.QuantizedWeight.dequantize", fail)
    model = attach(eight_bit_gptj, lora())
    model(IDS, labels=IDS).loss.backward()


def test_hooks_on_a_base_layer_are_called(eight_bit_gptj: GPTJForCausalLM) -> None:
    model = attach(eight_bit_gptj, lora(target_modules=["fc_in"]))
    right, calls = logits(model), []
    base = model.base_model.model.transformer.h[0].mlp.fc_in.base_layer
    base.register_forward_hook(lambda *_: calls.append(1))
    assert relative(logits(model), right) < EXACT
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_adapters_on_a_16_bit_model(
    dtype: torch.dtype, decoded_gptj: GPTJForCausalLM
) -> None:
    """As near to the float32 model as PEFT's own layers over the float model in that dtype."""
    small = gptj_q8.quantize_(copy.deepcopy(decoded_gptj).to(dtype), QUICK)
    a = attach(small, lora())
    b = attach(gptj_q8.dequantize_(copy.deepcopy(small)), lora())
    exact = attach(gptj_q8.dequantize_(copy.deepcopy(small), torch.float32), lora())
    exact.load_state_dict(trained(a), strict=False)
    assert {p.dtype for p in trained(a).values()} == {torch.float32}
    assert relative(logits(a), logits(exact)) < 2 * relative(logits(b), logits(exact))
    for model in (a, b, exact):
        model(IDS, labels=IDS).loss.backward()
    for name, parameter in trained(exact).items():
        own, theirs = (relative(trained(m)[name].grad, parameter.grad) for m in (a, b))
        assert own < 2 * theirs + 1e-3, name


def test_the_model_compiles_whole_with_its_adapters(eight_bit_gptj: GPTJForCausalLM) -> None:
    model = attach(eight_bit_gptj, lora())
    right = model(IDS, labels=IDS).loss
    right.backward()
    grads = {name: p.grad for name, p in trained(model).items()}
    model.zero_grad()
    compiled = torch.compile(model.get_base_model(), fullgraph=True)
    loss = compiled(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    assert relative(loss, right) < EXACT
    for name, parameter in trained(model).items():
        assert relative(parameter.grad, grads[name]) < 1e-5, name


def test_a_peft_that_is_too_old_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", "0.19.1")
    with pytest.raises(ImportError, match=r"PEFT 0\.20 or newer is needed, this is 0\.19\.1"):
        registration.register()
