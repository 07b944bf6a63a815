"""GPUs of several kinds, to run the CUDA products for on the CPU; sizes that reach every kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import Quantized, is_good, random
from cuda_emulation import emulator

from gptj_q8.backends import cuda


@dataclass(frozen=True)
class Gpu:
    """Few multiprocessors, so that small products are split and blocks take several turns."""

    name: str
    processors: int
    shared_kb: int
    capability: int

    def __str__(self) -> str:
        return self.name


T4 = Gpu("T4", 3, 64, 75)
A100 = Gpu("A100", 5, 163, 80)
RTX3090 = Gpu("RTX3090", 2, 99, 86)
H100 = Gpu("H100", 4, 227, 90)
GPUS = (T4, A100, RTX3090, H100)

# M, N, K. K a multiple of 16: the fast kernels. Rows shorter than a slice or step, tails of N as
# lm_head's (50400 is 96 more than a multiple of 128), several tiles of M, sums that are split.
FAST = [
    (1, 1, 16),
    (1, 37, 48),
    (1, 300, 528),
    (2, 50, 4096),
    (3, 9, 8976),
    (5, 130, 256),
    (6, 40, 4096),
    (8, 224, 144),
    (13, 200, 1040),
    (17, 96, 512),
    (33, 136, 272),
    (70, 136, 96),
    (130, 72, 160),
    (20, 1032, 128),
    (9, 2056, 16),
    # K a multiple of 128 and many rows: H100's wgmma, with tails of M and N.
    (37, 200, 256),
    (64, 130, 1024),
    (65, 96, 640),
    (130, 264, 384),
]
# Any size: one element; rows that no vector fits; N that no vector of dy fits.
ODD = [(1, 1, 1), (5, 33, 33), (40, 70, 100), (19, 129, 64), (66, 31, 257)]


@contextlib.contextmanager
def running(gpu: Gpu, order: int = 0) -> Iterator[None]:
    with emulator().force(), emulator().on(gpu.processors, gpu.shared_kb, gpu.capability):
        emulator().set_order(order)
        try:
            yield
        finally:
            emulator().set_order(0)


def both_are_good(m: int, w: Quantized, block_size: int, dtype: torch.dtype) -> bool:
    n, k = w.truth.shape
    x, dy, bias = random(m, k, dtype=dtype), random(m, n, dtype=dtype), random(n, dtype=dtype)
    weight = w.truth.to(dtype)
    y = cuda.linear(x, *w.parts, bias, block_size)
    dx = cuda.linear_grad_input(dy, *w.parts, block_size)
    assert (y.shape, y.dtype) == ((m, n), dtype)
    assert (dx.shape, dx.dtype) == ((m, k), dtype)
    return is_good(y, F.linear(x, weight, bias), x.double() @ w.truth.T + bias.double()) and (
        is_good(dx, dy @ weight, dy.double() @ w.truth)
    )
