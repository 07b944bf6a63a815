"""linear and linear_grad_input, on every backend, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BLOCK_SIZES,
    DTYPES,
    check_product,
    random,
    random_quantized,
    tables,
    triton_is_interpreted,
)

from gptj_q8 import ops

pytestmark = pytest.mark.usefixtures("each_backend")

# M, N, K. Rows that a block runs across, ends inside of, or covers; one element; long thin ones.
SHAPES = [
    (1, 1, 1),
    (1, 7, 33),
    (3, 5, 32),
    (2, 65, 100),
    (8, 64, 256),
    (17, 130, 257),
    (1, 3, 4500),
    (1, 11, 4096),
    (2, 13, 256),
    (4, 9, 4352),
    (33, 1030, 64),
    (70, 96, 512),
    (200, 48, 1000),
]
if triton_is_interpreted():  # it takes seconds for the others; long rows are in (4, 9, 4352)
    SHORTER = {(1, 3, 4500): (1, 3, 1100), (1, 11, 4096): (1, 120, 512)}
    SHAPES = [SHORTER.get(shape, shape) for shape in SHAPES]
    SHAPES = [(m, n, k) for m, n, k in SHAPES if n * k < 64_000 and m * n * k < 4_000_000]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_linear(
    m: int, n: int, k: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    for codebook in tables(m + block_size // 32):
        w = random_quantized(n, k, block_size, codebook).to(device)
        x = random(m, k, dtype=dtype, device=device)
        y = ops.linear(x, *w.parts, None, block_size)
        check_product(y, F.linear(x, w.truth.to(dtype)), x.double() @ w.truth.T)
        assert torch.equal(y, ops.linear(x, *w.parts, None, block_size)), "two calls differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 4])
def test_long_sums_of_few_columns(m: int, dtype: torch.dtype, device: torch.device) -> None:
    """On a GPU several programs share one; see test_triton.py."""
    w = random_quantized(3, 32768, 256, "gaussian").to(device)
    x = random(m, 32768, dtype=dtype, device=device)
    bias = torch.tensor([1.0, -2.0, 3.0], device=device)
    y = ops.linear(x, *w.parts, bias, 256)
    truth = F.linear(x.double(), w.truth, bias.double())
    check_product(y, F.linear(x, w.truth.to(dtype), bias.to(dtype)), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 3, 6, 40])
def test_linear_passes_infinities_and_nans_on(
    m: int, dtype: torch.dtype, device: torch.device
) -> None:
    for codebook in tables(m):
        w = random_quantized(16, 256, 64, codebook).to(device)
        x = random(m, 256, dtype=dtype, device=device)
        x[0, 3], x[-1, 70] = torch.inf, -torch.inf
        if m > 1:
            x[1, 5] = torch.nan
        # A kernel may round w to x's dtype, and what becomes 0 makes NaN of an Inf.
        n = (w.truth[:, [3, 70]].abs() > 1e-6).all(dim=1)
        y = ops.linear(x, *w.parts, None, 64)[:, n].double()
        truth = x.double() @ w.truth[n].T
        assert n.any()
        assert torch.equal(y.isnan(), truth.isnan())
        assert torch.equal(y.isinf() * y.sign(), truth.isinf() * truth.sign())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 65, 100), (40, 33, 64)])
def test_linear_adds_the_bias_before_the_one_rounding(
    m: int, n: int, k: int, bias_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    """With numbers whose sums float32 holds exactly, y is the exact sum rounded once."""
    table = torch.arange(-128, 128).div(128).to(device)  # 8 bits: exact in every dtype
    codes = torch.arange(n * k, device=device).mul(37).to(torch.uint8).view(n, k)
    absmax = 2.0 ** (torch.arange(-(-n * k // 64), device=device) % 3)
    w = table.double()[codes.long()] * absmax.double().repeat_interleave(64)[: n * k].view(n, k)
    x = torch.randint(-1, 2, (m, k), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    bias = (torch.arange(n, device=device) * 1.37 - 40).to(bias_dtype)
    bias = (bias * 1024).round() / 1024
    y = ops.linear(x, codes, absmax, table, bias, 64)
    assert torch.equal(y, (x.double() @ w.T + bias.double()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_linear_grad_input(
    m: int, n: int, k: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    for codebook in tables(m + block_size // 32):
        w = random_quantized(n, k, block_size, codebook).to(device)
        dy = random(m, n, dtype=dtype, device=device)
        dx = ops.linear_grad_input(dy, *w.parts, block_size)
        check_product(dx, dy @ w.truth.to(dtype), dy.double() @ w.truth)
        assert torch.equal(dx, ops.linear_grad_input(dy, *w.parts, block_size)), "two calls differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_takes_any_leading_dimensions(dtype: torch.dtype, device: torch.device) -> None:
    w = random_quantized(9, 40, 32).to(device)
    x = random(2, 3, 5, 40, dtype=dtype, device=device)
    y = ops.linear(x, *w.parts, None, 32)
    assert y.shape == (2, 3, 5, 9)
    assert torch.equal(y.view(30, 9), ops.linear(x.view(30, 40), *w.parts, None, 32))
    assert ops.linear(x[0, 0, 0], *w.parts, None, 32).shape == (9,)
