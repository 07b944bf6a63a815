"""The product of an 8-bit layer with adapters: its numbers, its gradients, its memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptj_q8 import Q8Linear, ops
from gptj_q8.nn.adapter import Adapter, lora_linear

K, N, R = 96, 130, 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The relative error of one rounding, times a few.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    torch.manual_seed(0)


def make_layer(dtype: torch.dtype, device: torch.device, bias: bool = True) -> Q8Linear:
    float_layer = nn.Linear(K, N, bias=bias)
    return Q8Linear.from_float(float_layer, block_size=64).to(device=device, dtype=dtype)


def make_adapter(
    device: torch.device, dtype: torch.dtype = torch.float32, scale: float = 1.7, dropout: float = 0
) -> Adapter:
    down = torch.randn(R, K, dtype=dtype, device=device, requires_grad=True)
    up = torch.randn(N, R, dtype=dtype, device=device, requires_grad=True)
    return Adapter(down, up, scale, dropout)


def decoded(layer: Q8Linear) -> Tensor:
    parts = layer.codes, layer.absmax, layer.codebook
    return ops.dequantize(*parts, layer.block_size, torch.float32).double()


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a.double() - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("rows", [(5, 7), (1,), (), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_those_of_float64(
    dtype: torch.dtype, rows: tuple[int, ...], device: torch.device
) -> None:
    layer = make_layer(dtype, device)
    adapters = [make_adapter(device), make_adapter(device, torch.bfloat16, scale=-0.3)]
    x = torch.randn(*rows, K, dtype=dtype, device=device, requires_grad=True)
    dy = torch.randn(*rows, N, dtype=dtype, device=device)
    y = lora_linear(x, layer, adapters, layer.bias)
    assert y.dtype == dtype
    assert y.shape == (*rows, N)

    inputs = [x, layer.bias, *(t for a in adapters for t in (a.down, a.up))]
    grads = torch.autograd.grad(y, inputs, dy)
    xd, bias, *factors = [exact(tensor) for tensor in inputs]
    weight = decoded(layer)
    for i, adapter in enumerate(adapters):
        weight = weight + adapter.scale * factors[2 * i + 1] @ factors[2 * i]
    expected = xd @ weight.T + bias
    assert relative(y, expected) < BOUNDS[dtype]
    right = torch.autograd.grad(expected, [xd, bias, *factors], dy.double())
    for tensor, grad, want in zip(inputs, grads, right, strict=True):
        assert grad.dtype == tensor.dtype
        assert relative(grad, want) < max(BOUNDS[dtype], BOUNDS[tensor.dtype])


@pytest.mark.parametrize("dropout", [0.3, 1.0])
def test_dropout_drops_the_same_elements_backwards(dropout: float, device: torch.device) -> None:
    """With the product linear in x, y tells which elements were kept."""
    layer = make_layer(torch.float32, device)
    adapter = Adapter(
        torch.eye(K, device=device, requires_grad=True),
        torch.randn(N, K, device=device, requires_grad=True),
        0.5,
        dropout,
    )
    x = torch.randn(6, K, device=device, requires_grad=True)
    y = lora_linear(x, layer, [adapter], layer.bias)
    plain = layer(x)
    seen = torch.linalg.lstsq(adapter.up.double(), (y - plain).double().T / 0.5).solution.T
    factor = seen / x.double()  # 0, or 1 / (1 - dropout)
    kept = (factor > 0.5).double()
    gain = 1 / (1 - dropout) if dropout < 1 else 0.0
    assert torch.allclose(factor, kept * gain, atol=1e-3)
    assert kept.mean() == pytest.approx(1 - dropout, abs=0.1)

    dy = torch.randn_like(y)
    dx, d_down, d_up = torch.autograd.grad(y, (x, adapter.down, adapter.up), dy)
    dropped = kept * gain
    weight = decoded(layer)
    du = 0.5 * dy.double() @ adapter.up.double()
    assert relative(dx, dy.double() @ weight + du * dropped) < 1e-5
    if dropout < 1:
        assert relative(d_down, du.T @ (x.double() * dropped)) < 1e-5
        assert relative(d_up, 0.5 * dy.double().T @ (x.double() * dropped)) < 1e-5
    else:
        assert not d_down.any()
        assert not d_up.any()


def test_only_asked_gradients_are_made(device: torch.device) -> None:
    layer = make_layer(torch.float32, device)
    layer.bias.requires_grad_(False)
    down = torch.randn(R, K, device=device)
    up = torch.randn(N, R, device=device, requires_grad=True)
    x = torch.randn(3, K, device=device)
    with watching() as seen:
        lora_linear(x, layer, [Adapter(down, up, 1.0)], layer.bias).sum().backward()
    assert "gptj_q8.linear_grad_input.default" not in seen.ops
    assert up.grad is not None


class Watch(TorchDispatchMode):
    """Notes the ops called and the tensors of new memory that they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.made: list[Tensor] = []
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.ops.append(str(func))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self.made.append(tensor)
        return result

    def large(self, numel: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [(tuple(t.shape), t.dtype) for t in self.made if t.numel() >= numel]


@contextmanager
def watching() -> Iterator[Watch]:
    with Watch() as watch:
        yield watch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_large_is_made_but_y_and_dx(dtype: torch.dtype, device: torch.device) -> None:
    """No float32 copy of x or y though the adapter is float32, no second y or dx, no weight."""
    layer, tokens = make_layer(dtype, device), 120
    adapters = [make_adapter(device), make_adapter(device)]
    x = torch.randn(tokens, K, dtype=dtype, device=device, requires_grad=True)
    with watching() as forward:
        y = lora_linear(x, layer, adapters, layer.bias)
    assert forward.large(tokens * K) == [((tokens, N), dtype)]
    dy = torch.ones_like(y)
    with watching() as backward:
        y.backward(dy)
    assert backward.large(tokens * K) == [((tokens, K), dtype)]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_backward_keeps_x_itself_and_little_else(dropout: float, device: torch.device) -> None:
    layer, tokens = make_layer(torch.bfloat16, device), 50
    adapter = make_adapter(device, dropout=dropout)
    x = torch.randn(tokens, K, dtype=torch.bfloat16, device=device, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        lora_linear(x, layer, [adapter], layer.bias)
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers(), adapter.down, adapter.up)}
    extra = [tensor for tensor in saved if tensor.data_ptr() not in own]
    assert x.data_ptr() in {tensor.data_ptr() for tensor in extra}
    others = {(*t.shape, t.dtype) for t in extra if t.data_ptr() != x.data_ptr()}
    expected = {(tokens, R, torch.bfloat16)}
    if dropout:
        expected.add((tokens, K, torch.bool))
    assert others == expected


