"""The cases of `make bench-cpu` for pytest-benchmark: `pytest benchmarks`.

For tracking one machine over time (--benchmark-save, --benchmark-compare); the comparison of
systems, round by round, is bench_linear's.
"""

from itertools import count

import pytest
import torch

from benchmarks.inputs import random_generator, random_weight
from benchmarks.matmul_systems import Dense, Quantized, ReadLoop, Weights
from benchmarks.shapes import GPTJ, M_SHORT, Shape

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
DEVICE = torch.device("cpu")
SYSTEMS = ("read loop", "gptj_q8", "torch")


@pytest.fixture(scope="module", params=GPTJ, ids=lambda shape: shape.name)
def shape(request: pytest.FixtureRequest) -> Shape:
    return request.param


@pytest.fixture(scope="module", params=SYSTEMS)
def weights(request: pytest.FixtureRequest, shape: Shape) -> Weights:
    weight = random_weight(shape, DEVICE)
    if request.param == "read loop":
        return ReadLoop(weight)
    if request.param == "torch":
        return Dense(weight, torch.bfloat16)
    return Quantized(weight, "fitted", 256, "auto")


@pytest.mark.parametrize("m", M_SHORT)
@pytest.mark.parametrize("op", ["linear", "linear_grad_input"])
def test_product(op: str, m: int, weights: Weights, shape: Shape, benchmark) -> None:  # type: ignore[no-untyped-def]
    width = shape.k if op == "linear" else shape.n
    x = torch.randn(m, width, generator=random_generator(DEVICE)).bfloat16()
    call, copies, turn = getattr(weights, op), len(weights.copies), count()
    with torch.no_grad():
        benchmark(lambda: call(x, next(turn) % copies))
