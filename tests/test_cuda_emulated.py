"""The CUDA kernels on the CPU: what is special to the emulation, and that it notices mistakes.

That the numbers are right is in test_ops_*.py ("cuda:emulated") and, for the products on GPUs of
several kinds, in test_cuda_products.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BLOCK_SIZES, DTYPES, TABLES, random_quantized
from cuda_emulation import SANITIZED, emulator
from cuda_gpus import FAST, GPUS, ODD, both_are_good, running
from torch import Tensor

from gptj_q8 import codebooks
from gptj_q8.backends import cuda, reference

ROOT = Path(__file__).parent.parent
NUMEL = 2 * 4096 + 33
"""Two tiles of the elementwise kernels, and a third with a run and one element."""


def simple_ops(backend, block_size: int, dtype: torch.dtype, offset: int = 0) -> list[Tensor]:
    """Every op but the products. offset: by how many elements the tensors miss alignment."""
    generator = torch.Generator().manual_seed(0)

    def moved(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(offset), t])[offset:]

    table, positive = TABLES["arbitrary"](), TABLES["arbitrary"]().abs().sort().values
    weight, grad = (moved(torch.randn(NUMEL, generator=generator).to(dtype)) for _ in range(2))
    weight[:4096] *= 1e-3
    weight[4096 : 4096 + block_size] = 0
    codes, absmax = backend.quantize(weight, table, block_size)
    codes = moved(codes)
    matrix = codes[: 25 * 328].view(25, 328)
    scales = absmax[: -(-matrix.numel() // block_size)]
    ids = torch.tensor([24, 0, 7])
    param, moments = weight.clone(), [codes.clone(), absmax.clone(), codes.clone(), absmax + 1]
    backend.adam_step_(
        param, grad, *moments, table, positive, 1e-3, 0.9, 0.999, 1e-8, 0.1, 2, block_size
    )
    return [
        codes,
        absmax,
        backend.histogram(weight, block_size, 1024),
        backend.dequantize(codes, absmax, table, block_size, dtype),
        backend.embedding(ids, matrix, scales, table, block_size, dtype),
        backend.embedding(ids.int(), matrix.view(100, 82), scales, table, block_size, dtype),
        param,
        *moments,
    ]


def agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    """All bits but those of Adam's results, where the reference rounds in another order."""
    exact = all(map(torch.equal, found[:6], expected[:6]))
    return exact and all(
        torch.allclose(a.float(), b.float(), rtol=0.02, atol=1.01 if a.dtype == torch.uint8 else 0)
        for a, b in zip(found[6:], expected[6:], strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [*BLOCK_SIZES, 512, 1024])
def test_simple_ops_in_every_order(block_size: int, dtype: torch.dtype) -> None:
    for offset in (0, 1):
        expected = simple_ops(reference, block_size, dtype, offset)
        for order in range(4):
            with running(GPUS[0], order):
                found = simple_ops(cuda, block_size, dtype, offset)
            assert agree(found, expected), f"offset {offset}, order {order}"


def test_adam_takes_parameter_and_gradient_of_any_two_dtypes() -> None:
    table, positive = codebooks.dynamic(), codebooks.dynamic_unsigned()
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 300, generator=generator).bfloat16().half()  # exact in all three
    codes, absmax = reference.quantize(values[0], table, 32)
    for param_dtype in DTYPES:
        for grad_dtype in DTYPES:
            results = []
            for backend in (cuda, reference):
                param, state = values[0].to(param_dtype), [codes.clone(), absmax + 1] * 2
                state = [s.clone() for s in state]
                with emulator().force():
                    backend.adam_step_(
                        param, values[1].to(grad_dtype), *state, table, positive,
                        1e-3, 0.9, 0.999, 1e-8, 0.1, 2, 32,
                    )  # fmt: skip
                results.append(param)
            bound = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[param_dtype]
            torch.testing.assert_close(*results, rtol=bound, atol=1e-6)


