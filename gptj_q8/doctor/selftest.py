"""Every op of every usable backend, on small random tensors, against the reference.

The reference is plain PyTorch on the CPU, in float32. A product in 16 bits may differ from it by
what rounding w and y explains, one in float32 by another order of the sums; codes, scales,
histograms and decoded weights are the same bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptj_q8 import backends, checks, codebooks
from gptj_q8.backends import reference
from gptj_q8.doctor.kernels import Served

N, K, BLOCK_SIZE = 96, 512, 64
ROWS = (1, 6, 40, 150)
"""Of x: backends have several kernels, for few rows and for many."""
FLOAT32_BOUND = 1e-5
ADAM = (0.01, 0.9, 0.99, 1e-8, 0.1)
"""lr, beta1, beta2, eps, weight_decay."""

Run = Callable[..., Any]
"""Runs an op, named first, with its arguments."""
Case = Callable[[Run, torch.device], list[Tensor]]
"""What an op gives, run so and on that device."""


@dataclass(frozen=True)
class Check:
    """One op of one backend, tried.

    backend: with the instruction set for `cpu`, as in "cpu:avx512".
    error: relative to the reference. failure: what was raised instead of a result.
    """

    op: str
    device: str
    backend: str
    dtype: str
    error: float | None
    bound: float
    failure: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error <= self.bound  # a NaN does not pass


def run_checks(device: torch.device, served: Sequence[Served]) -> Iterator[Check]:
    """Checks what is usable on a device: the backends of its table and those that serve there."""
    serving = {entry.backend for entry in served if entry.device == device.type}
    specialists = {"cpu": {"cpu"}, "cuda": {"cuda", "triton", "slabs"}}[device.type]
    names = [name for name in backends.NAMES if name in serving | specialists]
    usable = [name for name in names if backends.unavailable(name) is None]
    for op, dtype, case in _cases():
        expected = case(_run_reference, torch.device("cpu"))
        for name in usable:
            isas = backends.load(name).instruction_sets() if name == "cpu" else [None]
            for isa in isas if hasattr(backends.load(name), op) else []:
                error = failure = None
                try:
                    with _forced(name, isa):
                        error = _worst(case(_run_op, device), expected)
                except Exception as raised:  # whatever it is, the report tells of it and goes on
                    failure = f"{type(raised).__name__}: {raised}".splitlines()[0]
                label = f"{name}:{isa}" if isa else name
                bound = _bound(op, dtype)
                yield Check(op, device.type, label, _name(dtype), error, bound, failure)


@contextlib.contextmanager
def _forced(name: str, isa: str | None) -> Iterator[None]:
    with (
        backends.use(name),
        backends.load(name).force_isa(isa) if isa else contextlib.nullcontext(),
    ):
        yield


def _run_op(op: str, *args: Any) -> Any:
    return getattr(torch.ops.gptj_q8, op)(*args)


def _run_reference(op: str, *args: Any) -> Any:
    if op in ("linear", "linear_grad_input"):
        args = (args[0].float(), *args[1:])
    return getattr(reference, op)(*args)


def _cases() -> Iterator[tuple[str, torch.dtype, Case]]:
    """Op, dtype, and what computes with it: a function of how to run an op, and where."""
    for dtype in checks.FLOATS:
        for op, case in (
            ("quantize", _quantize),
            ("histogram", _histogram),
            ("dequantize", _dequantize),
            ("linear", _linear),
            ("linear_grad_input", _linear_grad_input),
            ("embedding", _embedding),
            ("adam_step_", _adam_step),
        ):
            yield op, dtype, functools.partial(case, dtype)


def _quantize(dtype: torch.dtype, run: Run, device: torch.device) -> list[Tensor]:
    weight, book = _random(N, K, device=device, dtype=dtype), codebooks.dynamic().to(device)
    return list(run("quantize", weight, book, BLOCK_SIZE))


def _histogram(dtype: torch.dtype, run: Run, device: torch.device) -> list[Tensor]:
    return [run("histogram", _random(N, K, device=device, dtype=dtype), BLOCK_SIZE, 1024)]


def _dequantize(dtype: torch.dtype, run: Run, device: torch.device) -> list[Tensor]:
    return [run("dequantize", *_quantized(device), BLOCK_SIZE, dtype)]


def _linear(dtype: torch.dtype, run: Run, device: torch.device) -> list[Tensor]:
    bias = _random(N, device=device, dtype=dtype)
    inputs = (_random(rows, K, device=device, dtype=dtype) for rows in ROWS)
    return [run("linear", x, *_quantized(device), bias, BLOCK_SIZE) for x in inputs]


def _linear_grad_input(dtype: torch.dtype, run: Run, device: torch.device) -> list[Tensor]:
    inputs = (_random(rows, N, device=device, dtype=dtype) for rows in ROWS)
    return [run("linear_grad_input", dy, *_quantized(device), BLOCK_SIZE) for dy in inputs]


def _embedding(dtype: torch.dtype, run: Run, device: torch.device) -> list[Tensor]:
    ids = torch.arange(0, 2 * N, 3, device=device) % N
    return [run("embedding", ids, *_quantized(device), BLOCK_SIZE, dtype)]


def _adam_step(dtype: torch.dtype, run: Run, device: torch.device) -> list[Tensor]:
    """Two steps: the second reads the moments that the first wrote."""
    param, grad = (_random(N * K, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    state = []
    books = [codebooks.dynamic().to(device), codebooks.dynamic_unsigned().to(device)]
    for book in books:
        zero = int((book == 0).nonzero()[0])
        state.append(torch.full((N * K,), zero, dtype=torch.uint8, device=device))
        state.append(torch.zeros(N * K // BLOCK_SIZE, device=device))
    for step in (1, 2):
        run("adam_step_", param, grad, *state, *books, *ADAM, step, BLOCK_SIZE)
    return [param]


def _random(
    *shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def _quantized(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """codes, absmax and codebook; the levels are such as bfloat16 holds."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (N, K), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(N * K // BLOCK_SIZE, generator=generator) + 0.5
    levels = codebooks.linear().bfloat16().float()
    return codes.to(device), absmax.to(device), levels.to(device)


def _bound(op: str, dtype: torch.dtype) -> float:
    if op in ("linear", "linear_grad_input", "adam_step_"):
        return max(FLOAT32_BOUND, torch.finfo(dtype).eps)
    return 0.0


def _worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    errors = [_error(f.cpu(), e) for f, e in zip(found, expected, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _error(found: Tensor, expected: Tensor) -> float:
    """Relative in norm; of whole numbers the share that differs."""
    if not expected.is_floating_point():
        return float((found != expected).double().mean())
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if difference else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
