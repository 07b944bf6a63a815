"""linear and linear_grad_input in CUDA, run on the CPU for GPUs of several kinds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import BLOCK_SIZES, DTYPES, is_good, random, random_quantized
from cuda_emulation import emulator
from cuda_gpus import A100, FAST, GPUS, H100, ODD, RTX3090, T4, Gpu, both_are_good, running

from gptj_q8.backends import cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_products(gpu: Gpu, dtype: torch.dtype) -> None:
    for number, (m, n, k) in enumerate(FAST + ODD):
        block_size = BLOCK_SIZES[number % len(BLOCK_SIZES)]
        w = random_quantized(n, k, block_size, "arbitrary")
        with running(gpu, order=number % 4):
            assert both_are_good(m, w, block_size, dtype), f"{m, n, k}, blocks of {block_size}"


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_wgmma_is_on_hopper_only(gpu: Gpu) -> None:
    cuda.has_wgmma.cache_clear()
    with running(gpu):
        assert cuda.has_wgmma(torch.device("cpu")) == (gpu is H100)
        before = wgmma_kernels()
        assert both_are_good(40, random_quantized(24, 128, 32), 32, torch.float16)
        assert bool(wgmma_kernels()) if gpu is H100 else wgmma_kernels() == before
    cuda.has_wgmma.cache_clear()


def wgmma_kernels() -> set[str]:
    return {name for name in emulator().kernels() if "wgmma" in name}


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_products_with_every_block_size(block_size: int) -> None:
    for m in (1, 4, 12):
        w = random_quantized(50, 272, block_size, "arbitrary")
        with running(H100):
            assert both_are_good(m, w, block_size, torch.bfloat16), m


@pytest.mark.parametrize(("gpu", "k"), [(T4, 80), (H100, 80), (H100, 128)], ids=str)
def test_every_number_of_rows(gpu: Gpu, k: int) -> None:
    w = random_quantized(24, k, 32, "arbitrary")
    with running(gpu):
        for m in range(1, 131):
            assert both_are_good(m, w, 32, torch.float16), m


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 4, 12, 40])
def test_every_order_of_threads_gives_the_same_bits(m: int, dtype: torch.dtype) -> None:
    k = 1024 if m == 40 else 1040  # with wgmma, or not
    w = random_quantized(136, k, 64, "arbitrary")
    x, dy = random(m, k, dtype=dtype), random(m, 136, dtype=dtype)
    results = []
    for order in range(4):
        with running(H100, order):
            results.append(cuda.linear(x, *w.parts, None, 64))
            results.append(cuda.linear_grad_input(dy, *w.parts, 64))
    assert all(torch.equal(y, results[0]) for y in results[2::2])
    assert all(torch.equal(dx, results[1]) for dx in results[3::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 12])
def test_tensors_that_begin_anywhere(m: int, dtype: torch.dtype) -> None:
    w = random_quantized(48, 96, 32, "arbitrary")
    codes, absmax, codebook = w.parts
    moved = torch.cat([codes.new_zeros(1), codes.flatten()])[1:].view_as(codes)
    assert moved.data_ptr() % 16 == 1
    x, dy = random(m, 96, dtype=dtype), random(m, 48, dtype=dtype)
    moved_x, moved_dy = (torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in (x, dy))
    with running(H100):
        for rows, codes_ in ((x, moved), (moved_x, codes)):
            y = cuda.linear(rows, codes_, absmax, codebook, None, 32)
            assert is_good(y, F.linear(x, w.truth.to(dtype)), x.double() @ w.truth.T)
        for rows, codes_ in ((dy, moved), (moved_dy, codes)):
            dx = cuda.linear_grad_input(rows, codes_, absmax, codebook, 32)
            assert is_good(dx, dy @ w.truth.to(dtype), dy.double() @ w.truth)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 256), (12, 1024), (12, 100)])
def test_the_bias_is_added_before_the_one_rounding(m: int, k: int, bias_dtype: torch.dtype) -> None:
    """1 + 2^-8 rounds to 1 in bfloat16, and 1 + 2^-8 + 2^-9 to 1 + 2^-7."""
    table = torch.arange(-128, 128).div(128)
    codes = torch.full((20, k), 128, dtype=torch.uint8)  # 0
    codes[:, :2] = 192  # 0.5
    x = torch.zeros(m, k, dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = 2, 2.0**-7
    bias = torch.full((20,), 2.0**-9, dtype=bias_dtype)
    with running(H100):
        y = cuda.linear(x, codes, torch.ones(-(-20 * k // 32)), table, bias, 32)
        without = cuda.linear(x, codes, torch.ones(-(-20 * k // 32)), table, None, 32)
    assert torch.equal(y, torch.full_like(y, 1 + 2.0**-7))
    assert torch.equal(without, torch.ones_like(y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 3, 12, 70])
@pytest.mark.parametrize("k", [256, 100])
def test_infinities_and_nans_stay_in_their_row(m: int, k: int, dtype: torch.dtype) -> None:
    w = random_quantized(16, k, 64, "arbitrary")
    x = random(m, k, dtype=dtype)
    clean = x.clone()
    x[0, 3], x[0, 70] = torch.inf, torch.nan
    with running(H100):
        y = cuda.linear(x, *w.parts, None, 64)
        expected = cuda.linear(clean, *w.parts, None, 64)
    assert y[0].isnan().all()
    assert torch.equal(y[1:], expected[1:])


FILES = ("linear", "tensor", "grad_tensor", "product_plain", "results", "levels")

# What reaches every barrier and wait of the products: GPU, M, N, K, dtype.
BITING = [
    (H100, 1, 300, 4096, torch.float32),  # several chunks of rows to a block
    (H100, 12, 160, 1040, torch.float16),  # 4 stages
    (H100, 20, 160, 1040, torch.bfloat16),  # 3 stages
    (A100, 40, 160, 1040, torch.bfloat16),
    (RTX3090, 40, 160, 1040, torch.bfloat16),  # 2 stages
    (H100, 70, 160, 1152, torch.bfloat16),  # wgmma
    (T4, 12, 160, 1040, torch.float16),
    (H100, 12, 70, 100, torch.float32),
]


def test_no_barrier_or_wait_is_idle() -> None:
    weights = {n_k: random_quantized(*n_k, 32, "arbitrary") for n_k in {c[2:4] for c in BITING}}

    def all_good() -> bool:
        for gpu, m, n, k, dtype in BITING:
            for order in (0, 1, 2):
                with running(gpu, order):
                    try:
                        if not both_are_good(m, weights[n, k], 32, dtype):
                            return False
                    except RuntimeError:
                        return False
        return True

    assert all_good()
    ours = sorted(site for site in emulator().sites() if site.startswith(FILES))
    assert {site.split(":")[0] for site in ours} == {
        "linear_few_rows.cuh",
        "linear_wgmma.cuh",
        "tensor.cuh",
        "product_plain.cuh",
    }
    for site in ours:
        with emulator().without(site):
            assert not all_good(), f"{site} can be left out"