def test_under_autocast_it_computes_in_16_bits_and_keeps_the_shared_x(device: torch.device) -> None:
    layer = make_layer(torch.float32, device)
    adapter = make_adapter(device)
    x = torch.randn(9, K, device=device, requires_grad=True)
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    )
    with torch.autocast(device.type, torch.bfloat16), hooks:
        y = lora_linear(x, layer, [adapter], layer.bias)
    assert y.dtype == torch.bfloat16
    assert sum(tensor.numel() >= x.numel() and tensor.dtype != torch.uint8 for tensor in saved) <= 3
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved)
    weight = decoded(layer) + 1.7 * adapter.up.double() @ adapter.down.double()
    assert relative(y, x.double() @ weight.T + layer.bias.double()) < BOUNDS[torch.bfloat16]
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.dtype == torch.float32
    assert relative(dx, torch.ones(9, N, dtype=torch.float64) @ weight) < BOUNDS[torch.bfloat16]


def test_the_second_derivative_is_refused(device: torch.device) -> None:
    layer, adapter = make_layer(torch.float32, device), make_adapter(device)
    x = torch.randn(3, K, device=device, requires_grad=True)
    y = lora_linear(x, layer, [adapter], layer.bias)
    (grad,) = torch.autograd.grad(y.square().sum(), adapter.down, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_it_compiles_whole_with_a_changing_batch(dropout: float, device: torch.device) -> None:
    layer = make_layer(torch.float32, device)
    adapter = make_adapter(device, dropout=dropout)
    compiled = torch.compile(
        lambda x: lora_linear(x, layer, [adapter], layer.bias), fullgraph=True, dynamic=True
    )
    for tokens in (3, 8):
        x = torch.randn(tokens, K, device=device, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        if not dropout:
            assert relative(y, lora_linear(x, layer, [adapter], layer.bias).double()) < 1e-5
        assert x.grad is not None
        assert adapter.down.grad is not None
