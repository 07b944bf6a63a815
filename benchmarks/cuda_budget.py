"""What the CUDA kernels can reach, from their machine code: no GPU is needed, nvcc is.

    python -m benchmarks.cuda_budget

For each GPU and number of rows of x: the codes for each clock and multiprocessor that the memory
can deliver, against what the kernel's loop lets through: instructions issued, integer and float32
arithmetic, turns of the path to shared memory and L1, and the tensor cores. Estimates of limits;
nothing here is measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import inf

from benchmarks.cuda_code import kernels
from benchmarks.gpu_code import Code
from benchmarks.triton_budget import GPUS, ISSUED, LANES, turns


@dataclass(frozen=True)
class Rates:
    """Of a multiprocessor in a clock: lanes of integer and float32 arithmetic, bytes of shared
    memory, multiply-adds of `mma.sync` in 16 bits (NVIDIA's white papers; shared memory of T4 and
    mma.sync on H100 as measured by others: Jia et al. 2019, Luo et al. 2024, about 62 % of wgmma).
    """

    integer: int
    floating: int
    shared: int
    tensor: int


RATES = {
    "T4": Rates(64, 64, 64, 512),
    "A100-80": Rates(64, 64, 128, 1024),
    "H100": Rates(64, 128, 128, 1270),
}
WGMMA = 2048
"""Multiply-adds in 16 bits of an H100's multiprocessor in a clock, where wgmma makes them."""
INTEGER = r"LOP3|SHF|IADD|VIADD|ISETP|SEL|LEA|PRMT|IMNMX|VIMNMX|PLOP3|FSEL|FSETP|MOV$|R2UR|I2F|F2FP"
FLOATING = r"FFMA|FADD|FMUL|IMAD|HFMA2|HADD2|HMUL2"


@dataclass(frozen=True)
class Kernel:
    """rows: the most rows of x that one run of the loop serves. weights: of a lane in the loop."""

    op: str
    name: str
    rows: int
    weights: int
    wgmma: bool = False


def kernel_for(op: str, gpu: str, rows: int) -> Kernel:
    """What csrc/cuda chooses for float16 and GPT-J's shapes."""
    narrow = "true" if gpu == "T4" else "false"
    weights = 32 if gpu == "T4" else 64
    if op == "linear_grad_input":
        tile = 2 if rows <= 16 else 8
        return Kernel(op, f"grad_tensor_kernel<f16, {tile}, {narrow}>", 8 * tile, weights)
    if rows <= (4 if gpu == "T4" else 2):
        tile = 4 if rows == 3 else rows
        return Kernel(op, f"linear_few_rows_kernel<f16, {tile}>", tile, 64)
    if gpu == "H100" and rows > 32:
        tile = 1 if rows <= 64 else 2
        return Kernel(op, f"linear_wgmma_kernel<f16, {tile}>", 64 * tile, weights, wgmma=True)
    tiles = (1, 4) if gpu == "T4" else (1, 2, 4, 8)
    tile = next((t for t in tiles if rows <= 8 * t), tiles[-1])
    return Kernel(op, f"linear_tensor_kernel<f16, {tile}, {narrow}>", 8 * tile, weights)


@dataclass(frozen=True)
class Budget:
    """Codes for each clock and multiprocessor: needed, and let through for all rows of x."""

    needed: float
    issue: float
    integer: float
    floating: float
    shared: float
    tensor: float

    @property
    def reach(self) -> float:
        """The part of the memory's bandwidth that the narrowest leaves."""
        narrowest = min(self.issue, self.integer, self.floating, self.shared, self.tensor)
        return min(1.0, narrowest / self.needed)


def code_of(kernel: Kernel, gpu: str) -> Code:
    """The kernel's machine code for the GPU's architecture."""
    arch = "sm_90a" if kernel.wgmma else GPUS[gpu].target.name
    return kernels(kernel.op, arch)[kernel.name]


def budget(kernel: Kernel, gpu: str, rows: int, block_size: int = 256) -> Budget:
    """The budget of a kernel on a GPU for so many rows of x."""
    code, rates = code_of(kernel, gpu), RATES[gpu]
    # Tiles of x above the first decode w again; its bytes come from the L2 cache then.
    again = -(-rows // kernel.rows)
    weights = kernel.weights / again
    served = min(rows, kernel.rows) if kernel.rows <= 4 else kernel.rows
    on_tensor_cores = kernel.rows > 4
    return Budget(
        GPUS[gpu].codes_needed(block_size),
        ISSUED * weights / len(code.loop),
        rates.integer * weights / code.count(INTEGER, code.loop),
        rates.floating * weights / code.count(FLOATING, code.loop),
        LANES * weights / sum(turns(op, copies=True) for op in code.loop) * rates.shared / 128,
        (WGMMA if kernel.wgmma else rates.tensor) / (served * again) if on_tensor_cores else inf,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--m", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    options = parser.parse_args(argv)
    columns = ("needed", "issue", "integer", "floating", "shared", "tensor", "reach")
    for op in ("linear", "linear_grad_input"):
        print(f"{op:34}{'M':>4}" + "".join(f"{name:>9}" for name in columns))
        for gpu in GPUS:
            for m in options.m:
                kernel = kernel_for(op, gpu, m)
                found = budget(kernel, gpu, m)
                numbers = "".join(f"{getattr(found, name):9.1f}" for name in columns[:-1])
                what = f"{gpu} {kernel.name.replace('_kernel', '')}"
                print(f"{what:40.40}{m:4}{numbers}{found.reach:9.2f}")


if __name__ == "__main__":
    main()
