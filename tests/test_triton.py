"""The Triton kernels without a GPU: the matrix of test_ops_*.py under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_quantized
from torch._subclasses.fake_tensor import FakeTensorMode

from gptj_q8 import backends, ops

ROOT = Path(__file__).parent.parent


def test_the_matrix_in_the_interpreter(device: torch.device) -> None:
    """In a process of its own: where the interpreter is on, nothing can be compiled."""
    if device.type != "cpu":
        pytest.skip(f"the device is {device}: test_ops_*.py run the compiled kernels on it")
    options = ["-p", "no:cacheprovider", "-k", "triton or tune"]
    matrix = [str(path) for path in sorted(Path(__file__).parent.glob("test_ops_*.py"))]
    files = [*matrix, "tests/test_tune.py", "tests/test_large.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_long_sums_of_few_columns_are_split(m: int, dtype: torch.dtype) -> None:
    """Which those of test_ops_products.py are for; in the interpreter, too."""
    pytest.importorskip("triton")
    from gptj_q8.backends.triton.linear import linear_gemv_kernel, plan_linear, table_tile

    for family in ("sm80", "sm90"):
        tile = table_tile(dtype, family, m, 32768, 256)
        plan = plan_linear(tile, m, 3, 32768, 256, wanted=8)
        assert (plan.kernel, plan.splits > 1) == (linear_gemv_kernel, True)


@pytest.mark.parametrize(
    ("capabilities", "reason"),
    [
        ([(6, 0)], "does not compile for compute capability 6.0, only for 7.5 and newer"),
        ([(6, 1), (7, 0)], "does not compile for compute capability 7.0"),
        ([(6, 1), (7, 5)], None),
        ([(9, 0)], None),
    ],
)
def test_gpus_too_old_for_triton_are_refused(
    capabilities: list[tuple[int, int]], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a call would end in an error of its compiler."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.version, "hip", None)
    found = backends.load("triton").unavailable()
    assert found == reason or (reason is not None and reason in found)


def test_without_a_gpu_the_backend_says_what_to_do() -> None:
    reason = backends.unavailable("triton")
    if torch.cuda.is_available() or backends.load("triton").interpreted():
        assert reason is None
    else:
        assert reason is not None
        assert "TRITON_INTERPRET=1" in reason


def test_a_cuda_model_is_traced_whole_without_a_gpu() -> None:
    """One graph, no value looked at, whatever the batch: what CUDA graphs need as well."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=keep, dynamic=True)
    def step(ids: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        rows = ops.embedding(ids, *w, 256, torch.float16)
        y = ops.linear(rows, *w, None, 256)
        return ops.linear_grad_input(y, *w, 256) + ops.dequantize(*w, 256, torch.float16).sum(0)

    torch._dynamo.reset()
    with FakeTensorMode():
        w = [
            torch.empty(512, 512, dtype=torch.uint8, device="cuda"),
            torch.empty(1024, device="cuda"),
            torch.empty(256, device="cuda"),
        ]
        for batch in (1, 5, 64):
            y = step(torch.empty(batch, 3, dtype=torch.int64, device="cuda"), *w)
            assert (y.shape, y.dtype, y.device.type) == ((batch, 3, 512), torch.float16, "cuda")
    assert 1 <= len(graphs) <= 2, "compiled anew for every batch (1 may be special)"
    for graph in graphs:
        assert not any("item" in str(node.target) for node in graph.graph.nodes)


def test_products_in_a_cuda_graph(device: torch.device) -> None:
    """Captured once and replayed on other inputs, the fused kernels and the slabs."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU: run with --device cuda")
    w = random_quantized(1024, 512, 256).to(device)
    for m in (1, 16, 2048):
        x = torch.zeros(m, 512, dtype=torch.float16, device=device)
        for _ in range(2):  # compiles, and warms the allocator
            ops.linear(x, *w.parts, None, 256)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.linear(x, *w.parts, None, 256)
        x.normal_()
        graph.replay()
        assert torch.equal(y, ops.linear(x, *w.parts, None, 256))
