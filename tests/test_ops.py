"""The matrix: every op x backend x dtype x odd shape, against NumPy and float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import (
    BLOCK_SIZES,
    DTYPES,
    EMULATED,
    TABLES,
    backend_ids,
    forced,
    random_quantized,
    relative_error,
    tables,
    triton_is_interpreted,
)
from torch import Tensor
from torch.library import opcheck

from gptj_q8 import codebooks, ops

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
MATRICES = [(1, 1), (3, 33), (65, 100), (17, 4500), (1000, 300)]
if triton_is_interpreted():  # it takes seconds for the others
    SHAPES = [(m, n, k) for m, n, k in SHAPES if n * k < 64_000 and m * n * k < 4_000_000]
    MATRICES = [(n, k) for n, k in MATRICES if n < 1000]


@pytest.fixture(params=backend_ids(), autouse=True)
def backend(
    request: pytest.FixtureRequest, device: torch.device, poisoned_empty: None
) -> Iterator[str]:
    if device.type != "cpu" and request.param.startswith("cpu"):
        pytest.skip(f"{request.param}: serves CPU tensors, the device is {device}")
    if device.type != "cpu" and request.param == EMULATED:
        pytest.skip(f"{EMULATED}: takes CPU tensors, the device is {device}")
    if device.type == "cpu" and request.param == "cuda":
        pytest.skip("cuda: serves a GPU's tensors, run with --device cuda")
    if device.type == "cpu" and request.param == "triton" and not triton_is_interpreted():
        pytest.skip("triton: runs on the CPU in a process of its own, which test_triton.py starts")
    threads = torch.get_num_threads()
    if request.param == "reference":
        torch.set_num_threads(1)  # its many small steps lose tenfold to threads on a busy machine
    try:
        with forced(request.param):
            yield request.param
    finally:
        torch.set_num_threads(threads)


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def check_product(actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    """float32 within 1e-5; 16 bits within twice the error of PyTorch's own product.

    plain: the same product by PyTorch in actual's dtype. The best any product can do is to round
    the truth, which matters where PyTorch's happens to be exact.
    """
    assert actual.dtype == plain.dtype
    assert actual.shape == truth.shape
    error = relative_error(actual, truth)
    if actual.dtype == torch.float32:
        assert error < 1e-5
    else:
        rounding = relative_error(truth.to(actual.dtype), truth)
        assert error <= 2 * max(relative_error(plain, truth), rounding)


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


# One element, less than a block, a block and one more, and, once, several slabs of any backend.
NUMELS = [(numel, block) for numel in (1, 31, 257, 9000) for block in BLOCK_SIZES]
NUMELS.append((300_001, 256))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("numel", "block_size"), NUMELS)
def test_quantize(numel: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
    weight = random(numel, dtype=dtype, device=device)
    weight[: numel // 3] *= 1e-3
    if numel > 4096:
        weight[:4096] = 0
    for name, table in ((name, make()) for name, make in TABLES.items()):
        codes, absmax = ops.quantize(weight, table.to(device), block_size)
        expected = numpy_quantize(weight.float().cpu().numpy(), table, block_size)
        np.testing.assert_array_equal(codes.cpu().numpy(), expected[0], name)
        np.testing.assert_array_equal(absmax.cpu().numpy(), expected[1], name)
        decoded = ops.dequantize(codes, absmax, table.to(device), block_size, torch.float32)
        if numel > 4096:
            assert (decoded[:4096] == 0).all(), "zero blocks decode to 0"


def numpy_blocks(weight: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalized blocks [blocks, block_size], padded with zeros, and their scales, in float32."""
    padded = np.pad(weight.ravel(), (0, -weight.size % block_size)).reshape(-1, block_size)
    absmax = np.abs(padded).max(axis=1)
    divisor = np.where(absmax > 0, absmax, 1).astype(np.float32)[:, None]
    return padded / divisor, absmax


