"""What the Triton kernels can reach, from their machine code: no GPU is needed.

    python -m benchmarks.triton_budget

For each GPU and shape of GPT-J: the codes for each clock and multiprocessor that the memory can
deliver, against what the kernel's loop lets through: instructions issued, and turns of the path to
shared memory and L1. Estimates of limits; nothing here is measured.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

import torch

from benchmarks.gpu_code import TARGETS, Code, Target, product_code, product_launch
from benchmarks.shapes import GPTJ
from gptj_q8.backends.triton.linear_gemv import linear_gemv_kernel
from gptj_q8.backends.triton.splits import Launch

LANES = 32
ISSUED = 4 * LANES
"""Thread instructions that a multiprocessor issues in a clock."""

# Turns of shared memory that a warp's lookup of random codes takes, by bytes of an entry:
# simulated for Gaussian codes; one with a copy for every bank.
LOOKUP_TURNS = {2: 2.25, 4: 2.8}


@dataclass(frozen=True)
class Gpu:
    """clock in Hz (sustained), bandwidth in bytes for each second (datasheet)."""

    target: Target
    processors: int
    clock: float
    bandwidth: float
    threads: int
    registers: int = 65536

    def codes_needed(self, block_size: int) -> float:
        """Codes for each clock and multiprocessor when memory is read at full bandwidth."""
        bytes_each = 1 + 4 / block_size
        return self.bandwidth / bytes_each / (self.processors * self.clock)


GPUS = {
    "T4": Gpu(TARGETS["sm_75"], 40, 1.59e9, 320e9, 1024),
    "A100-80": Gpu(TARGETS["sm_80"], 108, 1.41e9, 2039e9, 2048),
    "H100": Gpu(TARGETS["sm_90"], 132, 1.755e9, 3352e9, 2048),
}


@dataclass(frozen=True)
class Budget:
    """Codes for each clock and multiprocessor: needed, and let through. resident: programs."""

    needed: float
    issue: float
    shared: float
    resident: int

    @property
    def reach(self) -> float:
        """The part of the memory's bandwidth that the narrower of the two leaves."""
        return min(1.0, min(self.issue, self.shared) / self.needed)


def budget(gpu: Gpu, launch: Launch, dtype: torch.dtype, block_size: int = 256) -> Budget:
    """The budget of a product's kernel on a GPU."""
    code = product_code(launch, gpu.target, dtype)
    weights = launch.constants["TILE_N"] * launch.constants["TILE_K"]
    warps = code.threads // LANES
    copies = launch.kernel is linear_gemv_kernel
    taken = warps * sum(turns(op, copies) for op in code.loop)
    return Budget(
        gpu.codes_needed(block_size),
        ISSUED / code.per_weight(weights),
        weights / taken,
        _resident(gpu, code),
    )


def turns(op: str, copies: bool) -> float:
    """Turns of the path to shared memory and L1 that an instruction of a warp takes."""
    if re.match(r"LDS(\.U)?(\.U16)?$", op):
        return 1 if copies else LOOKUP_TURNS[2 if "U16" in op else 4]
    if n := re.match(r"HGMMA\.64x(\d+)x16", op):
        return int(n[1]) * 16 * 2 / 128 / 4  # x's tile is read from there, once for four warps
    if not re.match("LDS|STS|LDSM|LDG|STG|LDGSTS", op):
        return 0
    if width := re.search(r"\.(64|128)", op):
        return int(width[1]) / 32
    return 4 if "M88.4" in op else 2 if "M88.2" in op else 1


def _resident(gpu: Gpu, code: Code) -> int:
    """Programs that a multiprocessor holds at a time, by its registers, threads and memory."""
    registers = 8 * -(-code.registers // 8) * code.threads
    each = code.shared + 1024
    return min(gpu.registers // registers, gpu.threads // code.threads, gpu.target.shared // each)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--m", type=int, nargs="+", default=[1, 2], help="rows of x")
    options = parser.parse_args(argv)
    columns = ("needed", "issue", "shared", "reach", "waves")
    print(f"{'GPU':10}{'M':>4} {'shape':10}" + "".join(f"{name:>9}" for name in columns))
    for name, gpu in GPUS.items():
        for m in options.m:
            for shape in GPTJ:
                launch = product_launch(
                    "linear", gpu.target, torch.float16, m, shape.n, shape.k, 256
                )
                found = budget(gpu, launch, torch.float16)
                waves = launch.grid[0] * launch.grid[2] / gpu.processors / found.resident
                numbers = (found.needed, found.issue, found.shared, found.reach, waves)
                row = "".join(f"{number:9.2f}" for number in numbers)
                print(f"{name:10}{m:4} {shape.name:10}{row}")


if __name__ == "__main__":
    main()