def test_no_barrier_of_the_simple_ops_is_idle() -> None:
    sizes = (32, 4096)
    expected = {size: simple_ops(reference, size, torch.float32) for size in sizes}

    def right() -> bool:
        try:
            for order in range(3):
                with running(GPUS[0], order):
                    for size in sizes:
                        if not agree(simple_ops(cuda, size, torch.float32), expected[size]):
                            return False
        except RuntimeError:
            return False
        return True

    assert right()
    files = {"dequantize.cu", "quantize.cu", "embedding.cu", "adam_step.cu", "tile.cuh"}
    sites = [site for site in emulator().sites() if site.split(":")[0] in files]
    assert {site.split(":")[0] for site in sites} == files
    for site in sites:
        with emulator().without(site):
            assert not right(), f"{site} can be left out"


ORDERING = (
    "sync_threads(",
    "sync_warp(",
    "copy_async_wait<",
    "fence_async_proxy(",
    "wgmma_fence(",
    "wgmma_wait(",
)


def test_every_barrier_and_wait_in_the_sources_was_reached() -> None:
    """What the two tests that leave them out have looked at is all there is."""
    reach_every_kernel()
    written = {
        f"{path.name}:{number}"
        for path in (ROOT / "csrc" / "cuda").iterdir()
        if path.name not in ("primitives.cuh", "wgmma.cuh")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(name in line for name in ORDERING)
    }
    assert emulator().sites() == written


def reach_every_kernel() -> None:
    for dtype in DTYPES:
        with running(GPUS[0]):
            for block_size in (32, 4096):
                simple_ops(cuda, block_size, dtype)
            w = random_quantized(3, 40, 32).parts
            for ids in (torch.tensor([0]), torch.tensor([0], dtype=torch.int32)):
                cuda.embedding(ids, *w, 32, dtype)
        for gpu in GPUS:
            for m, n, k in FAST + ODD:
                with running(gpu):
                    assert both_are_good(m, random_quantized(n, k, 64), 64, dtype)
    test_adam_takes_parameter_and_gradient_of_any_two_dtypes()


def test_an_id_out_of_range_is_an_assertion_on_the_device() -> None:
    w = random_quantized(5, 40, 32)
    for bad in (-1, 5):
        with (
            emulator().force(),
            pytest.raises(RuntimeError, match=r"embedding.cu:\d+: an id is out of range"),
        ):
            cuda.embedding(torch.tensor([0, bad]), *w.parts, 32, torch.float32)


def sanitized(*arguments: str) -> subprocess.CompletedProcess:
    """A process with AddressSanitizer under everything: PyTorch's buffers are exact there."""
    emulator()
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan", "libubsan", "libstdc++")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
        SANITIZED: "1",
        "PYTHONPATH": str(ROOT / "tests"),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


MISTAKES = [
    ("misaligned load", "a 16-byte load is not aligned to 16"),
    ("barrier in one branch", "threads wait at different barriers"),
    ("thread that leaves early", "threads wait for others that have ended"),
    ("copy never waited for", "a cp.async that it never waited for"),
    ("too much shared memory", "no GPU takes such a launch"),
    ("factor changed while it is multiplied", "A was changed before the wait"),
    ("tile changed while it is multiplied", "B changed before the wait"),
    ("tile read before the fence", "wgmma reads shared memory before a fence.proxy.async"),
    ("product never waited for", "a wgmma that it never waited for"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_a_mistake_is_noticed(mistake: str, message: str) -> None:
    assert message in emulator().make_mistake(mistake)


@pytest.mark.parametrize("mistake", ["copy read at once", "product read at once"])
def test_what_is_read_before_its_wait_is_not_there(mistake: str) -> None:
    assert emulator().make_mistake(mistake) == "read NaN"


@pytest.mark.parametrize("mistake", ["read past shared memory", "write past global memory"])
def test_a_byte_out_of_bounds_is_caught(mistake: str) -> None:
    code = f"from cuda_emulation import emulator; emulator().make_mistake('{mistake}')"
    done = sanitized("-c", code)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "mistakes.cpp" in done.stderr, "the report names the line"


@pytest.mark.skipif(bool(os.environ.get(SANITIZED)), reason="is what the sanitized process runs")
def test_kernels_are_clean_under_sanitizers() -> None:
    """Every kernel, every dtype, sizes that end anywhere: what reads or writes exact buffers."""
    chosen = "order or every_barrier or two_dtypes or test_products or begin_anywhere or bias"
    files = ["tests/test_cuda_emulated.py", "tests/test_cuda_products.py"]
    done = sanitized("-m", "pytest", "-p", "no:cacheprovider", "-x", "-k", chosen, *files)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout
