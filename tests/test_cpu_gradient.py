"""The gradient on the CPU where dy takes the scales, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, NEEDS_CPU_KERNELS, TABLES, check_product, random_quantized, relative_error

from gptj_q8.backends import cpu

pytestmark = [pytest.mark.usefixtures("one_thread"), NEEDS_CPU_KERNELS]


@pytest.mark.parametrize("m", [1, 2, 4, 5])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_times_scale_may_exceed_what_floats_hold(
    m: int, block_size: int, dtype: torch.dtype, isa: str
) -> None:
    """A level of 0 stays 0 and a small one stays finite."""
    table = TABLES["gaussian"]().clone()
    table[128] = 0.0
    codes = torch.full((3, 128), 128, dtype=torch.uint8)
    codes[:, 5] = 129
    absmax = torch.full((3 * 128 // block_size,), 3e38)
    dy = torch.tensor([[2.0, 3.0, -4.0]]).expand(m, 3).contiguous().to(dtype)
    dx = cpu.linear_grad_input(dy, codes, absmax, table, block_size)
    truth = dy.double() @ (table[codes.long()].double() * absmax[0].double())
    assert 0 < truth[0, 5].abs() < 1e37
    assert (dx[:, torch.arange(128) != 5] == 0).all()
    assert relative_error(dx, truth) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "block_size"),
    [
        (5, 1, 128, 128),
        (16, 257, 256, 256),
        (17, 70, 384, 128),
        (48, 517, 768, 256),
        (49, 512, 1024, 4096),
        (529, 545, 256, 1024),
    ],
)
def test_gradient_of_columns_with_one_scale_in_every_row(
    m: int, n: int, k: int, block_size: int, dtype: torch.dtype, isa: str
) -> None:
    w = random_quantized(n, k, block_size, "gaussian")
    dy = torch.randn(m, n, generator=torch.Generator().manual_seed(m)).to(dtype)
    dx = cpu.linear_grad_input(dy, *w.parts, block_size)
    truth = dy.double() @ w.truth
    check_product(dx, dy @ w.truth.to(dtype), truth)
    # Two parts of bfloat16 would give 2e-6.
    assert dtype != torch.float32 or relative_error(dx, truth) < 1e-6
    for row in (0, m - 1):
        plain = dy[row] @ w.truth.to(dtype)
        check_product(dx[row], plain, truth[row])
    # What is not finite stays in its row, in its columns.
    broken = w.absmax.clone()
    broken[-1] = torch.nan
    found = cpu.linear_grad_input(dy, w.codes, broken, w.codebook, block_size).isnan()
    blocks = torch.arange(n * k).view(n, k) // block_size
    expected = (blocks == blocks[-1, -1]).any(0).expand(m, k)
    assert torch.equal(found, expected)
    dy[m // 2, 0] = torch.nan
    found = cpu.linear_grad_input(dy, *w.parts, block_size).isnan()
    assert torch.equal(found, (torch.arange(m) == m // 2).unsqueeze(1).expand(m, k))


@pytest.mark.parametrize("m", [1, 6, 40])
def test_a_gradient_neither_overflows_nor_vanishes_times_its_scale(m: int, isa: str) -> None:
    w = random_quantized(200, 256, 128, "gaussian")
    for size, scale in ((3e38, 1e-6), (1e-37, 1e3), (1e-3, 1e-33), (1e3, 1e33)):
        dy = torch.rand(m, 200, generator=torch.Generator().manual_seed(m)) - 0.5
        dy = (dy + dy.sign() / 2) * size
        dx = cpu.linear_grad_input(dy, w.codes, w.absmax * scale, w.codebook, 128)
        truth = dy.double() @ w.truth * scale
        assert relative_error(dx, truth) < 1e-5
