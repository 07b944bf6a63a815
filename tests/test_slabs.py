"""Products on decoded slabs, and which product the table picks for a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BLOCK_SIZES, DTYPES, check_product, random, random_quantized
from torch import Tensor

from gptj_q8 import backends, ops
from gptj_q8.backends import cuda_table, slabs

# M, N, K: several slabs, whose ends fall inside blocks or not; a single one; one element.
SHAPES = [(3, 600, 100), (2, 130, 4500), (150, 300, 256), (1, 257, 33), (5, 7, 64), (1, 1, 1)]


@pytest.fixture(autouse=True)
def small_slabs(
    monkeypatch: pytest.MonkeyPatch, poisoned_empty: None, one_thread: None
) -> Iterator[None]:
    monkeypatch.setattr(slabs, "linear_rows", lambda *sizes: 128)
    monkeypatch.setattr(slabs, "GRAD_SLAB", 1 << 14)
    with backends.use("slabs"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_products(
    m: int, n: int, k: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    w = random_quantized(n, k, block_size).to(device)
    x, dy = (random(m, side, dtype=dtype, device=device) for side in (k, n))
    for bias_dtype in (None, dtype, torch.float32):
        bias = None
        if bias_dtype is not None:
            bias = random(n, dtype=bias_dtype, device=device, seed=2)
        y = ops.linear(x, *w.parts, bias, block_size)
        added = 0 if bias is None else bias.double()
        plain = F.linear(x, w.truth.to(dtype), None if bias is None else bias.to(dtype))
        check_product(y, plain, x.double() @ w.truth.T + added)
        assert torch.equal(y, ops.linear(x, *w.parts, bias, block_size)), "two calls differ"
    dx = ops.linear_grad_input(dy, *w.parts, block_size)
    check_product(dx, dy @ w.truth.to(dtype), dy.double() @ w.truth)
    assert torch.equal(dx, ops.linear_grad_input(dy, *w.parts, block_size)), "two calls differ"


def test_a_slab_fits_the_cache_or_fills_the_gpu() -> None:
    from benchmarks.shapes import GPTJ

    for l2, processors in ((40 << 20, 108), (50 << 20, 132), (6 << 20, 82)):
        for shape in GPTJ:
            for m in (65, 128, 512, 4096):
                rows = _linear_rows(m, shape.n, shape.k, 2, l2, processors)
                assert rows % 128 == 0
                tiles = -(-m // 128) * (rows // 128)
                fills = tiles >= processors or rows >= shape.n
                fits = rows * shape.k * 2 <= l2 // 2
                assert fills, f"{tiles} tiles for {processors} multiprocessors"
                assert fits or tiles < 3 * processors or rows >= shape.n


_linear_rows = slabs.linear_rows


@pytest.mark.parametrize(
    ("capability", "m", "dtype", "order"),
    [
        ((9, 0), 1, torch.float16, "cuda triton slabs"),
        ((9, 0), 64, torch.bfloat16, "cuda triton slabs"),
        ((9, 0), 65, torch.bfloat16, "triton cuda slabs"),
        ((9, 0), 4096, torch.bfloat16, "slabs triton cuda"),
        ((9, 0), 8, torch.float32, "cuda triton"),
        ((9, 0), 4096, torch.float32, "triton cuda"),
        ((8, 0), 2048, torch.float16, "slabs triton cuda"),
        ((7, 5), 128, torch.float16, "cuda slabs triton"),
        ((7, 5), 129, torch.float16, "slabs triton cuda"),
        ((7, 5), 16, torch.bfloat16, "slabs triton cuda"),
        ((12, 0), 16, torch.float16, "cuda triton slabs"),
    ],
)
def test_the_table(
    capability: Any, m: int, dtype: torch.dtype, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_table._family.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    x = torch.empty(m, 64, dtype=dtype, device="meta")
    codes, ragged = torch.empty(2, 48, 64, dtype=torch.uint8), torch.empty(48, 60)
    assert cuda_table.preference("linear", (x, codes[0])) == tuple(order.split())
    assert cuda_table.preference("linear", (x, ragged))[0] != "cuda", "its fast kernels need 16"
    assert cuda_table.preference("quantize", (x, ragged)) == ("cuda", "triton")
    cuda_table._family.cache_clear()


@pytest.mark.parametrize("op", ["linear", "linear_grad_input"])
def test_one_slab_is_there_at_a_time(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one piece of memory serves them all."""
    decode = slabs._decode
    slabs_so_far: list[weakref.ref[Tensor]] = []

    def watched(*args: Any) -> Tensor:
        assert all(slab() is None for slab in slabs_so_far)
        slabs_so_far.append(weakref.ref(decoded := decode(*args)))
        return decoded

    monkeypatch.setattr(slabs, "_decode", watched)
    w = random_quantized(500, 128, 64)
    if op == "linear":
        slabs.linear(torch.ones(3, 128), *w.parts, None, 64)
    else:
        slabs.linear_grad_input(torch.ones(3, 500), *w.parts, 64)
    assert len(slabs_so_far) == 4
