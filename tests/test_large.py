"""The GPU kernels on tensors of more than 2^31 elements, on the CPU.

Of each launch the last block (Triton: program) runs and no other, and the tensors are memory that
nothing touches but their ends: so this takes address space, not gigabytes and hours. The CUDA
kernels run in the emulation, the Triton kernels in the process where the interpreter is on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import EMULATED, TABLES, is_good, random, triton_is_interpreted
from cuda_emulation import emulator
from cuda_gpus import H100, Gpu, running
from torch import Tensor

from gptj_q8 import backends
from gptj_q8.backends import reference

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


@pytest.fixture(params=["triton" if triton_is_interpreted() else EMULATED])
def backend(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    name = request.param.partition(":")[0]
    with last_program_only() if name == "triton" else emulator().last_block_only():
        yield backends.load(name)


@contextlib.contextmanager
def last_program_only() -> Iterator[None]:
    """Within it Triton's interpreter runs the last program of a grid and no other."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    sides = (1, 1, 1)

    class LastProgram(interpreter.GridExecutor):
        def __init__(self, fn: Any, names: Any, grid: tuple[int, ...], *others: Any) -> None:
            nonlocal sides
            super().__init__(fn, names, (1, 1, 1), *others)
            sides = (*grid, 1, 1)[:3]

        def _restore_args_dev(self, *arguments: Any) -> None:
            """The tensors are on the CPU already; copying them onto themselves touches all."""

    with pytest.MonkeyPatch.context() as patch:
        set_sides, set_place = builder.set_grid_dim, builder.set_grid_idx
        patch.setattr(interpreter, "GridExecutor", LastProgram)
        patch.setattr(builder, "set_grid_dim", lambda *ones: set_sides(*sides))
        patch.setattr(builder, "set_grid_idx", lambda *zeros: set_place(*(n - 1 for n in sides)))
        yield


def on(gpu: Gpu) -> contextlib.AbstractContextManager[None]:
    """For CUDA."""
    return contextlib.nullcontext() if triton_is_interpreted() else running(gpu)


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
def test_decoding(backend: ModuleType, dtype: torch.dtype) -> None:
    codes, absmax = codes_and_scales(NUMEL, END)
    with on(H100):
        found = backend.dequantize(codes, absmax, TABLES["arbitrary"](), BLOCK, dtype)
    expected = decoded(codes, absmax, END).float().to(dtype)
    last = NUMEL % 4096
    assert torch.equal(found[-last:], expected[-last:])


def test_encoding_and_counting(backend: ModuleType) -> None:
    values = torch.randn(END, generator=torch.Generator().manual_seed(0)).half()
    last = NUMEL % 4096
    weight, table = with_end(values), TABLES["arbitrary"]()
    with on(H100):
        codes, absmax = backend.quantize(weight, table, BLOCK)
        counts = backend.histogram(weight, BLOCK, 1024)
    expected_codes, expected_absmax = reference.quantize(values[-last:], table, BLOCK)
    assert torch.equal(codes[-last:], expected_codes)
    assert torch.equal(absmax[-len(expected_absmax) :], expected_absmax)
    assert torch.equal(counts, reference.histogram(values[-last:], BLOCK, 1024))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of elements past the end
def test_adam(backend: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    last = NUMEL % 4096
    ends = [torch.randn(last, generator=generator).half() for _ in range(2)]
    table, positive = TABLES["arbitrary"](), TABLES["arbitrary"]().abs().sort().values
    codes, absmax = reference.quantize(ends[0].float(), table, BLOCK)
    small = [ends[0].clone(), ends[1], codes.clone(), absmax.clone(), codes.clone(), absmax + 1]
    large = [with_end(t, NUMEL if len(t) == last else -(-NUMEL // BLOCK)) for t in small]
    settings = (table, positive, 1e-3, 0.9, 0.999, 1e-8, 0.1, 2, BLOCK)
    with on(H100):
        backend.adam_step_(*large, *settings)
        backend.adam_step_(*small, *settings)
    assert not torch.equal(small[0], ends[0])
    for found, expected in zip(large, small, strict=True):
        assert torch.equal(found[-len(expected) :], expected)


def test_rows_of_an_embedding(backend: ModuleType) -> None:
    """Of codes and of results more than 2^31."""
    codes, absmax = codes_and_scales(ROWS * COLUMNS, COLUMNS)
    ids = torch.full((ROWS,), ROWS - 1, dtype=torch.int32)
    with on(H100):
        found = backend.embedding(
            ids, codes.view(ROWS, COLUMNS), absmax, TABLES["arbitrary"](), BLOCK, torch.float16
        )
    assert torch.equal(found[-1], decoded(codes, absmax, COLUMNS).float().half())


@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS + 1], ids=["fast", "plain"])
@pytest.mark.parametrize(
    ("m", "dtype"), [(1, torch.float32), (9, torch.bfloat16), (40, torch.float16)]
)
def test_linear(backend: ModuleType, m: int, dtype: torch.dtype, columns: int) -> None:
    codes, absmax = codes_and_scales(ROWS * columns, columns)
    x = random(m, columns, dtype=dtype)
    with on(HUGE if m == 1 and columns == COLUMNS else H100):
        y = backend.linear(x, codes.view(ROWS, columns), absmax, TABLES["arbitrary"](), None, BLOCK)
    w = decoded(codes, absmax, columns)
    assert is_good(y[:, -1], F.linear(x, w.to(dtype)), x.double() @ w)


@pytest.mark.parametrize("columns", [2**28 + 16, 2**28 + 17], ids=["fast", "plain"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_linear_grad_input(backend: ModuleType, dtype: torch.dtype, columns: int) -> None:
    codes, absmax = codes_and_scales(8 * columns, 16)
    dy = torch.zeros(2, 8, dtype=dtype)
    dy[:, -1] = torch.tensor([1, 0.75])
    with on(H100):
        dx = backend.linear_grad_input(
            dy, codes.view(8, columns), absmax, TABLES["arbitrary"](), BLOCK
        )
    w = decoded(codes, absmax, 16)
    expected = dy[:, -1:].double() * w
    assert is_good(dx[:, -16:], expected.to(dtype), expected)


@pytest.mark.parametrize(("m", "n", "k"), [(2**20 + 5, 16, 2048), (2**21 + 5, 1024, 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_many_rows(backend: ModuleType, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """More than 2^31 elements of x, and of y; then of dy and dx."""
    codes, absmax = codes_and_scales(n * k, n * k)
    codes, w = codes.view(n, k), decoded(codes, absmax, n * k).view(n, k)
    table = TABLES["arbitrary"]()
    x = with_end(random(k, dtype=dtype), m * k).view(m, k)
    dy = with_end(random(n, dtype=dtype), m * n).view(m, n)
    with on(H100):
        y = backend.linear(x, codes, absmax, table, None, BLOCK)
        dx = backend.linear_grad_input(dy, codes, absmax, table, BLOCK)
    of_last = slice(-min(n, 16), None)
    truth = (x[-1:].double() @ w.T)[:, of_last]
    assert is_good(y[-1:, of_last], F.linear(x[-1:], w.to(dtype))[:, of_last], truth)
    of_last = slice(-min(k, 16), None)
    truth = (dy[-1:].double() @ w)[:, of_last]
    assert is_good(dx[-1:, of_last], (dy[-1:] @ w.to(dtype))[:, of_last], truth)
