"""Every op on the CPU for pytest-benchmark: `pytest benchmarks`, grouped by case.

For tracking one machine over time (--benchmark-save, --benchmark-compare) and for a look at a few
cases (-k "linear and attention"). The comparison of systems, round by round, is benchmarks.ops's.
"""

import functools
from collections.abc import Mapping
from itertools import count

import pytest
import torch

from benchmarks import registry
from benchmarks.harness import Case, Maker, Selection, UnavailableError

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")


@functools.lru_cache(maxsize=1)
def cases(op: str, shape: str | None, tiny: bool) -> list[tuple[Case, Mapping[str, Maker]]]:
    """An op's cases on one shape, which share their weights; those of the last shape are freed."""
    chosen = Selection(
        torch.device("cpu"), (torch.bfloat16,), (shape,) if shape else None, tiny=tiny
    )
    return list(registry.cases([op], chosen))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    tiny = metafunc.config.getoption("--tiny")
    metafunc.parametrize(
        ("op", "shape", "number", "system"),
        [
            pytest.param(op, shape, number, system, id=f"{case.label} {system}")
            for op in registry.OPS
            for shape in dict.fromkeys(case.shape for case, _ in cases(op, None, tiny))
            for number, (case, makers) in enumerate(cases(op, shape, tiny))
            for system in makers
        ],
    )


def test_op(op: str, shape: str, number: int, system: str, benchmark, request) -> None:  # type: ignore[no-untyped-def]
    case, makers = cases(op, shape, request.config.getoption("--tiny"))[number]
    benchmark.group = case.label
    with torch.no_grad():
        try:
            made = makers[system]()
            check = made.check() if made.check else None
        except UnavailableError as error:
            pytest.skip(str(error))
        if check:
            assert check.error <= check.bound, f"{system} is wrong: no time for it"
        turn = count()
        benchmark(lambda: made.call(next(turn) % made.copies))
