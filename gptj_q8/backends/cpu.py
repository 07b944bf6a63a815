"""The `cpu` backend: the ops in C++ (csrc/cpu), for each instruction set this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptj_q8.backends.compiled import Compiled

_library = Compiled("cpu", "with a C++ compiler present")
quantize = _library.quantize
histogram = _library.histogram
dequantize = _library.dequantize
embedding = _library.embedding
linear = _library.linear
linear_grad_input = _library.linear_grad_input
adam_step_ = _library.adam_step_


def unavailable() -> str | None:
    """Why the compiled library cannot be used and what to do; None when it can."""
    return _library.unavailable


def instruction_set() -> str:
    """The instruction set that serves calls now, such as "avx512" or "portable"."""
    return _library.ops.isa()


def instruction_sets() -> list[str]:
    """The instruction sets that this build has and this CPU can run, best first."""
    return _library.ops.usable_isas().split()


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Within it one instruction set serves all calls of the process: for tests and timing."""
    before = instruction_set()
    _library.ops.set_isa(name)
    try:
        yield
    finally:
        _library.ops.set_isa(before)
