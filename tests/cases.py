"""Quantized weights to test with, their truth by NumPy and float64, and the backends to test on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cuda_emulation import emulator
from torch import Tensor

from gptj_q8 import backends, codebooks, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK_SIZES = [32, 64, 256, 4096]
EMULATED = "cuda:emulated"
"""The CUDA kernels, run on the CPU."""
NEEDS_CPU_KERNELS = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason=f"cpu backend: {backends.unavailable('cpu')}"
)


@dataclass
class Quantized:
    """A random quantized matrix [n, k] and its truth, decoded here and in float64."""

    codes: Tensor
    absmax: Tensor
    codebook: Tensor
    block_size: int
    truth: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.absmax, self.codebook

    def to(self, device: torch.device) -> Quantized:
        moved = [part.to(device) for part in self.parts]
        return Quantized(*moved, self.block_size, self.truth.to(device))


def random_quantized(
    n: int, k: int, block_size: int, codebook: str = "dynamic", seed: int = 0
) -> Quantized:
    """Codes and scales drawn at random; the scales span a factor of 100, some are 0."""
    generator = np.random.default_rng([seed, n, k, block_size])
    codes = generator.integers(0, 256, (n, k), dtype=np.uint8)
    blocks = -(-n * k // block_size)
    absmax = np.exp(generator.uniform(-4.6, 0, blocks)).astype(np.float32)
    absmax[generator.random(blocks) < 0.1 * (blocks > 3)] = 0
    table = TABLES[codebook]()
    decoded = table.numpy()[codes.ravel()] * np.repeat(absmax, block_size)[: n * k]
    return Quantized(
        torch.from_numpy(codes),
        torch.from_numpy(absmax),
        table,
        block_size,
        torch.from_numpy(decoded.astype(np.float64)).view(n, k),
    )


def _gaussian_levels() -> Tensor:
    """256 levels as `fitted` would choose: bfloat16 values, denser around 0."""
    steps = torch.linspace(-1, 1, 255, dtype=torch.float64)
    levels = (steps.sign() * steps.abs() ** 1.5).to(torch.bfloat16).float()
    return torch.cat([levels, torch.zeros(1)]).sort().values


def _arbitrary_levels() -> Tensor:
    """256 levels that no 16-bit dtype holds exactly."""
    levels = torch.linspace(-1, 1, 255, dtype=torch.float64) * 0.987654321
    return torch.cat([levels.float(), torch.zeros(1)]).sort().values


TABLES = {
    "dynamic": codebooks.dynamic,
    "gaussian": _gaussian_levels,
    "arbitrary": _arbitrary_levels,
}


def tables(case: int) -> list[str]:
    """The codebooks to try a case on: all, but in the slow interpreter one, by turns."""
    return [list(TABLES)[case % len(TABLES)]] if triton_is_interpreted() else list(TABLES)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth||, and 0 for 0 / 0. float64."""
    error = (actual.double() - truth).norm().item()
    return error / truth.norm().item() if error else 0.0


def random(
    *shape: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 1
) -> Tensor:
    """Of a normal distribution, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def is_good(actual: Tensor, plain: Tensor, truth: Tensor) -> bool:
    """Whether a product is within its bounds: float32 1e-5; 16 bits twice PyTorch's own error.

    plain: the same product by PyTorch in actual's dtype. The best any product can do is to round
    the truth, which matters where PyTorch's happens to be exact.
    """
    error = relative_error(actual, truth)
    if actual.dtype == torch.float32:
        return error < 1e-5
    rounding = relative_error(truth.to(actual.dtype), truth)
    return error <= 2 * max(relative_error(plain, truth), rounding)


def check_product(actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The dtype, shape and bounds of a product; arguments as `is_good` has them."""
    assert actual.dtype == plain.dtype
    assert actual.shape == truth.shape
    assert is_good(actual, plain, truth), relative_error(actual, truth)


def numpy_blocks(weight: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalized blocks [blocks, block_size], padded with zeros, and their scales, in float32."""
    padded = np.pad(weight.ravel(), (0, -weight.size % block_size)).reshape(-1, block_size)
    absmax = np.abs(padded).max(axis=1)
    divisor = np.where(absmax > 0, absmax, 1).astype(np.float32)[:, None]
    return padded / divisor, absmax


def numpy_quantize(
    weight: np.ndarray, codebook: Tensor, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and absmax of float32 values, by the format's definition."""
    normalized, absmax = numpy_blocks(weight, block_size)
    table = codebook.numpy()
    midpoints = (table[:-1].astype(np.float64) + table[1:]) / 2
    codes = np.searchsorted(midpoints.astype(np.float32), normalized, side="left")
    return codes.ravel()[: weight.size].astype(np.uint8), absmax


def adam_state(
    numel: int, block_size: int, device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """Codes and absmax of m, then of v, all zero; and the codebooks of m and v."""
    tables = codebooks.dynamic().to(device), codebooks.dynamic_unsigned().to(device)
    blocks = -(-numel // block_size)
    state: list[Tensor] = []
    for table in tables:
        zero = int((table == 0).nonzero()[0])
        state.append(torch.full((numel,), zero, dtype=torch.uint8, device=device))
        state.append(torch.zeros(blocks, device=device))
    return tuple(state), tables


def adam_moments(
    state: tuple[Tensor, ...], tables: tuple[Tensor, Tensor], block_size: int
) -> list[Tensor]:
    """m and v, decoded to float32."""
    return [
        ops.dequantize(codes, absmax, table, block_size, torch.float32)
        for codes, absmax, table in zip(state[::2], state[1::2], tables, strict=True)
    ]


def backend_ids() -> list[str]:
    """Every backend, and for `cpu` every instruction set of this machine: "cpu:avx512".

    Without a GPU, "cuda:emulated" stands for `cuda`. Left out are those that have some ops only and
    `triton` where it needs a process of its own: their tests are elsewhere.
    """
    ids = [name for name in backends.NAMES if is_complete(name) or backends.unavailable(name)]
    if not triton_is_interpreted() and not torch.cuda.is_available():
        ids.remove("triton")
    if backends.unavailable("cpu") is None:
        cpu = ids.index("cpu")
        ids[cpu : cpu + 1] = [f"cpu:{isa}" for isa in backends.load("cpu").instruction_sets()]
    if not torch.cuda.is_available():
        ids[ids.index("cuda")] = EMULATED
    return ids


def is_complete(name: str) -> bool:
    """Whether a backend has every op."""
    return all(hasattr(backends.load(name), op) for op in ops.SCHEMAS)


def triton_is_interpreted() -> bool:
    """Whether the triton backend takes CPU tensors."""
    interpreted: bool = backends.load("triton").interpreted()
    return interpreted


@contextlib.contextmanager
def forced(backend_id: str) -> Iterator[None]:
    """Runs every op in one backend, or skips the test with the reason why it cannot."""
    name, _, isa = backend_id.partition(":")
    with contextlib.ExitStack() as stack:
        if backend_id == EMULATED:
            stack.enter_context(emulator().force())
            isa = ""
        if reason := backends.unavailable(name):
            pytest.skip(f"{name}: {reason}")
        stack.enter_context(backends.use(name))
        if isa:
            stack.enter_context(backends.load(name).force_isa(isa))
        yield
