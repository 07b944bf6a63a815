"""What the machine itself can do: the lines that kernels are compared with.

    python -m benchmarks.ceilings --device cuda --json out.json

- read_gb_per_s (CPU): a sum over cold memory, which runs at memory speed on any core with vector
  instructions; it is what streaming the codes is compared with.
- copy_gb_per_s: a copy of cold memory, bytes read plus bytes written.
- matmul_<dtype>_tflop_per_s: a large square product through PyTorch, on random data (zeros run
  faster than any real matrix). A better kernel, or one in integers, can cross this line.
"""

import functools
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.arguments import parser, set_threads
from benchmarks.cold import TIMES_CACHE, last_level_cache
from benchmarks.harness import dtype_name
from benchmarks.inputs import random_generator
from benchmarks.machine import new_results
from benchmarks.timing import Call, clock_for, compare

# Fills any GPU: 1.1e12 operations, in float16 about 1.5 ms on an H100 and 20 ms on a T4.
MATMUL_SIDE = {"cuda": 8192, "cpu": 2048}
TINY_SIDE = 64
CPU_DTYPES = (torch.float32, torch.bfloat16)
CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def read_all(buffer: Tensor) -> Tensor:
    """Reads every byte of a buffer (uint8, whole 4-byte words) at memory speed.

    A sum, since PyTorch has no plain read; of int32, since every bit pattern adds equally fast.
    """
    return buffer.view(torch.int32).sum(dtype=torch.int32)


def measure(device: torch.device, tiny: bool) -> Iterator[tuple[str, float]]:
    """Name and value of each ceiling, in the unit that the name ends with."""
    nbytes = 2**16 if tiny else _buffer_bytes(device)
    if device.type == "cpu":
        yield "read_gb_per_s", _read_gb_per_s(device, nbytes)
    yield "copy_gb_per_s", _copy_gb_per_s(device, nbytes)

    generator = random_generator(device)
    side = TINY_SIDE if tiny else MATMUL_SIDE[device.type]
    for dtype in CUDA_DTYPES if device.type == "cuda" else CPU_DTYPES:
        a, b = torch.randn(2, side, side, generator=generator, device=device).to(dtype)
        seconds = _seconds(device, functools.partial(_multiply, a, b))
        name = dtype_name(dtype)
        yield f"matmul_{name}_tflop_per_s", 2 * side**3 / seconds / 1e12


def stream_gb_per_s(device: torch.device, nbytes: int) -> float:
    """What streaming weights is compared with: a read loop on a CPU, a copy on a GPU."""
    return (_read_gb_per_s if device.type == "cpu" else _copy_gb_per_s)(device, nbytes)


def _read_gb_per_s(device: torch.device, nbytes: int) -> float:
    buffer = _random_bytes(device, nbytes)
    return nbytes / _seconds(device, lambda _: read_all(buffer)) / 1e9


def _copy_gb_per_s(device: torch.device, nbytes: int) -> float:
    buffer = _random_bytes(device, nbytes)
    target = torch.empty_like(buffer)
    return 2 * nbytes / _seconds(device, lambda _: target.copy_(buffer)) / 1e9


def _random_bytes(device: torch.device, nbytes: int) -> Tensor:
    return torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)


def _buffer_bytes(device: torch.device) -> int:
    """Several times the cache, and at least as large as the largest matrix of GPT-J in 8 bits."""
    least = 2 * TIMES_CACHE * last_level_cache(device)
    return max(least, 2**28) // 4096 * 4096


def _multiply(a: Tensor, b: Tensor, i: int) -> Tensor:
    return a @ b


def _seconds(device: torch.device, call: Call) -> float:
    return compare({"it": call}, clock=clock_for(device))["it"].median


def main(argv: list[str]) -> int:
    options = parser("benchmarks.ceilings", __doc__).parse_args(argv)
    set_threads(options)
    results = new_results(options.device, "benchmarks.ceilings", argv)
    begun = time.monotonic()
    for name, value in measure(options.device, options.tiny):
        print(f"{name:32} {value:10.4g}", flush=True)
        results.ceilings[name] = value
        if options.json:
            results.write(options.json)
        if time.monotonic() - begun > options.seconds:
            break
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
