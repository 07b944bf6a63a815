"""Adapters of PEFT on 8-bit models: the same numbers as on the decoded model, nothing lost."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import family
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from safetensors.torch import load_file
from tiny import IDS, QUICK, gpt2, gptj, load, logits, relative
from torch import nn
from transformers import GPTJForCausalLM

import gptj_q8
from gptj_q8.lora import registration
from gptj_q8.lora.layers import Q8LoraEmbedding, Q8LoraLinear
from gptj_q8.nn import Q8Embedding, Q8Linear

SIX = ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]
EVERYTHING = [*SIX, "lm_head", "wte"]
EXACT = 1e-6  # float32 sums in another order


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def eight_bit() -> GPTJForCausalLM:
    return gptj_q8.quantize_(gptj(), QUICK)


@pytest.fixture(scope="module")
def decoded(eight_bit: GPTJForCausalLM) -> GPTJForCausalLM:
    """The float model of the very same weights: what adapters must agree with."""
    return gptj_q8.dequantize_(copy.deepcopy(eight_bit))


def lora(**options: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": EVERYTHING, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **options})


def attach(model: nn.Module, config: Any, name: str = "default") -> PeftModel:
    """PEFT's own function, on a copy, then every trained tensor moved so that it matters."""
    torch.manual_seed(0)
    made = get_peft_model(copy.deepcopy(model), config, adapter_name=name)
    scramble(made)
    return made


def scramble(model: nn.Module, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, dtype=parameter.dtype)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_trains_alike(a: PeftModel, b: PeftModel) -> None:
    """The same loss and gradients, on a model that the adapter has moved far."""
    losses = [model(IDS, labels=IDS).loss for model in (a, b)]
    for loss in losses:
        loss.backward()
    assert relative(*losses) < EXACT
    right = trained(b)
    assert trained(a).keys() == right.keys()
    for name, parameter in trained(a).items():
        if right[name].grad is None:
            assert parameter.grad is None
        else:
            assert relative(parameter.grad, right[name].grad) < 1e-5, name


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
    options: dict[str, Any], eight_bit: GPTJForCausalLM, decoded: GPTJForCausalLM
) -> None:
    a, b = attach(eight_bit, lora(**options)), attach(decoded, lora(**options))
    kinds = {type(m) for m in a.modules() if hasattr(m, "lora_A")}
    assert kinds <= {Q8LoraLinear, Q8LoraEmbedding}
    assert relative(logits(b), logits(decoded)) > 0.01
    assert_trains_alike(a, b)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_dropout_is_off_in_eval_and_on_in_training(
    options: dict[str, Any], eight_bit: GPTJForCausalLM, decoded: GPTJForCausalLM
) -> None:
    config = lora(lora_dropout=0.5, target_modules=["fc_in"], **options)
    a, b = attach(eight_bit, config).eval(), attach(decoded, config).eval()
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
    "miss": peft.MissConfig(r=4, target_modules=SIX),
    "fourier": peft.FourierFTConfig(n_frequency=20, target_modules=["q_proj", "fc_in"]),
    "trainable tokens": peft.TrainableTokensConfig(target_modules=["wte"], token_indices=[1, 5]),
    "layer norms": peft.LNTuningConfig(target_modules=["ln_1", "ln_f"]),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_other_methods_train_right_and_merge_right_or_refuse(
    config: Any, eight_bit: GPTJForCausalLM, decoded: GPTJForCausalLM
) -> None:
    config.task_type = TaskType.CAUSAL_LM
    a, b = attach(eight_bit, copy.deepcopy(config)), attach(decoded, copy.deepcopy(config))
    assert relative(logits(b), logits(decoded)) > 1e-5
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
    eight_bit: GPTJForCausalLM, decoded: GPTJForCausalLM
) -> None:
    config = lora(target_modules=SIX, trainable_token_indices={"wte": [1, 5]})
    assert_trains_alike(attach(eight_bit, config), attach(decoded, config))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merging_is_right_within_one_rounding_and_unmerging_exact(
    options: dict[str, Any], eight_bit: GPTJForCausalLM, decoded: GPTJForCausalLM
) -> None:
    a, b = attach(eight_bit, lora(**options)), attach(decoded, lora(**options))
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
    eight_bit: GPTJForCausalLM, tmp_path: Path
) -> None:
    a = attach(eight_bit, lora())
    before = logits(a)
    merged = a.merge_and_unload()
    assert isinstance(merged.lm_head, Q8Linear)
    assert relative(logits(merged), before) < 0.05
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(merged))


def test_dequantized_under_its_adapters_it_merges_exactly(eight_bit: GPTJForCausalLM) -> None:
    for options in ({}, {"use_dora": True}):
        a = attach(eight_bit, lora(**options))
        before = logits(a)
        gptj_q8.dequantize_(a.get_base_model())
        assert relative(logits(a), before) < EXACT
        if not options:
            assert relative(logits(a.merge_and_unload()), before) < EXACT