def numpy_quantize(
    weight: np.ndarray, codebook: Tensor, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    normalized, absmax = numpy_blocks(weight, block_size)
    table = codebook.numpy()
    midpoints = (table[:-1].astype(np.float64) + table[1:]) / 2
    codes = np.searchsorted(midpoints.astype(np.float32), normalized, side="left")
    return codes.ravel()[: weight.size].astype(np.uint8), absmax


def test_quantize_takes_the_nearest_level_and_at_a_midpoint_the_lower(device: torch.device) -> None:
    table = TABLES["gaussian"]()
    levels = table.unique()
    midpoints = (levels[:-1] + levels[1:]) / 2  # exact: bfloat16 values
    above = torch.nextafter(midpoints, torch.tensor(2.0))
    for values, expected in ((levels, levels), (midpoints, levels[:-1]), (above, levels[1:])):
        weight = torch.cat([torch.ones(1), values]).to(device)  # 1 makes the scale 1
        codes, absmax = ops.quantize(weight, table.to(device), 4096)
        decoded = ops.dequantize(codes, absmax, table.to(device), 4096, torch.float32)
        assert torch.equal(decoded[1:].cpu(), expected)


@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-38, 3e38])
def test_quantize_at_the_ends_of_the_float32_range(scale: float, device: torch.device) -> None:
    weight = (random(100, dtype=torch.float32, device=device).clamp(-1, 1).double() * scale).float()
    table = TABLES["dynamic"]()
    codes, absmax = ops.quantize(weight, table.to(device), 64)
    expected_codes, expected_absmax = numpy_quantize(weight.cpu().numpy(), table, 64)
    np.testing.assert_array_equal(absmax.cpu().numpy(), expected_absmax)
    np.testing.assert_array_equal(codes.cpu().numpy(), expected_codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("numel", "block_size"), NUMELS)
