"""The claim rule, what it says when it falls back, and what autocast hands to a backend."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import random_quantized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptj_q8 import backends, ops
from gptj_q8.backends import reference

W = random_quantized(8, 64, 64)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if no compiled library were there."""
    monkeypatch.setattr(backends.load("cpu"), "unavailable", lambda: "it is not built")
    for cached in (backends.unavailable, backends._say_slow):
        cached.cache_clear()
    yield
    for cached in (backends.unavailable, backends._say_slow):
        cached.cache_clear()


def test_without_kernels_the_reference_serves_and_says_so_once(without_kernels: None) -> None:
    x = torch.ones(2, 64)
    with pytest.warns(UserWarning, match=r"plain PyTorch on cpu, slowly \(cpu: it is not built\)"):
        y = ops.linear(x, *W.parts, None, 64)
    torch.testing.assert_close(y.double(), x.double() @ W.truth.T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.linear(x, *W.parts, None, 64)
        ops.dequantize(*W.parts, 64, torch.float32)


def test_use_forces_a_backend_and_ends() -> None:
    before = backends.serving("linear", "cpu")
    with backends.use("reference"):
        assert backends.serving("linear", "cpu") == "reference"
        assert backends.serving("linear", "cuda") == "reference"
        with pytest.raises(NotImplementedError, match="nonsense: the backend reference lacks it"):
            backends.serving("nonsense", "cpu")
    assert backends.serving("linear", "cpu") == before


def test_use_refuses_what_it_cannot_do(without_kernels: None) -> None:
    missing = "backends: cpu is unavailable: it is not built"
    with pytest.raises(RuntimeError, match=missing), backends.use("cpu"):
        pass
    with pytest.raises(ValueError, match="no backend 'gpu', there are"), backends.use("gpu"):
        pass


def test_every_backend_knows_nothing_but_ops() -> None:
    for name in backends.NAMES:
        module = backends.load(name)
        assert callable(module.unavailable)
        offered = [op for op in ops.SCHEMAS if hasattr(module, op)]
        assert offered or backends.unavailable(name), f"{name} offers no op"
    assert all(hasattr(reference, op) for op in ops.SCHEMAS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_x_and_bias_only(dtype: torch.dtype, monkeypatch: Any) -> None:
    seen = []
    original = backends.call

    def spy(op: str, device_type: str, args: Any) -> Any:
        seen.append([arg.dtype for arg in args if isinstance(arg, torch.Tensor)])
        return original(op, device_type, args)

    monkeypatch.setattr(backends, "call", spy)
    x, bias = torch.ones(2, 64, requires_grad=True), torch.ones(8, requires_grad=True)

    def run(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, *W.parts, bias, 64)

    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        seen.clear()
        with torch.autocast("cpu", dtype):
            y = function(x, bias)
        assert y.dtype == dtype
        assert seen == [[dtype, torch.uint8, torch.float32, torch.float32, dtype]]
        dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
        assert (dx.dtype, dbias.dtype) == (torch.float32, torch.float32)
        assert seen[1] == [dtype, torch.uint8, torch.float32, torch.float32]
        torch.testing.assert_close(dx[0].double(), W.truth.sum(0), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bad", [-1, 8])
def test_the_reference_itself_refuses_ids_out_of_range(bad: int) -> None:
    """On a GPU nobody else does: looking at the ids would wait for it."""
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        reference.embedding(torch.tensor([bad]), *W.parts, 64, torch.float32)


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not func.is_view:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return result


def test_the_reference_needs_a_few_megabytes_at_a_time() -> None:
    """Beyond its outputs (here at most 2 MB): the decoded weight alone would be 16 MB."""
    w, thin = random_quantized(1024, 4096, 256), random_quantized(8192, 32, 256)
    x, dy = torch.ones(64, 4096, dtype=torch.float16), torch.ones(64, 1024, dtype=torch.float16)
    weight = w.truth.half()
    for call in (
        lambda: reference.linear(x, *w.parts, None, 256),
        lambda: reference.linear(x.view(-1, 32)[:128], *thin.parts, None, 256),
        lambda: reference.linear_grad_input(dy, *w.parts, 256),
        lambda: reference.embedding(torch.arange(64), *w.parts, 256, torch.float16),
        lambda: reference.histogram(weight, 256, 1 << 16),
    ):
        with LargestTensor() as mode:
            call()
        assert 0 < mode.largest <= 1 << 21
