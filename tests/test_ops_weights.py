"""quantize, histogram, dequantize and embedding, on every backend, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import (
    BLOCK_SIZES,
    DTYPES,
    TABLES,
    numpy_blocks,
    numpy_quantize,
    random,
    random_quantized,
    tables,
    triton_is_interpreted,
)

from gptj_q8 import ops

pytestmark = pytest.mark.usefixtures("each_backend")

# One element, less than a block, a block and one more, and, once, several slabs of any backend.
NUMELS = [(numel, block) for numel in (1, 31, 257, 9000) for block in BLOCK_SIZES]
NUMELS.append((300_001, 256))
MATRICES = [(1, 1), (3, 33), (65, 100), (17, 4500), (1000, 300)]
if triton_is_interpreted():  # it takes seconds for the others
    MATRICES = [(n, k) for n, k in MATRICES if n < 1000]
    NUMELS = [(numel, block) for numel, block in NUMELS if numel < 300_000]


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
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_quantize_counts_bad_values(bad: float, dtype: torch.dtype, device: torch.device) -> None:
    weight = random(3, 70, dtype=dtype, device=device)
    weight[0, 3] = weight[2, 69] = bad
    table = TABLES["dynamic"]().to(device)
    with pytest.raises(ValueError, match="quantize: weight has 2 NaN or Inf values"):
        ops.quantize(weight, table, 32)
    with pytest.raises(ValueError, match="histogram: weight has 2 NaN or Inf values"):
        ops.histogram(weight, 32, 256)


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


def test_embedding_refuses_ids_out_of_range(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("on a GPU this is a device-side assertion, which ends the process's context")
    w = random_quantized(5, 8, 32)
    for bad in (-1, 5):
        with pytest.raises(IndexError, match=f"embedding: ids must be from 0 to 4, got {bad}"):
            ops.embedding(torch.tensor([0, bad]), *w.parts, 32, torch.float32)
