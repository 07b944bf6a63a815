"""The ops as PyTorch's: gradients, compiling, autocast; strided, empty and odd arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    TABLES,
    adam_state,
    check_product,
    random,
    random_quantized,
    relative_error,
)
from torch import Tensor
from torch.library import opcheck

from gptj_q8 import ops

pytestmark = pytest.mark.usefixtures("each_backend")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_expanded_inputs(dtype: torch.dtype, device: torch.device) -> None:
    w = random_quantized(34, 66, 64).to(device)
    x = random(66, 5, dtype=dtype, device=device).T
    expected = ops.linear(x.contiguous(), *w.parts, None, 64)
    assert torch.equal(ops.linear(x, *w.parts, None, 64), expected)
    row = random(1, 66, dtype=dtype, device=device).expand(4, 66)
    expected = ops.linear(row.contiguous(), *w.parts, None, 64)
    assert torch.equal(ops.linear(row, *w.parts, None, 64), expected)
    offset = random(5 * 66 + 1, dtype=dtype, device=device)[1:].view(5, 66)  # not 16-byte aligned
    expected = ops.linear(offset.clone(), *w.parts, None, 64)
    assert torch.equal(ops.linear(offset, *w.parts, None, 64), expected)

    codes = torch.empty(34 * 66 + 1, dtype=torch.uint8, device=device)[1:].view(34, 66)
    codes.copy_(w.codes)
    assert torch.equal(
        ops.linear(row, codes, w.absmax, w.codebook, None, 64)[0],
        ops.linear(row, *w.parts, None, 64)[0],
    )
    strided = torch.empty(66, 34, dtype=torch.uint8, device=device).T
    strided.copy_(w.codes)
    decoded = ops.dequantize(strided, w.absmax, w.codebook, 64, dtype)
    assert torch.equal(decoded, ops.dequantize(*w.parts, 64, dtype))

    weight = random(40, 70, dtype=dtype, device=device).T
    for actual, expected in zip(
        ops.quantize(weight, w.codebook, 32),
        ops.quantize(weight.contiguous(), w.codebook, 32),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_empty_tensors(device: torch.device) -> None:
    table = TABLES["dynamic"]().to(device)
    codes, absmax = ops.quantize(torch.empty(0, 5, device=device), table, 32)
    assert codes.shape == (0, 5)
    assert absmax.shape == (0,)
    assert (ops.histogram(torch.empty(0, device=device), 32, 8) == 0).all()
    assert ops.dequantize(codes, absmax, table, 32, torch.float16).shape == (0, 5)
    w, bias = random_quantized(6, 7, 32).to(device), torch.ones(6, device=device)
    assert ops.linear(torch.empty(0, 7, device=device), *w.parts, bias, 32).shape == (0, 6)
    assert ops.linear(torch.empty(3, 5, device=device), codes, absmax, table, None, 32).shape == (
        3,
        0,
    )
    no_columns = torch.empty(6, 0, dtype=torch.uint8, device=device)
    y = ops.linear(torch.empty(3, 0, device=device), no_columns, absmax, table, bias, 32)
    assert torch.equal(y, torch.ones(3, 6, device=device)), "a sum of nothing and the bias"
    dx = ops.linear_grad_input(torch.empty(3, 0, device=device), codes, absmax, table, 32)
    assert torch.equal(dx, torch.zeros(3, 5, device=device))
    no_ids = torch.empty(2, 0, dtype=torch.int64, device=device)
    assert ops.embedding(no_ids, *w.parts, 32, torch.bfloat16).shape == (2, 0, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_takes_tables_in_any_order_without_a_zero(
    dtype: torch.dtype, device: torch.device
) -> None:
    """As old checkpoints may hold them; `quantize` alone asks for order and a 0."""
    n, k, block_size = 65, 300, 64
    w = random_quantized(n, k, block_size, "arbitrary")
    table = torch.linspace(-1, 1, 256)[
        torch.randperm(256, generator=torch.Generator().manual_seed(0))
    ]
    scales = w.absmax.repeat_interleave(block_size)[: n * k].view(n, k)
    truth = (table[w.codes.long()] * scales).double().to(device)
    parts = [part.to(device) for part in (w.codes, w.absmax, table)]
    assert torch.equal(ops.dequantize(*parts, block_size, dtype), truth.float().to(dtype))
    for m in (1, 5, 70):
        x, dy = random(m, k, dtype=dtype, device=device), random(m, n, dtype=dtype, device=device)
        y = ops.linear(x, *parts, None, block_size)
        dx = ops.linear_grad_input(dy, *parts, block_size)
        check_product(y, F.linear(x, truth.to(dtype)), x.double() @ truth.T)
        check_product(dx, dy @ truth.to(dtype), dy.double() @ truth)


def test_default_dtype_and_autocast_change_no_bit(device: torch.device) -> None:
    w = random_quantized(64, 96, 64).to(device)
    weight = random(40, 70, dtype=torch.float32, device=device)
    x, dy = (random(9, k, dtype=torch.float16, device=device) for k in (96, 64))

    def results() -> list[Tensor]:
        return [
            *ops.quantize(weight, w.codebook, 32),
            ops.histogram(weight, 32, 64),
            ops.dequantize(*w.parts, 64, torch.float32),
            ops.linear_grad_input(dy, *w.parts, 64),
            ops.linear(x.to(torch.bfloat16), *w.parts, None, 64),
        ]

    expected = results()
    before = torch.get_default_dtype()
    for default in (torch.float16, torch.float64):
        torch.set_default_dtype(default)
        try:
            found = results()
        finally:
            torch.set_default_dtype(before)
        assert all(map(torch.equal, found, expected))
        assert [each.dtype for each in found] == [each.dtype for each in expected]
    with torch.autocast(device.type, torch.bfloat16):
        assert all(map(torch.equal, results(), expected))


@pytest.mark.filterwarnings("ignore:Input .* is not a double precision")
def test_gradients(device: torch.device) -> None:
    w = random_quantized(4, 12, 32).to(device)
    x = random(2, 12, dtype=torch.float32, device=device).requires_grad_()
    bias = random(4, dtype=torch.float32, device=device).requires_grad_()

    def linear(x: Tensor, bias: Tensor) -> Tensor:
        return ops.linear(x, *w.parts, bias, 32)

    # The op is linear, so a wide step costs no accuracy and drowns float32's rounding.
    settings = {"eps": 0.1, "atol": 1e-3, "rtol": 1e-3}
    assert torch.autograd.gradcheck(linear, (x, bias), **settings)
    assert torch.autograd.gradgradcheck(lambda x: linear(x, bias) ** 2, (x,), **settings)


def test_forward_mode_is_refused(device: torch.device) -> None:
    w = random_quantized(4, 12, 32).to(device)
    x = random(2, 12, dtype=torch.float32, device=device)
    for function, argument in (
        (lambda x: ops.linear(x, *w.parts, None, 32), x),
        (lambda dy: ops.linear_grad_input(dy, *w.parts, 32), x[:, :4]),
    ):
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            torch.func.jvp(function, (argument,), (argument,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_equal_pytorchs_on_the_decoded_weight(
    dtype: torch.dtype, device: torch.device
) -> None:
    w = random_quantized(30, 70, 64).to(device)
    x = random(2, 5, 70, dtype=dtype, device=device).requires_grad_()
    bias = random(30, dtype=torch.float32, device=device).requires_grad_()
    dy = random(2, 5, 30, dtype=dtype, device=device, seed=3)
    dx, dbias = torch.autograd.grad(ops.linear(x, *w.parts, bias, 64), (x, bias), dy)
    check_product(dx, dy @ w.truth.to(dtype), dy.double() @ w.truth)
    assert dbias.dtype == torch.float32
    assert relative_error(dbias, dy.double().sum((0, 1))) < 1e-6
    (dbias,) = torch.autograd.grad(ops.linear(x[0, 0], *w.parts, bias, 64), (bias,), dy[0, 0])
    assert torch.equal(dbias, dy[0, 0].float())


def test_opcheck(device: torch.device) -> None:
    w = random_quantized(6, 40, 32).to(device)
    x = random(3, 40, dtype=torch.float32, device=device).requires_grad_()
    bias = random(6, dtype=torch.float32, device=device).requires_grad_()
    weight, ids = random(5, 40, dtype=torch.float16, device=device), torch.tensor([[1, 2]])
    state, tables = adam_state(200, 64, device)
    numbers = (1e-3, 0.9, 0.999, 1e-8, 0.0, 1, 64)
    q8 = torch.ops.gptj_q8
    opcheck(q8.quantize.default, (weight, w.codebook, 32))
    opcheck(q8.histogram.default, (weight, 32, 256))
    opcheck(q8.dequantize.default, (*w.parts, 32, torch.bfloat16))
    opcheck(q8.linear.default, (x, *w.parts, bias, 32))
    dy = random(2, 3, 6, dtype=torch.float32, device=device).requires_grad_()
    opcheck(q8.linear_grad_input.default, (dy, *w.parts, 32))
    opcheck(q8.embedding.default, (ids.to(device), *w.parts, 32, torch.float32))
    opcheck(q8.adam_step_.default, (weight.clone(), weight, *state, *tables, *numbers))


def test_compile_with_a_changing_batch(device: torch.device) -> None:
    w = random_quantized(30, 64, 64).to(device)
    bias = random(30, dtype=torch.float32, device=device)
    ids = torch.arange(30, device=device)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(x: Tensor, ids: Tensor) -> Tensor:
        rows = ops.embedding(ids, *w.parts, 64, x.dtype)
        return ops.linear(x + rows.mean(), *w.parts, bias, 64).relu()

    for m in (1, 2, 7, 64):
        x = random(m, 64, dtype=torch.float32, device=device).requires_grad_()
        rows = w.truth.float()[ids[:m]]
        expected = F.linear(x + rows.mean(), w.truth.float(), bias).relu()
        y = run(x, ids[:m])
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        (dx,) = torch.autograd.grad(y.sum(), x)
        (expected_dx,) = torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(dx, expected_dx, rtol=1e-4, atol=1e-4)
