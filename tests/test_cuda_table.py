"""The table for GPUs against estimates of what it chooses: none is slower than what it avoids."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from cases import triton_is_interpreted

from benchmarks.shapes import GPTJ, Shape
from gptj_q8.backends import cuda_table

if triton_is_interpreted():
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

from benchmarks import cuda_budget
from benchmarks.gpu_code import product_launch
from benchmarks.triton_budget import GPUS, budget

BLOCK = 256
ROWS = (1, 2, 4, 5, 8, 16, 17, 32, 64, 65, 128, 256, 257, 512, 1024, 2048, 4096)
# Float16 on tensor cores, dense: NVIDIA's data sheets. A large product reaches some 70 % of it.
PEAK = {"T4": 65e12, "A100-80": 312e12, "H100": 989e12}
CAPABILITY = {"T4": (7, 5), "A100-80": (8, 0), "H100": (9, 0)}


@pytest.fixture(autouse=True)
def on_a_gpu_of_the_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.version, "hip", None)
    cuda_table._family.cache_clear()
    yield
    cuda_table._family.cache_clear()


def chosen(
    op: str, gpu: str, rows: int, shape: Shape, missing: str, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The backend that serves float16 where one is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITY[gpu])
    monkeypatch.setattr(cuda_table, "_has_wgmma", lambda device: missing == "none")
    side = shape.k if op == "linear" else shape.n
    x = torch.empty(rows, side, dtype=torch.float16, device="meta")
    codes = torch.empty(shape.n, shape.k, dtype=torch.uint8, device="meta")
    return next(name for name in cuda_table.preference(op, (x, codes)) if name != missing)


def product_s(gpu: str, rows: int) -> float:
    """Of the multiplications, for each weight."""
    return 2 * rows / (0.7 * PEAK[gpu])


def decode_then_multiply_s(gpu: str, rows: int) -> float:
    """For each weight: its code is read, and two bytes are written and read again."""
    return (1 + 4 / BLOCK + 2 + 2) / GPUS[gpu].bandwidth + product_s(gpu, rows)


def fused_s(backend: str, op: str, gpu: str, rows: int, shape: Shape) -> float:
    """For each weight, from the machine code's budget: the codes go through once for each tile of
    rows, and nothing hides the multiplications."""
    facts = GPUS[gpu]
    read_s = (1 + 4 / BLOCK) / facts.bandwidth
    if backend == "cuda":
        kernel = cuda_budget.kernel_for(op, gpu, rows)
        return read_s / cuda_budget.budget(kernel, gpu, rows).reach + product_s(gpu, rows)
    launch = product_launch(op, facts.target, torch.float16, rows, shape.n, shape.k, BLOCK)
    let_through = budget(facts, launch, torch.float16, BLOCK)
    tiles = -(-rows // launch.constants["TILE_M"])
    rate = min(let_through.issue, let_through.shared) * facts.processors * facts.clock
    return max(read_s, tiles / rate) + product_s(gpu, rows)


@pytest.mark.parametrize("missing", ["cuda", "none"])
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("op", ["linear", "linear_grad_input"])
def test_no_choice_is_slower_than_decode_then_multiply(
    op: str, gpu: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By estimate. 5 % are left to rounding in it."""
    served = set()
    for shape in GPTJ:
        for rows in ROWS:
            backend = chosen(op, gpu, rows, shape, missing, monkeypatch)
            served.add(backend)
            if backend == "slabs":  # it is decode-then-multiply, from the cache
                continue
            if backend == "cuda" and shutil.which("nvcc") is None:
                pytest.skip("no nvcc to compile the CUDA kernels")
            estimate = fused_s(backend, op, gpu, rows, shape)
            limit = 1.05 * decode_then_multiply_s(gpu, rows)
            assert estimate <= limit, f"{backend}, {shape.name}, {rows} rows"
    assert "slabs" in served
    # Triton has no tensor cores on T4.
    assert served - {"slabs"} or (op, gpu, missing) == ("linear_grad_input", "T4", "cuda")


@pytest.mark.parametrize("op", ["linear", "linear_grad_input"])
@pytest.mark.parametrize("gpu", GPUS)
def test_from_some_rows_on_it_is_slabs(op: str, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One switch, the same for every shape of GPT-J, and slabs at the end of every order."""
    for missing in ("cuda", "none"):
        orders = {
            tuple(chosen(op, gpu, rows, shape, missing, monkeypatch) == "slabs" for rows in ROWS)
            for shape in GPTJ
        }
        assert len(orders) == 1
        (order,) = orders
        assert list(order) == sorted(order)
        assert order[-1]


def test_an_h100_takes_more_rows_where_wgmma_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITY["H100"])
    codes = torch.empty(4096, 4096, dtype=torch.uint8, device="meta")
    for compiled, expected in ((False, "triton"), (True, "cuda")):
        monkeypatch.setattr(cuda_table, "_has_wgmma", lambda device, it=compiled: it)
        first = [
            cuda_table.preference(
                "linear", (torch.empty(rows, 4096, dtype=dtype, device="meta"), w)
            )[0]
            for rows, dtype, w in (
                (128, torch.bfloat16, codes),
                (129, torch.bfloat16, codes),
                (128, torch.float32, codes),
            )
        ]
        assert first == [expected, "triton", "triton"]


def test_float32_never_goes_to_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting may turn its products into TF32."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    codes = torch.empty(64, 64, dtype=torch.uint8, device="meta")
    for rows in ROWS:
        x = torch.empty(rows, 64, device="meta")
        for op in ("linear", "linear_grad_input"):
            assert "slabs" not in cuda_table.preference(op, (x, codes))