def test_histogram(numel: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
    weight = random(numel, dtype=dtype, device=device)
    weight[numel // 2 :] *= 0.1
    weight[:32] = 0
    for bins in (2, 256, 1 << 16):
        counts = ops.histogram(weight, block_size, bins)
        normalized, absmax = numpy_blocks(weight.float().cpu().numpy(), block_size)
        relative = absmax / max(absmax.max(), np.float32(1e-45))
        added = np.rint((relative * relative) * np.float32(1 << 30)).astype(np.int64)
        index = ((normalized + np.float32(1)) * np.float32(bins // 2)).astype(np.int64)
        expected = np.zeros(bins, np.int64)
        used = slice(0, numel)
        np.add.at(
            expected,
            np.minimum(index, bins - 1).ravel()[used],
            np.repeat(added, block_size)[used],
        )
        np.testing.assert_array_equal(counts.cpu().numpy(), expected)
    assert (ops.histogram(torch.zeros_like(weight), block_size, 64) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("n", "k"), MATRICES)
def test_dequantize_and_embedding(
    n: int, k: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    for codebook in tables(n + block_size // 32):
        w = random_quantized(n, k, block_size, codebook).to(device)
        expected = w.truth.float().to(dtype)
        assert torch.equal(ops.dequantize(*w.parts, block_size, dtype), expected)
        for ids_dtype in (torch.int64, torch.int32):
            ids = torch.arange(2 * n, device=device, dtype=ids_dtype).view(2, n) * 7 % n
            rows = ops.embedding(ids, *w.parts, block_size, dtype)
            assert torch.equal(rows, expected[ids.long()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_takes_tables_in_any_order_without_a_zero(
    dtype: torch.dtype, device: torch.device
) -> None:
    """As old checkpoints may hold them; `quantize` alone asks for order and a 0."""
    n, k, block_size = 65, 300, 64
    w = random_quantized(n, k, block_size, "arbitrary")
    table = torch.linspace(-1, 1, 256)[torch.randperm(256)]
    scales = w.absmax.repeat_interleave(block_size)[: n * k].view(n, k)
    truth = (table[w.codes.long()] * scales).double().to(device)
    parts = [part.to(device) for part in (w.codes, w.absmax, table)]
    assert torch.equal(ops.dequantize(*parts, block_size, dtype), truth.float().to(dtype))
    for m in (1, 5, 70):
        x, dy = random(m, k, dtype=dtype, device=device), random(m, n, dtype=dtype, device=device)
        y, dx = (
            ops.linear(x, *parts, None, block_size),
            ops.linear_grad_input(dy, *parts, block_size),
        )
        check_product(y, F.linear(x, truth.to(dtype)), x.double() @ truth.T)
        check_product(dx, dy @ truth.to(dtype), dy.double() @ truth)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("numel", "block_size"), [(1, 32), (1000, 256), (20_001, 4096), (70, 64)])
def test_adam_step(
    numel: int,
    block_size: int,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    device: torch.device,
) -> None:
    state, tables = adam_state(numel, block_size, device)
    param = random(numel, dtype=dtype, device=device)
    grad = random(numel, dtype=grad_dtype, device=device, seed=2)
    grad[numel // 2 :] *= 1e-4
    if numel > 20:
        grad[3], grad[7], grad[11], grad[13] = 0, torch.nan, torch.inf, -torch.inf
    finite = grad.isfinite()
    settings = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    for step in (1, 2, 3):
        m, v = (decoded.double() for decoded in adam_moments(state, tables, block_size))
        g = torch.where(finite, grad.double(), 0.0)
        m = torch.where(finite, 0.9 * m + 0.1 * g, m)
        v = torch.where(finite, 0.99 * v + 0.01 * g * g, v)
        update = 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        expected = torch.where(finite, param.double() * (1 - 0.01 * 0.1) - update, param.double())
        ops.adam_step_(param, grad, *state, *tables, **settings, step=step, block_size=block_size)
        # The arithmetic is float32's; the parameter is then rounded once to its dtype.
        arithmetic = 4 * torch.finfo(torch.float32).eps * (expected.abs() + update.abs())
        rounding = 0.5 * torch.finfo(dtype).eps * expected.abs()
        assert ((param.double() - expected).abs() <= arithmetic + rounding).all()
        assert torch.equal(param[~finite].double(), expected[~finite])
        new_m, new_v = adam_moments(state, tables, block_size)
        for moment, decoded, table in ((m, new_m, tables[0]), (v, new_v, tables[1])):
            blocks = F.pad(moment, (0, -numel % block_size)).view(-1, block_size)
            scale = blocks.abs().amax(dim=1).repeat_interleave(block_size)[:numel]
            nearest = table.diff().max().item() / 2 * 1.0001
            assert ((decoded.double() - moment).abs() <= nearest * scale).all()
        assert (new_v[v > 1e-30] > 0).all(), "a second moment was rounded to 0"


def adam_state(
    numel: int, block_size: int, device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    tables = codebooks.dynamic().to(device), codebooks.dynamic_unsigned().to(device)
    blocks = -(-numel // block_size)
    state: list[Tensor] = []
    for table in tables:
        zero = int((table == 0).nonzero()[0])
        state.append(torch.full((numel,), zero, dtype=torch.uint8, device=device))
        state.append(torch.zeros(blocks, device=device))
    return tuple(state), tables


def adam_moments(
    state: tuple[Tensor, ...], tables: tuple[Tensor, Tensor], block_size: int
) -> list[Tensor]:
    return [
        ops.dequantize(codes, absmax, table, block_size, torch.float32)
        for codes, absmax, table in zip(state[::2], state[1::2], tables, strict=True)
    ]


def test_the_first_adam_step_is_pytorchs(device: torch.device) -> None:
    """From moments of zero nothing has been rounded to 8 bits yet."""
    weight = random(50, 30, dtype=torch.float32, device=device)
    grad = random(50, 30, dtype=torch.float32, device=device, seed=2)
    expected = weight.clone().requires_grad_()
    expected.grad = grad.clone()
    torch.optim.AdamW([expected], lr=0.01, weight_decay=0.1).step()
    state, tables = adam_state(weight.numel(), 256, device)
    ops.adam_step_(
        weight, grad, *state, *tables,
        lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=1, block_size=256,
    )  # fmt: skip
    torch.testing.assert_close(weight, expected.detach(), rtol=1e-6, atol=1e-7)


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


def test_a_gradient_whose_square_overflows_spoils_no_block(device: torch.device) -> None:
    param = torch.ones(64, device=device)
    state, tables = adam_state(64, 64, device)
    grad = torch.full((64,), 0.5, device=device)
    grad[5] = -1e20
    for step in (1, 2, 3):
        ops.adam_step_(
            param, grad, *state, *tables,
            lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, step=step, block_size=64,
        )  # fmt: skip
    assert param[5] == 1
    others = param[torch.arange(64, device=device) != 5]
    torch.testing.assert_close(others, torch.full_like(others, 0.7), rtol=0.05, atol=0)
    assert all(moment.isfinite().all() for moment in adam_moments(state, tables, 64))


def test_adam_step_changes_a_strided_parameter(device: torch.device) -> None:
    param = random(30, 20, dtype=torch.float32, device=device).T
    contiguous, grad = param.contiguous(), random(20, 30, dtype=torch.float32, device=device)
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    for each in (param, contiguous):
        state, tables = adam_state(600, 256, device)
        ops.adam_step_(each, grad, *state, *tables, **settings, step=1, block_size=256)
    assert torch.equal(param, contiguous)


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


def test_embedding_refuses_ids_out_of_range(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("on a GPU this is a device-side assertion, which ends the process's context")
    w = random_quantized(5, 8, 32)
    for bad in (-1, 5):
        with pytest.raises(IndexError, match=f"embedding: ids must be from 0 to 4, got {bad}"):
            ops.embedding(torch.tensor([0, bad]), *w.parts, 32, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_quantize_counts_bad_values(bad: float, dtype: torch.dtype, device: torch.device) -> None:
    weight = random(3, 70, dtype=dtype, device=device)
    weight[0, 3] = weight[2, 69] = bad
    table = TABLES["dynamic"]().to(device)
    with pytest.raises(ValueError, match="quantize: weight has 2 NaN or Inf values"):
        ops.quantize(weight, table, 32)
    with pytest.raises(ValueError, match="histogram: weight has 2 NaN or Inf values"):
        ops.histogram(weight, 32, 256)
