"""The numbers of the compiled CPU kernels on input made to break them, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    NEEDS_CPU_KERNELS,
    TABLES,
    check_product,
    numpy_quantize,
    random_quantized,
    relative_error,
)
from torch import Tensor

from gptj_q8 import codebooks
from gptj_q8.backends import cpu

pytestmark = [pytest.mark.usefixtures("one_thread"), NEEDS_CPU_KERNELS]


def _with_zero(levels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.sort(np.append(levels, 0)).astype(np.float32))


def _hostile_tables() -> dict[str, Tensor]:
    """Codebooks that an encoder which divides [-1, 1] into cells could stumble over."""
    generator = np.random.default_rng(0)
    sign = np.sign(generator.normal(size=255))
    neighbours = [np.float32(0.3)]
    while len(neighbours) < 100:
        neighbours.append(np.nextafter(neighbours[-1], np.float32(1)))
    return {
        "unsigned": codebooks.dynamic_unsigned(),
        "uniform at random": _with_zero(generator.uniform(-1, 1, 255)),
        "log-uniform": _with_zero(sign * 2.0 ** generator.uniform(-40, 0, 255)),
        "near underflow": _with_zero(sign * 2.0 ** generator.uniform(-130, -90, 255)),
        "neighbouring floats": _with_zero(np.append(neighbours, generator.uniform(-1, 1, 155))),
        "few distinct": _with_zero(generator.choice(generator.uniform(-1, 1, 20), 255)),
        "multiples of 1 / 256": _with_zero(generator.integers(-256, 257, 255) / 256),
    }


HOSTILE = _hostile_tables()


@pytest.mark.parametrize("name", HOSTILE)
def test_codes_are_exact_for_hostile_codebooks(name: str, isa: str) -> None:
    """At every midpoint, right above and below it, at every level, and at scales of all sizes."""
    table = HOSTILE[name]
    levels = table.numpy()
    middle = (levels[:-1] + levels[1:]) * np.float32(0.5)
    up, down = (np.nextafter(middle, np.float32(end)) for end in (2, -2))
    generator = np.random.default_rng(1)
    tiny = (generator.choice([-1, 1], 300) * 2.0 ** generator.uniform(-149, 0, 300)).astype("f4")
    values = np.concatenate([[1], middle, up, down, levels, [-0.0], tiny]).astype(np.float32)
    for scale in (1, 2.0**-100, 2.0**-101, 1e-38, 1e-43, 3e38):
        weight = torch.from_numpy(values * np.float32(scale))
        for dtype in DTYPES:
            rounded = weight.to(dtype)
            rounded[rounded.isinf()] = 0
            codes, absmax = cpu.quantize(rounded, table, 4096)
            expected = numpy_quantize(rounded.float().numpy(), table, 4096)
            np.testing.assert_array_equal(absmax.numpy(), expected[1])
            np.testing.assert_array_equal(codes.numpy(), expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 256, 4096])
def test_codes_and_counts_agree_bit_for_bit(block_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(37, 531, generator=generator)
    weight[3] *= 1e-30  # subnormal in float16, zero in part
    weight[4] = 0
    weight[5] *= 1e-41  # subnormal scales
    weight = weight.to(dtype)
    for codebook in TABLES.values():
        results = []
        for name in cpu.instruction_sets():
            with cpu.force_isa(name):
                codes, absmax = cpu.quantize(weight, codebook(), block_size)
                results.append((codes, absmax, cpu.histogram(weight, block_size, 65536)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_adam_step_gives_the_same_bits_on_every_instruction_set() -> None:
    generator = np.random.default_rng(2)

    def powers(low: float, high: float, count: int) -> Tensor:
        return torch.from_numpy(10.0 ** generator.uniform(low, high, count)).float()

    for case in range(60):
        # Whole groups of 64 and 16, and tails of each, in blocks of each size.
        n = int(generator.choice([1, 15, 17, 63, 64, 65, 127, 129, 321, 4097]))
        block_size = (32, 64, 256, 4096)[case % 4]
        blocks = -(-n // block_size)
        dtype, grad_dtype = DTYPES[case % 3], DTYPES[case // 3 % 3]
        param, grad = (torch.from_numpy(generator.normal(size=n)) for _ in range(2))
        param, grad = param.to(dtype), (grad * powers(-25, 1, n)).to(grad_dtype)
        grad[n // 2] = (torch.nan, torch.inf, 1e25, 0)[case % 4]
        m_codes, v_codes = (
            torch.from_numpy(generator.integers(0, 256, n, dtype=np.uint8)) for _ in range(2)
        )
        m_absmax, v_absmax = powers(-12, 2, blocks), powers(-42, 2, blocks)
        m_absmax[0] *= case % 5 > 0
        before = (param, m_codes, m_absmax, v_codes, v_absmax)
        tables = HOSTILE["log-uniform"] if case % 2 else TABLES["dynamic"](), HOSTILE["unsigned"]
        results = []
        for name in cpu.instruction_sets():
            after = [each.clone() for each in before]
            with cpu.force_isa(name):
                cpu.adam_step_(
                    after[0], grad, *after[1:], *tables,
                    1e-2, 0.9, 0.99, 1e-8, 0.1, 1 + case, block_size,
                )  # fmt: skip
            results.append(after)
        assert not all(map(torch.equal, before, results[0]))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other)), (n, block_size, dtype, grad_dtype)


def test_products_agree_on_both_sides_of_every_threshold(isa: str) -> None:
    # One row at a time, the first rows of any larger call must be the same within rounding
    # (2^-18 where float32 x is two bfloat16 parts).
    w = random_quantized(96, 512, 256, "gaussian")
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x = torch.randn(20, 512, generator=torch.Generator().manual_seed(2)).to(dtype)
        truth = x.double() @ w.truth.T
        for m in range(1, 21):
            y = cpu.linear(x[:m], *w.parts, None, 256)
            assert relative_error(y, truth[:m]) < bound


def test_products_of_random_shapes(isa: str) -> None:
    generator = np.random.default_rng(3)
    for case in range(40):
        block_size = (32, 64, 128, 256, 1024, 4096)[case % 6]
        m, n = int(generator.integers(1, 19)), int(generator.integers(1, 140))
        k = int(
            generator.choice(
                [generator.integers(1, 70), 64 * generator.integers(1, 12), block_size + case % 3,
                 32 * generator.integers(1, 20) + case % 2, 4096 + generator.integers(-2, 70)]
            )
        )  # fmt: skip
        w = random_quantized(n, k, block_size, list(TABLES)[case % 3], seed=case)
        # Scales below 0, as no quantizer makes but a file may hold, and from large to tiny.
        scale = (1.0, -1.0, 1e30, 1e-30)[case // 3 % 4]
        absmax, truth = w.absmax * scale, w.truth * float(np.float32(scale))
        for dtype in DTYPES if abs(scale) == 1 else DTYPES[:2]:
            x, dy = (
                torch.from_numpy(generator.normal(size=(m, side)) / abs(scale) ** 0.5).to(dtype)
                for side in (k, n)
            )
            y = cpu.linear(x, w.codes, absmax, w.codebook, None, block_size)
            check_product(y, F.linear(x, truth.to(dtype)), x.double() @ truth.T)
            dx = cpu.linear_grad_input(dy, w.codes, absmax, w.codebook, block_size)
            check_product(dx, dy @ truth.to(dtype), dy.double() @ truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "k", "table"),
    [
        (257, 129, "arbitrary"),
        (513, 129, "arbitrary"),
        (1030, 129, "arbitrary"),
        (577, 96, "gaussian"),
        (513, 576, "gaussian"),
    ],
)
def test_more_rows_than_one_pass_takes(
    m: int, k: int, table: str, dtype: torch.dtype, isa: str
) -> None:
    """256 or 512 rows of x share one decoding; the last pass may be a single row."""
    w = random_quantized(70, k, 64, table)
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator).to(dtype)
    dy = torch.randn(m, 70, generator=generator).to(dtype)
    y = cpu.linear(x, *w.parts, None, 64)
    dx = cpu.linear_grad_input(dy, *w.parts, 64)
    check_product(y, F.linear(x, w.truth.to(dtype)), x.double() @ w.truth.T)
    check_product(dx, dy @ w.truth.to(dtype), dy.double() @ w.truth)
    assert relative_error(y[-1], x[-1].double() @ w.truth.T) < 0.01


def test_more_codes_than_32_bits_count(isa: str) -> None:
    rows, columns, last = 2**20 + 3, 4096, slice(2**20, None)
    w = random_quantized(3, columns, 4096, "gaussian")
    # Zeros of NumPy's take no memory until they are written.
    codes, absmax = torch.from_numpy(np.zeros((rows, columns), np.uint8)), torch.zeros(rows)
    codes[last], absmax[last] = w.codes, w.absmax
    big = (codes, absmax, w.codebook)
    found = cpu.embedding(torch.tensor([rows - 1, 0]), *big, 4096, torch.float32)
    assert torch.equal(found.double(), torch.stack([w.truth[-1], 0 * w.truth[0]]))
    x, dy = torch.ones(1, columns, dtype=torch.bfloat16), torch.zeros(1, rows)
    dy[0, last] = torch.tensor([1.0, 2.0, -3.0])
    y = cpu.linear(x, *big, None, 4096)
    assert relative_error(y[0, last], w.truth.sum(1)) < 4e-3
    assert not y[0, : 2**20].any()
    assert (
        relative_error(cpu.linear_grad_input(dy, *big, 4096), dy[:, last].double() @ w.truth) < 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 3, 6, 40])
def test_sums_neither_overflow_nor_vanish_before_their_scale(
    m: int, dtype: torch.dtype, isa: str
) -> None:
    """Where x is near an end of the float range and absmax near the other, y is in between."""
    for name in ("gaussian", "arbitrary"):
        w = random_quantized(16, 256, 64, name)
        for size, scale in ((3e38, 1e-6), (1e-37, 1e3)):
            x = torch.rand(m, 256, generator=torch.Generator().manual_seed(m)) - 0.5
            x = ((x + x.sign() / 2) * size).to(dtype)
            y = cpu.linear(x, w.codes, w.absmax * scale, w.codebook, None, 64)
            truth = x.double() @ w.truth.T * scale
            rounding = relative_error(truth.to(dtype), truth)
            assert relative_error(y, truth) < max(1e-5, 2 * rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3e38, 1e-3])
def test_an_extreme_row_after_others_are_done(dtype: torch.dtype, size: float, isa: str) -> None:
    """Its rows are computed some hundred at a time; what comes last changes how."""
    w = random_quantized(16, 256, 64, "gaussian")
    x = torch.rand(520, 256, generator=torch.Generator().manual_seed(1)) - 0.5
    x[515] = (x[515] + x[515].sign() / 2) * size
    x = x.to(dtype)
    y = cpu.linear(x, w.codes, w.absmax * 1e-6, w.codebook, None, 64)
    truth = x.double() @ w.truth.T * 1e-6
    rounding = relative_error(truth.to(dtype), truth)
    for rows in (slice(515), slice(515, 516), slice(516, 520)):
        assert relative_error(y[rows], truth[rows]) < max(1e-5, 2 * rounding)


@pytest.mark.parametrize("flush", [False, True])
def test_subnormal_scales_and_flushing(flush: bool, isa: str) -> None:
    table = TABLES["gaussian"]()
    weight = torch.tensor([1e-40, -1e-41, 5e-45, 0.0] * 8 + [1.0, -0.5, 0.25, 0.0] * 8)
    if not torch.set_flush_denormal(flush):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        codes, absmax = cpu.quantize(weight, table, 32)
        decoded = cpu.dequantize(codes, absmax, table, 32, torch.float32)
        x = torch.ones(1, 64)
        y = cpu.linear(x, codes.view(1, 64), absmax, table, None, 32)
    finally:
        torch.set_flush_denormal(False)
    assert ((decoded - weight).abs() <= 0.02 * (absmax.repeat_interleave(32) + 1e-38)).all()
    assert torch.isfinite(y).all()
    if not flush:
        assert absmax[0] == np.float32(1e-40)


def test_weights_that_are_not_finite_do_not_crash(isa: str) -> None:
    # The op refuses them; the kernels must still stay inside their tables.
    table = TABLES["dynamic"]()
    weight = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0] * 20)
    codes, absmax = cpu.quantize(weight, table, 32)
    cpu.histogram(weight, 32, 64)
    cpu.dequantize(codes, absmax, table, 32, torch.bfloat16)


@pytest.mark.parametrize("m", [1, 3, 5, 64, 100])
def test_errors_of_levels_do_not_add_up(m: int, isa: str) -> None:
    """Every weight has the same code, whose level bfloat16 does not hold, times a scale such that
    it holds the weight. A level that were rounded before it is scaled would err alike in all.
    """
    table = codebooks.dynamic()
    code = 93
    w = torch.ones(256, 512, dtype=torch.float64)
    w.view(-1, 256)[:, 7] = 1 / table[code].abs().double()
    codes, absmax = cpu.quantize(w.float(), table, 256)
    decoded = table[codes.long()].double() * absmax.double().repeat_interleave(256).view(256, 512)
    x = torch.randn(m, 512, generator=torch.Generator().manual_seed(m)).bfloat16()
    x[:, 7::256] = 0
    y = cpu.linear(x, codes, absmax, table, None, 256)
    check_product(y, F.linear(x, decoded.bfloat16()), x.double() @ decoded.T)


@pytest.mark.parametrize("k", [40, 41, 64])
def test_scales_near_the_largest_float_do_not_reach_other_weights(k: int, isa: str) -> None:
    """In bfloat16 a level of -1 at such a scale is infinite; no weight here has it."""
    n = 200
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(100, 150, (n, k), generator=generator, dtype=torch.uint8)
    absmax = torch.ones(-(-n * k // 32))
    absmax[3::50] = 3.4e38
    table = TABLES["gaussian"]()
    w = table[codes.long()].double() * absmax.double().repeat_interleave(32)[: n * k].view(n, k)
    for m in (1, 8, 40):
        x = torch.randn(m, k, generator=generator).bfloat16() / 256
        y = cpu.linear(x, codes, absmax, table, None, 32)
        check_product(y, F.linear(x, w.bfloat16()), x.double() @ w.T)
        dy = torch.randn(m, n, generator=generator).bfloat16() / 256
        dx = cpu.linear_grad_input(dy, codes, absmax, table, 32)
        check_product(dx, dy @ w.bfloat16(), dy.double() @ w)
