"""The CUDA kernels on tensors of more than 2^31 elements, on the CPU.

A launch runs its last block only, and the tensors are memory that nothing touches but their ends:
so this takes address space, not gigabytes and hours.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import TABLES
from cuda_emulation import emulator
from test_cuda_products import H100, Gpu, is_good, random, running
from torch import Tensor

from gptj_q8.backends import cuda, reference

BLOCK = 32
END = 4096 + 33
"""Elements at the end that hold something: the last tile of the elementwise kernels, and one more.
"""
NUMEL = 2**32 + END
"""Where an index in 32 bits, with or without a sign, is wrong."""
HUGE = Gpu("huge", 1 << 20, 227, 90)
"""So many multiprocessors that a block of the kernel for a few rows has four or five of w."""
COLUMNS = 4096
ROWS = 2**19 + 9
"""COLUMNS times ROWS is above 2^31, and ROWS is no multiple of a tile."""


@pytest.fixture(autouse=True)
def last_block_only() -> Iterator[None]:
    with emulator().last_block_only():
        yield


def with_end(end: Tensor, numel: int = NUMEL) -> Tensor:
    """`end` behind untouched memory."""
    t = torch.empty(numel, dtype=end.dtype)
    t[-len(end) :] = end[-numel:]
    return t


def codes_and_scales(numel: int, end: int) -> tuple[Tensor, Tensor]:
    """For a weight of so many elements, random in its last ones and in the blocks they are in."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (end,), dtype=torch.uint8, generator=generator)
    scales = torch.rand(end // BLOCK + 2, generator=generator)
    return with_end(codes, numel), with_end(scales, -(-numel // BLOCK))


def decoded(codes: Tensor, absmax: Tensor, end: int) -> Tensor:
    """The last elements of a weight in float64."""
    place = torch.arange(codes.numel() - end, codes.numel())
    table = TABLES["arbitrary"]()
    levels = table[codes.view(-1)[-end:].long()]
    return levels.double() * absmax[place // BLOCK].double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decoding(dtype: torch.dtype) -> None:
    codes, absmax = codes_and_scales(NUMEL, END)
    with running(H100):
        found = cuda.dequantize(codes, absmax, TABLES["arbitrary"](), BLOCK, dtype)
    expected = decoded(codes, absmax, END).float().to(dtype)
    last = NUMEL % 4096
    assert torch.equal(found[-last:], expected[-last:])


def test_encoding_and_counting() -> None:
    values = torch.randn(END, generator=torch.Generator().manual_seed(0)).half()
    last = NUMEL % 4096
    weight, table = with_end(values), TABLES["arbitrary"]()
    with running(H100):
        codes, absmax = cuda.quantize(weight, table, BLOCK)
        counts = cuda.histogram(weight, BLOCK, 1024)
    expected_codes, expected_absmax = reference.quantize(values[-last:], table, BLOCK)
    assert torch.equal(codes[-last:], expected_codes)
    assert torch.equal(absmax[-len(expected_absmax) :], expected_absmax)
    assert torch.equal(counts, reference.histogram(values[-last:], BLOCK, 1024))


def test_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    last = NUMEL % 4096
    ends = [torch.randn(last, generator=generator).half() for _ in range(2)]
    table, positive = TABLES["arbitrary"](), TABLES["arbitrary"]().abs().sort().values
    codes, absmax = reference.quantize(ends[0].float(), table, BLOCK)
    small = [ends[0].clone(), ends[1], codes.clone(), absmax.clone(), codes.clone(), absmax + 1]
    large = [with_end(t, NUMEL if len(t) == last else -(-NUMEL // BLOCK)) for t in small]
    settings = (table, positive, 1e-3, 0.9, 0.999, 1e-8, 0.1, 2, BLOCK)
    with running(H100):
        cuda.adam_step_(*large, *settings)
        cuda.adam_step_(*small, *settings)
    assert not torch.equal(small[0], ends[0])
    for found, expected in zip(large, small, strict=True):
        assert torch.equal(found[-len(expected) :], expected)


def test_rows_of_an_embedding() -> None:
    """Of codes and of results more than 2^31."""
    codes, absmax = codes_and_scales(ROWS * COLUMNS, COLUMNS)
    ids = torch.full((ROWS,), ROWS - 1, dtype=torch.int32)
    with running(H100):
        found = cuda.embedding(
            ids, codes.view(ROWS, COLUMNS), absmax, TABLES["arbitrary"](), BLOCK, torch.float16
        )
    assert torch.equal(found[-1], decoded(codes, absmax, COLUMNS).float().half())


@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS + 1], ids=["fast", "plain"])
@pytest.mark.parametrize(("m", "dtype"), [(1, torch.float32), (9, torch.bfloat16)])
def test_linear(m: int, dtype: torch.dtype, columns: int) -> None:
    codes, absmax = codes_and_scales(ROWS * columns, columns)
    x = random(m, columns, dtype=dtype)
    with running(HUGE if m == 1 and columns == COLUMNS else H100):
        y = cuda.linear(x, codes.view(ROWS, columns), absmax, TABLES["arbitrary"](), None, BLOCK)
    w = decoded(codes, absmax, columns)
    assert is_good(y[:, -1], F.linear(x, w.to(dtype)), x.double() @ w)


@pytest.mark.parametrize("columns", [2**28 + 16, 2**28 + 17], ids=["fast", "plain"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_linear_grad_input(dtype: torch.dtype, columns: int) -> None:
    codes, absmax = codes_and_scales(8 * columns, 16)
    dy = torch.zeros(2, 8, dtype=dtype)
    dy[:, -1] = torch.tensor([1, 0.75])
    with running(H100):
        dx = cuda.linear_grad_input(
            dy, codes.view(8, columns), absmax, TABLES["arbitrary"](), BLOCK
        )
    w = decoded(codes, absmax, 16)
    expected = dy[:, -1:].double() * w
    assert is_good(dx[:, -16:], expected.to(dtype), expected)


@pytest.mark.parametrize(("m", "n", "k"), [(2**20 + 5, 16, 2048), (2**21 + 5, 1024, 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_many_rows(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """More than 2^31 elements of x, and of y; then of dy and dx."""
    codes, absmax = codes_and_scales(n * k, n * k)
    codes, w = codes.view(n, k), decoded(codes, absmax, n * k).view(n, k)
    table = TABLES["arbitrary"]()
    x = with_end(random(k, dtype=dtype), m * k).view(m, k)
    dy = with_end(random(n, dtype=dtype), m * n).view(m, n)
    with running(H100):
        y = cuda.linear(x, codes, absmax, table, None, BLOCK)
        dx = cuda.linear_grad_input(dy, codes, absmax, table, BLOCK)
    of_last = slice(-min(n, 16), None)
    truth = (x[-1:].double() @ w.T)[:, of_last]
    assert is_good(y[-1:, of_last], F.linear(x[-1:], w.to(dtype))[:, of_last], truth)
    of_last = slice(-min(k, 16), None)
    truth = (dy[-1:].double() @ w)[:, of_last]
    assert is_good(dx[-1:, of_last], (dy[-1:] @ w.to(dtype))[:, of_last], truth)
