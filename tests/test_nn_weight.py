"""The weight of an 8-bit module: decoded only where it is computed with, and read-only."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import decodes, embedding, linear
from torch import Tensor, nn

from gptj_q8.nn.weight import LazyWeight


def test_the_weight_answers_without_decoding() -> None:
    module = linear(torch.bfloat16)[1]
    with decodes() as calls:
        weight = module.weight
        assert (weight.shape, weight.dtype, weight.device) == (
            (70, 100),
            torch.bfloat16,
            module.codes.device,
        )
        assert not weight.requires_grad
        assert not weight.data.detach().requires_grad
        assert (weight.numel(), weight.dim(), weight.stride(), len(weight)) == (
            7000,
            2,
            (100, 1),
            70,
        )
        assert "LazyWeight" in repr(weight)
        weight.requires_grad = False
        weight.requires_grad_(False)
        weight.grad = None
    assert not calls


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w + 0,
        lambda w: w.clone(),
        lambda w: w.T.T,
        lambda w: w[:],
        lambda w: w.float(),
        lambda w: torch.cat([w]),
        lambda w: torch.from_numpy(w.numpy().copy()),
        lambda w: torch.tensor(w.tolist()),
        lambda w: copy.deepcopy(w),
        lambda w: pickle.loads(pickle.dumps(w)),
        lambda w: F.linear(torch.eye(100), w).T,
        lambda w: F.embedding(torch.arange(70), w),
        lambda w: torch.stack(list(w.unbind())),
    ],
)
def test_the_weight_decodes_once_when_read(read: Any) -> None:
    module = linear()[1]
    with decodes() as calls:
        assert torch.equal(read(module.weight), module.dequantize())
    assert len(calls) == 2, "once for the weight, once for dequantize()"


def test_gradients_pass_through_the_weight() -> None:
    module, x = linear()[1], torch.randn(5, 100, requires_grad=True)
    F.linear(x, module.weight, module.bias).sum().backward()
    torch.testing.assert_close(x.grad, module.dequantize().sum(0).expand(5, 100))


OTHER = torch.zeros(70, 100)
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "copy_": lambda w: w.copy_(OTHER),
    "+=": lambda w: w.__iadd__(1),
    "[]=": lambda w: w.__setitem__(0, 1.0),
    ".data=": lambda w: setattr(w, "data", OTHER),
    ".data.copy_": lambda w: w.data.copy_(OTHER),
    ".data[]=": lambda w: w.data.__setitem__(0, 1.0),
    ".grad=": lambda w: setattr(w, "grad", OTHER),
    "out=": lambda w: torch.add(OTHER, 1, out=w),
    "detach().mul_": lambda w: w.detach().mul_(2),
    "t().copy_": lambda w: w.t().copy_(OTHER.t()),
    "T[]=": lambda w: w.T.__setitem__(0, 1.0),
    "[0].zero_": lambda w: w[0].zero_(),
    "view(-1)[]=": lambda w: w.view(-1).__setitem__(0, 1.0),
    "chunk": lambda w: w.chunk(2)[0].zero_(),
    "unbind": lambda w: w.unbind()[0].zero_(),
    "contiguous().zero_": lambda w: w.contiguous().zero_(),
    "same to().zero_": lambda w: w.to(torch.float32).zero_(),
    "nn.init": lambda w: nn.init.normal_(w),
    "foreach": lambda w: torch._foreach_add_([w], 1),
    "index_put_": lambda w: w.index_put_((torch.tensor([0]),), torch.tensor([1.0])),
    "set_": lambda w: w.set_(OTHER),
    "resize_": lambda w: w.resize_(3),
    "apply_": lambda w: w.apply_(lambda value: value),
    "numpy": lambda w: w.numpy().fill(0),
    "storage": lambda w: w.untyped_storage().fill_(0),
    "data_ptr": lambda w: w.data_ptr(),
    "share_memory_": lambda w: w.share_memory_(),
    "requires_grad_": lambda w: w.requires_grad_(),
    ".requires_grad=": lambda w: setattr(w, "requires_grad", True),
    "max_norm": lambda w: F.embedding(torch.tensor([1]), w, max_norm=0.1),
    "optimizer": lambda w: torch.optim.SGD([nn.Parameter(w)], lr=1.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changing_the_weight_raises(change: Callable[[Tensor], Any]) -> None:
    module = linear()[1]
    weight = module.weight
    before = module.dequantize()
    with pytest.raises((RuntimeError, ValueError), match="read-only"):
        change(weight)
    assert torch.equal(weight + 0, before)


def test_assigning_a_weight_raises() -> None:
    module = linear()[1]
    with pytest.raises(AttributeError, match=r"Q8Linear\.weight is read-only"):
        module.weight = OTHER
    with pytest.raises(AttributeError, match=r"Q8Linear\.weight is read-only"):
        module.weight = nn.Parameter(OTHER)
    with pytest.raises(RuntimeError, match="cannot be initialized, only loaded or quantized"):
        module.reset_parameters()


def test_a_compiled_function_may_read_the_weight() -> None:
    module, x = linear()[1], torch.randn(5, 100)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: module(x) + F.linear(x, module.weight), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), module(x) + F.linear(x, module.dequantize()))


def test_peft_adds_adapters_without_decoding() -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential()
    model.add_module("proj", linear()[1])
    model.add_module("wte", embedding()[1])
    config = peft.LoraConfig(r=4, target_modules=["proj", "wte"])
    with decodes() as calls:
        adapted = peft.get_peft_model(model, config)
    assert not calls
    assert isinstance(adapted.base_model.model.proj.weight, LazyWeight)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(names) == 4
    assert all("lora_" in name for name in names)
