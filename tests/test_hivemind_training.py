"""Fine-tuning through the old API: gradients, checkpointing and adapters, as the old code has."""

from __future__ import annotations

import warnings
from typing import Any

import hivemind_layout as old
import pytest
import torch
import torch.nn.functional as F
from frozen import adapters_of, frozen_modules
from tiny import IDS, gptj, logits, relative
from torch import nn

from gptj_q8.hivemind import FrozenBNBLinear, GPTJForCausalLM, add_adapters

pytestmark = pytest.mark.usefixtures("one_thread")


def batch_loss(model) -> torch.Tensor:
    out = model(IDS)
    return F.cross_entropy(out.logits[:, :-1].flatten(0, -2), IDS[:, 1:].flatten())


def checkpoint(model, **kwargs: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated since Transformers 5.23
        model.gradient_checkpointing_enable(**kwargs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("where", ["everywhere", "attention"])
def test_gradients(tmp_path, training, checkpointing, where):
    """Those of the adapters are the old code's, whatever the mode and wherever they are."""
    kind = "hivemind" if where == "everywhere" else "attention"
    state = old.state_dict(adapters=kind)
    model = GPTJForCausalLM.from_pretrained(old.write(tmp_path, state))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".adapter." in name)
    model.train(training)
    if checkpointing:
        checkpoint(model, gradient_checkpointing_kwargs=checkpointing)
    calls = count_forwards(model)
    batch_loss(model).backward()
    assert calls["blocks"] == (4 if checkpointing else 2)  # of two blocks
    assert {module.training for module in model.modules()} == {training}
    expected = expected_gradients(state)
    found = adapters_of(model)
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.grad is not None, name
        assert relative(parameter.grad, expected[name]) < 1e-4, name


def count_forwards(model) -> dict[str, int]:
    calls = {"blocks": 0}

    def count(*_) -> None:
        calls["blocks"] += 1

    for block in model.transformer.h:
        block.mlp.register_forward_pre_hook(count)
    return calls


def expected_gradients(state) -> dict[str, torch.Tensor]:
    leaves = {
        name: tensor.double().requires_grad_()
        for name, tensor in state.items()
        if ".adapter." in name
    }
    batch_loss(old.old_model({**state, **leaves})).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def test_without_gradients_there_is_no_checkpointing(old_dir):
    model = GPTJForCausalLM.from_pretrained(old_dir)
    expected = model.generate(IDS, max_new_tokens=5, do_sample=False)
    checkpoint(model)
    calls = count_forwards(model)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), expected)
    assert calls["blocks"] == 10  # two blocks, five steps: the cache is in use


@pytest.mark.parametrize(
    "optimizer", ["gptj_q8.optim.Adam8bit", "bitsandbytes.optim.Adam8bit", "torch.optim.Adam"]
)
def test_the_usual_loop(old_dir, optimizer):
    """As in the notebook: no .train(), autocast around it all, biases and norms train too."""
    home, _, kind = optimizer.rpartition(".")
    module = pytest.importorskip(home, reason=f"{home} is not here")
    model = GPTJForCausalLM.from_pretrained(old_dir, low_cpu_mem_usage=True)
    before = logits(model)
    add_adapters(model)
    assert torch.equal(logits(model), before)
    checkpoint(model)
    frozen = {n: b.clone() for n, b in model.named_buffers()}
    optimizer = getattr(module, kind)(model.parameters(), lr=2e-2)
    losses = []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(20):
            out = model.forward(input_ids=IDS, attention_mask=torch.ones_like(IDS))
            loss = F.cross_entropy(
                out.logits[:, :-1, :].flatten(0, -2), IDS[:, 1:].flatten(), reduction="mean"
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]  # it learns the one sentence
    assert all(torch.equal(b, frozen[n]) for n, b in model.named_buffers())
    changed = {
        n for n, p in adapters_of(model).items() if n.endswith("1.weight") and p.abs().max() > 0
    }
    assert len(changed) == 14


def test_what_add_adapters_makes(old_dir):
    model = GPTJForCausalLM.from_pretrained(old_dir).bfloat16()
    add_adapters(model)
    kinds = {
        n: [type(m).__name__ for m in frozen.adapter] for n, frozen in frozen_modules(model).items()
    }
    assert kinds["transformer.wte"] == ["Embedding", "Linear"]
    assert kinds["lm_head"] == ["Linear", "Linear"]
    assert {p.dtype for p in adapters_of(model).values()} == {torch.float32}
    assert tuple(model.lm_head.adapter[0].weight.shape) == (16, 48)
    assert logits(model).dtype == torch.bfloat16
    assert not any(p.abs().max() for n, p in adapters_of(model).items() if n.endswith("1.weight"))
    add_adapters(model, adapter_dim=4, p=0.1)
    assert [type(m).__name__ for m in model.lm_head.adapter] == ["Linear", "Dropout", "Linear"]
    assert model.lm_head.adapter[1].p == 0.1
    assert not model.lm_head.adapter.training
    with pytest.raises(ValueError, match="adapter_dim must be positive, got 0"):
        add_adapters(model, 0)
    with pytest.raises(ValueError, match="no FrozenBNB modules"):
        add_adapters(gptj())


def test_adapters_of_ones_own(old_dir):
    """As users put them in: by hand, and on attention only."""
    model = GPTJForCausalLM.from_pretrained(old_dir)
    for name, module in model.named_modules():
        if isinstance(module, FrozenBNBLinear) and "attn" in name:
            module.adapter = nn.Sequential(
                nn.Linear(module.in_features, 2, bias=False),
                nn.Linear(2, module.out_features, bias=False),
            )
    assert len(adapters_of(model)) == 16
    batch_loss(model).backward()
    assert all(p.grad is not None for p in adapters_of(model).values())
