"""The memory estimate: its parts against a model's own tensors, its command line, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import POSITIONS, read_json, run, save_byte_gptj
from peft import LoraConfig, get_peft_model
from tiny import gpt2, gptj
from torch import Tensor
from transformers import GPTJConfig

from gptj_q8.convert import quantize_
from gptj_q8.memory import Setting, estimate
from gptj_q8.models import RULES
from gptj_q8.models.gptj_modules import save_memory
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


def test_kept_activations_are_what_checkpointing_keeps() -> None:
    model = quantize_(gptj(**SIZES, n_positions=256).bfloat16()).train()
    save_memory(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.zeros(2, 128, dtype=torch.long)
    kept: dict[int, int] = {}
    weights = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, labels=ids)
    found = estimate(model.config, Setting(tokens=128, batch=2)).passing
    # The input of each block and of the last norm, and the gradient of what the head is given.
    large = [size for size in kept.values() if size >= 2 * 128 * 512 * 2]
    assert found["activations kept"] == sum(large)


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
    refused = run("memory", "--model", folder)
    assert refused.exit_code == 1
    assert f"context has {POSITIONS} tokens, got 2048" in refused.stderr
    assert run("memory", "--rank", 0).exit_code == 2
