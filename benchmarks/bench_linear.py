"""`linear` and `linear_grad_input`, beside PyTorch, bitsandbytes, torchao and optimum-quanto."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import ours
from benchmarks.harness import (
    OURS,
    Case,
    Cases,
    Check,
    Maker,
    Selection,
    System,
    dtype_name,
    relative_error,
)
from benchmarks.inputs import random_generator, random_weight
from benchmarks.matmul_systems import (
    BitsAndBytes,
    DecodeThenMultiply,
    Dense,
    Linear8bitLt,
    Quantized,
    Quanto,
    ReadLoop,
    TorchAo,
    TorchInt8,
    Weights,
)
from benchmarks.shapes import GPTJ, M_SHORT, M_TINY, SHAPES, TINY, Shape

# Rows (for the gradient: columns) of the weight that a result is checked on.
CHECKED = 256
# The bound of DESIGN: float32 to 1e-5; half precision at most twice as far off as PyTorch.
FLOAT32_BOUND = 1e-5
TIMES_TORCH = 2.0
# Finds a peer that computes something else; rounding is its own affair.
PEER_BOUND = 0.02


def cases(op: str, selection: Selection) -> Cases:
    """op: "linear" or "linear_grad_input"."""
    default = TINY if selection.tiny else GPTJ
    shapes = [SHAPES[name] for name in selection.shapes] if selection.shapes else default
    for dtype in selection.dtypes:
        baseline = f"torch {dtype_name(dtype)}"
        for shape in shapes:
            loaders = {
                name: functools.cache(functools.partial(_Loaded, load))
                for name, load in _systems(shape, dtype, selection)
            }
            for m in selection.m or (M_TINY if selection.tiny else M_SHORT):
                flops = 2 * m * shape.numel
                case = Case(op, shape.name, m, shape.n, shape.k, dtype, flops, baseline)
                yield case, _makers(case, m, loaders, selection.device)


def _systems(
    shape: Shape, dtype: torch.dtype, selection: Selection
) -> Iterator[tuple[str, Callable[[], Weights]]]:
    """Name and constructor of every system, in the order of the table's columns."""
    weight = functools.cache(functools.partial(random_weight, shape, selection.device))

    def load(kind: Callable[..., Weights], *arguments: Any) -> Callable[[], Weights]:
        return lambda: kind(weight(), *arguments)

    yield "read loop", load(ReadLoop)
    formats = selection.named_formats()
    for book, size, suffix in formats:
        for backend in selection.backends:
            yield ours.system_name(backend) + suffix, load(Quantized, book, size, backend)
    yield f"torch {dtype_name(dtype)}", load(Dense, dtype)
    if selection.device.type == "cpu" and dtype != torch.float32:
        yield "torch float32", load(Dense, torch.float32)
    book, size, _ = formats[0]
    yield "decode + torch", load(DecodeThenMultiply, book, size, "auto")
    yield "torch int8", load(TorchInt8, dtype)
    yield "bitsandbytes", load(BitsAndBytes, dtype, size)
    yield "Linear8bitLt", load(Linear8bitLt, dtype)
    yield "torchao int8", load(TorchAo, dtype)
    yield "quanto int8", load(Quanto, dtype)


class _Loaded:
    """A system's weights and, in float64, the part of their decoded values that checks use."""

    def __init__(self, load: Callable[[], Weights]) -> None:
        self.weights = load()
        decoded = self.weights.decoded()
        self.checked = decoded is not None
        if decoded is not None:
            self.rows, self.columns = (_spread(size, decoded.device) for size in decoded.shape)
            self.of_rows = decoded[self.rows].double()  # [CHECKED, K]
            self.of_columns = decoded[:, self.columns].double()  # [N, CHECKED]

    def check(self, op: str, x: Tensor, is_ours: bool) -> Check:
        """Compares copy 0's result with the float64 product of the decoded weights."""
        if op == "linear":
            got = self.weights.linear(x, 0)[:, self.rows]
            exact = x.double() @ self.of_rows.T
            torch_error = relative_error(F.linear(x, self.of_rows.to(x.dtype)), exact)
        else:
            got = self.weights.linear_grad_input(x, 0)[:, self.columns]
            exact = x.double() @ self.of_columns
            torch_error = relative_error(x @ self.of_columns.to(x.dtype), exact)
        bound = FLOAT32_BOUND if x.dtype == torch.float32 else TIMES_TORCH * torch_error
        return Check(relative_error(got, exact), bound if is_ours else PEER_BOUND)


def _makers(
    case: Case, m: int, loaders: Mapping[str, Callable[[], _Loaded]], device: torch.device
) -> dict[str, Maker]:
    width_in, width_out = (case.k, case.n) if case.op == "linear" else (case.n, case.k)

    @functools.cache
    def x() -> Tensor:
        generator = random_generator(device)
        return torch.randn(m, width_in, generator=generator, device=device).to(case.dtype)

    def make(name: str, load: Callable[[], _Loaded]) -> System:
        loaded, source = load(), x()
        product = getattr(loaded.weights, case.op)
        moved = m * (width_in + width_out) * case.dtype.itemsize
        return System(
            call=lambda i: product(source, i),
            copies=len(loaded.weights.copies),
            bytes=loaded.weights.bytes + (moved if loaded.checked else 0),
            check=(
                functools.partial(loaded.check, case.op, source, name.startswith(OURS))
                if loaded.checked
                else None
            ),
            block_size=loaded.weights.block_size,
            codebook=loaded.weights.codebook,
        )

    return {name: functools.partial(make, name, load) for name, load in loaders.items()}


def _spread(size: int, device: torch.device) -> Tensor:
    """Up to CHECKED indices spread over range(size), both ends among them."""
    return torch.linspace(0, size - 1, min(size, CHECKED), device=device).round().long().unique()
