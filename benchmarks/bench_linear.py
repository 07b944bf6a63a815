"""Times `linear` and `linear_grad_input` beside PyTorch, bitsandbytes and torchao.

    python -m benchmarks.bench_linear                         # GPT-J's shapes, M 1 to 512
    python -m benchmarks.bench_linear --m 1 --shapes fc_in --backend cpu reference
    python -m benchmarks.bench_linear --tiny --device cpu     # does it run at all?

All weights are cold and every system's numbers are checked before its time is taken.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import ours
from benchmarks.arguments import (
    add_system_options,
    chosen_dtypes,
    chosen_formats,
    make_bench,
    parser,
)
from benchmarks.harness import OURS, Case, Check, Maker, System, dtype_name, relative_error
from benchmarks.inputs import random_generator, random_weight
from benchmarks.matmul_systems import (
    BitsAndBytes,
    DecodeThenMultiply,
    Dense,
    Quantized,
    ReadLoop,
    TorchAo,
    TorchInt8,
    Weights,
)
from benchmarks.report import finish
from benchmarks.shapes import GPTJ, M_SHORT, M_TINY, SHAPES, TINY

OPS = ("linear", "linear_grad_input")
# Rows (for the gradient: columns) of the weight that a result is checked on.
CHECKED = 256
# The bound of DESIGN: float32 to 1e-5; half precision at most twice as far off as PyTorch.
FLOAT32_BOUND = 1e-5
TIMES_TORCH = 2.0
# Finds a peer that computes something else; rounding is its own affair.
PEER_BOUND = 0.02


def make_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    made = parser(module, doc)
    made.add_argument("--op", nargs="+", choices=OPS, default=["linear"])
    made.add_argument("--shapes", nargs="+", choices=SHAPES)
    made.add_argument("--m", nargs="+", type=int, help=f"tokens; {M_SHORT} unless given")
    add_system_options(made)
    return made


def main(argv: list[str]) -> int:
    options = make_parser("benchmarks.bench_linear", __doc__).parse_args(argv)
    bench = make_bench("benchmarks.bench_linear", options, argv)
    default = TINY if options.tiny else GPTJ
    shapes = [SHAPES[name] for name in options.shapes] if options.shapes else default
    for dtype in chosen_dtypes(options):
        baseline = f"torch {dtype_name(dtype)}"
        for shape in shapes:
            weight = random_weight(shape, options.device)
            loaders = {
                name: functools.cache(functools.partial(_Loaded, load))
                for name, load in _systems(weight, dtype, options)
            }
            for op in options.op:
                for m in options.m or (M_TINY if options.tiny else M_SHORT):
                    flops = 2 * m * shape.numel
                    case = Case(op, shape.name, m, shape.n, shape.k, dtype, flops, baseline)
                    bench.run(case, _makers(case, m, loaders, options.device))
    return finish(bench)


def _systems(
    weight: Tensor, dtype: torch.dtype, options: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], Weights]]]:
    """Name and constructor of every system, in the order of the table's columns."""
    yield "read loop", lambda: ReadLoop(weight)
    formats = chosen_formats(options)
    for codebook, block_size, suffix in formats:
        for backend in options.backend:
            name = ours.system_name(backend) + suffix
            yield name, functools.partial(Quantized, weight, codebook, block_size, backend)
    yield f"torch {dtype_name(dtype)}", lambda: Dense(weight, dtype)
    if weight.device.type == "cpu" and dtype != torch.float32:
        yield "torch float32", lambda: Dense(weight, torch.float32)
    codebook, block_size, _ = formats[0]
    yield "decode + torch", lambda: DecodeThenMultiply(weight, codebook, block_size, "auto")
    yield "torch int8", lambda: TorchInt8(weight, dtype)
    yield "bitsandbytes", lambda: BitsAndBytes(weight, dtype, block_size)
    yield "torchao int8", lambda: TorchAo(weight, dtype)


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
