"""The memory estimate: its parts against a model's own tensors, its command line, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from allocated import peak_allocated
from command_line import POSITIONS, read_json, run, save_byte_gptj
from peft import LoraConfig, get_peft_model
from tiny import gpt2, gptj
from torch import Tensor
from transformers import GPTJConfig

from gptj_q8.convert import quantize_
from gptj_q8.lora import add_lora, prepare_for_finetuning
from gptj_q8.memory import Setting, estimate, estimate_loaded
from gptj_q8.models import RULES
from gptj_q8.nn.loss import CHUNK_ROWS
from gptj_q8.optim import AdamW8bit

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"n_embd": 512, "n_layer": 2, "n_head": 4, "vocab_size": 1024, "rotary_dim": 64}


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_standing_parts_are_the_bytes_of_a_real_model() -> None:
    model = gptj(**SIZES)
    for parameter in model.parameters():  # and not the sines of the positions
        parameter.data = parameter.data.bfloat16()
    quantize_(model)
    config = model.config
    matrices = [name.split(".")[-1] for name in RULES["gptj"].matrices]
    tuned = get_peft_model(model, LoraConfig(r=16, target_modules=matrices))
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = AdamW8bit(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [t for entry in optimizer.state.values() for t in entry.values() if torch.is_tensor(t)]

    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    named: dict[str, list[Tensor]] = {"codes": [], "scales": [], "rest": [], "adapters": []}
    for name, tensor in tensors.items():
        last = name.split(".")[-1]
        kind = {"codes": "codes", "absmax": "scales", "codebook": "scales"}.get(last, "rest")
        named["adapters" if "lora_" in name else kind].append(tensor)

    standing = estimate(config, Setting(tokens=8)).standing
    assert standing["codes"] == bytes_of(named["codes"])
    assert standing["scales"] == bytes_of(named["scales"])
    assert standing["adapters"] == bytes_of(named["adapters"]) == bytes_of(trained)
    assert standing["biases, norms, positions"] == pytest.approx(bytes_of(named["rest"]), rel=0.01)
    assert standing["optimizer state"] == pytest.approx(bytes_of(state), rel=0.01)


def kept_by_autograd(checkpointing: bool, dropout: float, batch: int, tokens: int) -> tuple:
    """The prepared model, and bytes of the large tensors kept for the backward pass."""
    model = quantize_(gptj(**SIZES, n_positions=256).bfloat16())
    model = add_lora(model, r=4, dropout=dropout)
    prepare_for_finetuning(model, checkpointing=checkpointing, verbose=False)
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    kept: dict[int, int] = {}
    held = []  # so that no address is used twice
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    return model, sum(size for size in kept.values() if size >= batch * tokens * 512)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_kept_activations_are_what_autograd_keeps(checkpointing: bool, dropout: float) -> None:
    model, kept = kept_by_autograd(checkpointing, dropout, batch=2, tokens=128)
    found = estimate_loaded(model, 128, 2, checkpointing)
    assert found.passing["activations kept"] == kept


def test_a_loaded_model_is_counted_as_its_configuration_is() -> None:
    model = add_lora(quantize_(gptj(**SIZES).bfloat16()), r=8)
    loaded = estimate_loaded(model, 64, 2, checkpointing=True)
    counted = estimate(model.config, Setting(tokens=64, batch=2, rank=8))
    assert loaded.passing == counted.passing
    for name in ("adapters", "optimizer state", "libraries"):
        assert loaded.standing[name] == counted.standing[name]
    weights = sum(
        counted.standing[name] for name in ("codes", "scales", "biases, norms, positions")
    )
    assert loaded.standing["weights"] == pytest.approx(weights, rel=0.01)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_steps_peak_is_as_estimated(checkpointing: bool) -> None:
    """What the tensors of a step take beside those that stand.

    A quarter of GPT-J's width, so that what a block's backward pass takes outweighs all else.
    """
    tokens = 1024
    sizes = {"n_embd": 1024, "n_layer": 2, "n_head": 4, "vocab_size": 512, "rotary_dim": 64}
    model = add_lora(quantize_(gptj(**sizes, n_positions=tokens).bfloat16()))
    model = prepare_for_finetuning(model, checkpointing=checkpointing, verbose=False)
    ids = torch.randint(512, (1, tokens))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    found = estimate_loaded(model, tokens, 1, checkpointing)
    expected = found.total - sum(found.standing.values())
    assert 0.92 * expected < peak_allocated(step) <= expected


def test_full_size_is_the_issues_own_figures() -> None:
    """33,030,144 parameters in the adapters; 6.05 GB of codes; a step below 8.5 GB."""
    found = estimate(GPTJConfig(), Setting())
    assert found.standing["adapters"] == 4 * 33_030_144
    assert found.standing["codes"] == 2 * 50400 * 4096 + 28 * (4 * 4096**2 + 2 * 4096 * 16384)
    assert found.passing["loss"] == CHUNK_ROWS * 50400 * 8 + 2048 * 4096 * 2
    assert 7e9 < found.total < 8.5e9
    assert found.total == max(found.moments.values())


@pytest.mark.parametrize("more", [{"batch": 2}, {"rank": 64}, {"tokens": 2048}])
def test_more_of_anything_takes_more(more: dict[str, int]) -> None:
    config = GPTJConfig()
    least = estimate(config, Setting(tokens=512))
    assert estimate(config, Setting(**{"tokens": 512, **more})).total > least.total


def test_bad_input() -> None:
    config = GPTJConfig()
    with pytest.raises(ValueError, match="context has 2048 tokens, got 2049"):
        estimate(config, Setting(tokens=2049))
    with pytest.raises(ValueError, match="rank must be positive, got 0"):
        estimate(config, Setting(rank=0))
    with pytest.raises(ValueError, match="knows gptj, not gpt2"):
        estimate(gpt2().config, Setting())


def test_command_line(tmp_path: Path) -> None:
    shown = run("memory", "--device-memory", "8")
    assert shown.exit_code == 0, shown.output
    for part in ("codes", "optimizer state", "At its fullest", "2048", "Fits: "):
        assert part in shown.stdout
    assert "too much" in run("memory", "--device-memory", "7.1").stdout
    assert "Too much: " in run("memory", "--device-memory", "7.1").stdout

    found = read_json(run("memory", "--tokens", 512, "--device", "cpu", "--json"))
    expected = estimate(GPTJConfig(), Setting(tokens=512))
    assert found["total"] == expected.total
    assert found["fits"] is True
    assert found["passing"] == expected.passing

    folder = save_byte_gptj(tmp_path / "model", seed=0)
    small = read_json(run("memory", "--model", folder, "--tokens", POSITIONS, "--json"))
    assert small["total"] < 1e9
    assert read_json(run("memory", "--model", folder, "--json")) == small
    refused = run("memory", "--model", folder, "--tokens", 2048)
    assert refused.exit_code == 1
    assert f"context has {POSITIONS} tokens, got 2048" in refused.stderr
    assert run("memory", "--rank", 0).exit_code == 2