def test_unmerging_what_was_dequantized_since_is_refused(eight_bit: GPTJForCausalLM) -> None:
    a = attach(eight_bit, lora())
    a.merge_adapter()
    gptj_q8.dequantize_(a.get_base_model())
    merged = logits(a)
    with pytest.raises(RuntimeError, match="default were merged into 8 bits and the model deq"):
        a.unmerge_adapter()
    assert torch.equal(logits(a), merged)


def test_merging_nan_or_tied_layers_is_refused_and_changes_nothing(
    eight_bit: GPTJForCausalLM,
) -> None:
    a = attach(eight_bit, lora())
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


def test_several_adapters_switch_combine_and_mix_in_a_batch(
    eight_bit: GPTJForCausalLM, decoded: GPTJForCausalLM
) -> None:
    models = []
    for base in (eight_bit, decoded):
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
        assert torch.equal(logits(a), logits(eight_bit))
    names = ["one", "two", "__base__"]
    a.eval()
    with torch.no_grad():
        mixed = a(IDS.expand(3, -1), adapter_names=names).logits
    for row, right in zip(mixed, (seen[0], seen[1], logits(eight_bit)), strict=True):
        assert relative(row, right[0]) < EXACT
    a.delete_adapter("two")
    a.set_adapter("one")
    assert torch.equal(logits(a), seen[0])


def test_dora_beside_another_active_adapter_is_refused(eight_bit: GPTJForCausalLM) -> None:
    model = attach(eight_bit, lora(use_dora=True), "one")
    model.add_adapter("two", lora())
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match=r"DoRA goes with no other adapter.*one, two"):
        logits(model)
    with pytest.raises(ValueError, match="DoRA goes with no other adapter"):
        model.merge_adapter()


REFUSED = {
    "pissa": ({"init_lora_weights": "pissa"}, "'pissa' changes the base weights"),
    "olora": ({"init_lora_weights": "olora"}, "'olora' changes the base weights"),
    "lm_head": ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head is in 8 bits"),
    "parent": ({"modules_to_save": ["mlp"]}, r"transformer.h.0.mlp.fc_in is in 8 bits"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: only plain LoRA"),
    "parameters": (
        {"target_modules": [], "target_parameters": ["q_proj.codes"]},
        "target_parameters: .*q_proj.codes is in 8 bits",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_silently_wrong_is_refused(
    options: dict[str, Any], message: str, eight_bit: GPTJForCausalLM
) -> None:
    model = copy.deepcopy(eight_bit)
    with pytest.raises((ValueError, RuntimeError), match=message):
        get_peft_model(model, lora(**options))
    assert not any(hasattr(module, "lora_A") for module in model.modules())


def test_an_embedding_that_shifts_its_ids_is_refused_by_name() -> None:
    model = gptj_q8.quantize_(family("opt"), QUICK)
    with pytest.raises(ValueError, match=r"embed_positions computes its ids itself"):
        get_peft_model(model, lora(target_modules=["embed_positions"]))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_embedding_that_scales_its_rows_scales_what_is_added(options: dict[str, Any]) -> None:
    eight_bit = gptj_q8.quantize_(family("gemma2"), QUICK)
    decoded = gptj_q8.dequantize_(copy.deepcopy(eight_bit))
    config = lora(target_modules=["embed_tokens"], **options)
    assert_trains_alike(attach(eight_bit, config), attach(decoded, config))


def test_prompt_tuning_is_refused_by_name(eight_bit: GPTJForCausalLM) -> None:
    with pytest.raises(ValueError, match="prompt learning needs a float embedding"):
        get_peft_model(
            copy.deepcopy(eight_bit), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)
        )


def test_adding_an_adapter_decodes_nothing(
    eight_bit: GPTJForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(layer: nn.Module) -> None:
        raise AssertionError(f"decoded {layer}")

    monkeypatch.setattr("gptj_q8.nn.quantized.QuantizedWeight.dequantize", fail)
    model = attach(eight_bit, lora())
    model(IDS, labels=IDS).loss.backward()


# Files.


def test_an_adapter_file_holds_the_adapter_alone_and_loads_anywhere(
    eight_bit: GPTJForCausalLM, decoded: GPTJForCausalLM, tmp_path: Path
) -> None:
    a = attach(eight_bit, lora())
    right = logits(a)
    a.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".lora_" in name for name in stored)
    assert len(stored) == 2 * (2 * 6 + 2)
    for base, bound in ((eight_bit, 0.0), (decoded, EXACT)):
        for low_memory in (False, True):
            again = PeftModel.from_pretrained(
                copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_memory
            )
            assert relative(logits(again), right) <= bound
    native = copy.deepcopy(eight_bit)
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native), right)
    other_blocks = gptj_q8.quantize_(gptj(), gptj_q8.Q8Config(block_size=64))
    again = PeftModel.from_pretrained(other_blocks, tmp_path)
    assert relative(logits(again), right) < 0.05


