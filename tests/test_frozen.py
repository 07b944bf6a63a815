"""The modules of the old API, one by one, against float64 products of what they decode to."""

from __future__ import annotations

import hivemind_layout as old
import pytest
import torch
import torch.nn.functional as F
from tiny import IDS, relative
from torch import nn

from gptj_q8.hivemind import (
    DequantizeAndLinear,
    FrozenBNBEmbedding,
    FrozenBNBLinear,
    quantize_blockise_lowmemory,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear(bias, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(100, 70, bias=bias)
    module = FrozenBNBLinear.from_linear(linear)
    assert repr(module) == "FrozenBNBLinear(100, 70)"
    assert (module.in_features, module.out_features, module.adapter) == (100, 70, None)
    assert module.bias is linear.bias
    assert [n for n, _ in module.named_parameters()] == ["bias"] * bias
    x = torch.randn(3, 5, 100, dtype=dtype, requires_grad=True)
    y = module(x)
    weight = old.decode(module.weight, module.absmax, module.code).double()
    expected = F.linear(x.double(), weight, linear.bias.double() if bias else None)
    assert (y.dtype, relative(y, expected) < (1e-5 if dtype == torch.float32 else 0.01)) == (
        dtype,
        True,
    )
    y += 1  # in place, which the old code's output refused
    dy = torch.randn(3, 5, 70)
    y.backward(dy.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    assert relative(x.grad, dy.double() @ weight) < tolerance
    if bias:
        assert relative(linear.bias.grad, dy.double().sum((0, 1))) < tolerance


def test_dequantize_and_linear_is_the_modules_product():
    module = FrozenBNBLinear.from_linear(nn.Linear(64, 32))
    x = torch.randn(2, 64)
    parts = (module.weight, module.absmax, module.code, module.bias)
    assert torch.equal(DequantizeAndLinear.apply(x, *parts), module(x))


def test_embedding():
    torch.manual_seed(0)
    embedding = nn.Embedding(130, 48, dtype=torch.float16)
    module = FrozenBNBEmbedding.from_embedding(embedding)
    assert repr(module) == "FrozenBNBEmbedding(130, 48)"
    rows = old.decode(module.weight, module.absmax, module.code)[IDS]
    assert torch.equal(module(IDS), rows.half())
    assert torch.equal(module.float()(IDS), rows)
    with pytest.raises(IndexError):
        module(torch.tensor([130]))
    with pytest.raises(ValueError, match="max_norm"):
        FrozenBNBEmbedding.from_embedding(nn.Embedding(3, 64, max_norm=1.0))


def test_quantize_blockise_lowmemory():
    torch.manual_seed(0)
    matrix = torch.randn(130, 48)
    codes, (absmax, code) = quantize_blockise_lowmemory(matrix)
    assert (codes.shape, codes.dtype, absmax.shape) == (matrix.shape, torch.uint8, (2,))
    torch.testing.assert_close(code[1:], old.dynamic_map()[1:], rtol=1e-6, atol=0)
    blocks = matrix.flatten().split(4096)
    assert torch.equal(absmax, torch.stack([block.abs().max() for block in blocks]))
    error = (old.decode(codes, absmax, code) - matrix).abs()
    # No level of the map is nearer to any weight than the one taken.
    scale = absmax.repeat_interleave(4096)[: matrix.numel()].view(matrix.shape)
    nearest = (matrix[..., None] - code.double() * scale[..., None]).abs().amin(-1)
    assert torch.allclose(error.double(), nearest, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4096, got 1000"):
        quantize_blockise_lowmemory(matrix, chunk_size=1000)
    with pytest.raises(ValueError, match="1 NaN or Inf"):
        quantize_blockise_lowmemory(matrix.index_fill(0, torch.tensor(3), torch.nan)[3:4, :1])


def test_parts_that_do_not_fit():
    codes, scales, table = torch.zeros(8, 512, dtype=torch.uint8), torch.ones(1), old.dynamic_map()
    FrozenBNBLinear(codes, scales, table)
    for bad in ((codes, torch.ones(2), table), (codes, scales, table[:255])):
        with pytest.raises(ValueError, match="must have"):
            FrozenBNBLinear(*bad)
    with pytest.raises(TypeError, match="codes must be uint8"):
        FrozenBNBLinear(codes.float(), scales, table)