def test_dora_loads_again(eight_bit: GPTJForCausalLM, tmp_path: Path) -> None:
    a = attach(eight_bit, lora(use_dora=True))
    a.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(
            copy.deepcopy(eight_bit), tmp_path, low_cpu_mem_usage=low_memory
        )
        assert relative(logits(again), logits(a)) < EXACT


def test_an_adapter_of_the_float_model_loads_on_8_bits(
    eight_bit: GPTJForCausalLM, decoded: GPTJForCausalLM, tmp_path: Path
) -> None:
    b = attach(decoded, lora())
    b.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(copy.deepcopy(eight_bit), tmp_path)
    assert relative(logits(again), logits(b)) < EXACT


PLAIN_RELOAD = """
import sys, torch{first}
from peft import AutoPeftModelForCausalLM
{last}
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
kinds = {{type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")}}
assert kinds == {{"Q8LoraLinear"}}, kinds
torch.save(model(torch.arange(12)[None]).logits.detach(), sys.argv[2])
"""


@pytest.mark.parametrize("order", ["first", "last"])
def test_plain_peft_reloads_in_a_new_process(order: str, stored_dir: Path, tmp_path: Path) -> None:
    """Without helper of ours, whichever of the two is imported first."""
    model = gptj_q8.add_lora(load(stored_dir), r=4)
    scramble(model)
    model.save_pretrained(tmp_path / "adapter")
    imports = {"first": "", "last": ""}
    imports[order] = "; import gptj_q8" if order == "first" else "import gptj_q8"
    code = PLAIN_RELOAD.format(**imports)
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "adapter", tmp_path / "logits"], check=True
    )
    assert torch.equal(torch.load(tmp_path / "logits"), logits(model.eval()))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_peft_preparing_for_kbit_training_checkpoints(stored_dir: Path) -> None:
    model = prepare_model_for_kbit_training(load(stored_dir))
    assert model.is_gradient_checkpointing
    assert not hasattr(model, "is_loaded_in_8bit")


# add_lora.


def test_add_lora_takes_all_matrices_or_names(eight_bit: GPTJForCausalLM) -> None:
    def adapted(**options: Any) -> set[str]:
        model = gptj_q8.add_lora(copy.deepcopy(eight_bit), **options)
        layers = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
        return {name.rpartition(".")[2] for name in layers}

    assert adapted() == set(SIX)
    assert adapted(targets=["all", "lm_head", "wte"]) == set(EVERYTHING)
    assert adapted(targets="lm_head") == {"lm_head"}


def test_add_lora_passes_its_options_on(eight_bit: GPTJForCausalLM) -> None:
    model = gptj_q8.add_lora(
        copy.deepcopy(eight_bit), r=4, alpha=6, dropout=0.25, rslora=True, dora=True, bias="all"
    )
    config = model.peft_config["default"]
    layer = model.base_model.model.transformer.h[0].attn.q_proj
    assert layer.scaling["default"] == 6 / 2
    assert (config.lora_dropout, config.use_dora, config.bias) == (0.25, True, "all")
    assert config.task_type == "CAUSAL_LM"
    assert gptj_q8.add_lora(model, r=2, adapter_name="more") is model
    assert model.active_adapters == ["default"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "r": ({"r": 0}, "r must be positive, got 0"),
    "alpha": ({"alpha": -1}, "alpha must be positive, got -1"),
    "dropout": ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    "typo": ({"targets": ["q_proj", "kproj"]}, "no module named 'kproj'"),
    "none": ({"targets": []}, "targets is empty"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_add_lora_refuses_bad_options(
    options: dict[str, Any], message: str, eight_bit: GPTJForCausalLM
) -> None:
    model = copy.deepcopy(eight_bit)
    with pytest.raises(ValueError, match=message):
        gptj_q8.add_lora(model, **options)
    assert not hasattr(model, "peft_config")


def test_add_lora_refuses_a_name_twice(eight_bit: GPTJForCausalLM) -> None:
    model = gptj_q8.add_lora(copy.deepcopy(eight_bit))
    with pytest.raises(ValueError, match="adapter named 'default' already"):
        gptj_q8.add_lora(model)


def test_hooks_on_a_base_layer_are_called(eight_bit: GPTJForCausalLM) -> None:
    model = attach(eight_bit, lora(target_modules=["fc_in"]))
    right, calls = logits(model), []
    base = model.base_model.model.transformer.h[0].mlp.fc_in.base_layer
    base.register_forward_hook(lambda *_: calls.append(1))
    assert relative(logits(model), right) < EXACT
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_adapters_on_a_16_bit_model(dtype: torch.dtype, decoded: GPTJForCausalLM) -> None:
    """As near to the float32 model as PEFT's own layers over the float model in that dtype."""
    small = gptj_q8.quantize_(copy.deepcopy(decoded).to(dtype), QUICK)
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


def test_the_model_compiles_whole_with_its_adapters(eight_bit: GPTJForCausalLM) -> None:
    model = attach(eight_bit, lora())
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
