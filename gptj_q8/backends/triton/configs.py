"""Tile sizes: a table for each op, by architecture family and the number of rows M.

Every entry is an estimate, not yet measured on a GPU. It was chosen from the disassembly
(instructions for each weight, registers, shared memory: `python -m benchmarks.triton_budget`) and
from the number of programs that GPT-J's shapes leave. `gptj-q8 tune` measures on the GPU at hand.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Elementwise:
    """tile: elements one program takes, at least a block."""

    tile: int
    num_warps: int


@dataclass(frozen=True)
class Tiles:
    """One program's share of a matrix product: m rows of x, n rows and k columns of w a step.

    copies: of the codebook in shared memory, 1 or BANKS. registers: the most that a thread may
    take, on NVIDIA; 0 leaves it to the compiler.
    """

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int = 1
    copies: int = 1
    registers: int = 0


Table = tuple[Tiles, ...]
"""By growing m. The first entry whose m holds all of M serves, the last everything above."""

ELEMENTWISE = Elementwise(tile=4096, num_warps=8)
ADAM = Elementwise(tile=1024, num_warps=4)

BANKS = 32
"""Of shared memory. With a copy of the codebook for each, threads of a warp need not meet."""

FEW = 4
"""Rows of x up to which a tile is one of the kernel for a few rows."""

# One row of w at a time and no tensor cores: as long as M multiply-adds for each weight, beside
# about six instructions to decode it, cost less than what the product on tensor cores adds. For
# one row, a tile that leaves registers for two programs: one loads while the other multiplies.
GEMV_16: Table = (
    Tiles(1, 8, 2048, 8, copies=BANKS, registers=128),
    Tiles(2, 8, 4096, 16, copies=BANKS),
)
GEMV_32: Table = (*GEMV_16, Tiles(FEW, 4, 2048, 8, copies=BANKS))
# On Hopper twice as many warps need no more registers, and share the work of storing the table.
GEMV_16_HOPPER: Table = (Tiles(1, 8, 4096, 16, copies=BANKS), *GEMV_16[1:])


def few_rows(dtype: torch.dtype, family: str) -> Table:
    """The tiles of the kernel for a few rows; what has no tensor cores for it serves more rows."""
    table = GEMV_16_HOPPER if family == "sm90" else GEMV_16
    if dtype == torch.float32 or family == "sm75":
        table = GEMV_32
    if family in ("cdna", "rdna"):
        return tuple(replace(tile, registers=0) for tile in table)
    return table


# A step of 128 to 256 columns, since each stores the codebook anew in shared memory; what fits in
# shared memory beside the stages (227 KB on sm_90 and sm_100, 163 on sm_80, 99 on sm_86 and
# sm_120, 64 on AMD) and leaves two programs to a multiprocessor where M is small.
LINEAR_16: dict[str, Table] = {
    # Triton multiplies without T4's tensor cores; the dispatch sends nothing here.
    "sm75": (Tiles(32, 32, 32, 4, 2),),
    "sm80": (
        Tiles(16, 128, 128, 4, 3),
        Tiles(32, 128, 128, 4, 3),
        Tiles(64, 128, 128, 8, 3),
        Tiles(128, 128, 64, 8, 3),
    ),
    "sm86": (
        Tiles(16, 64, 128, 4, 3),
        Tiles(32, 64, 128, 4, 3),
        Tiles(64, 128, 128, 8, 2),
        Tiles(128, 128, 64, 8, 3),
    ),
    "sm90": (
        Tiles(16, 64, 256, 4, 3),
        Tiles(32, 64, 256, 4, 3),
        Tiles(64, 128, 128, 8, 3),
        Tiles(128, 128, 128, 8, 3),
    ),
    "sm100": (
        Tiles(16, 128, 128, 4, 3),
        Tiles(32, 128, 128, 4, 3),
        Tiles(64, 128, 128, 4, 3),
        Tiles(128, 128, 128, 8, 2),
    ),
    "cdna": (
        Tiles(16, 64, 128, 4, 2),
        Tiles(64, 64, 128, 4, 2),
        Tiles(128, 128, 64, 8, 2),
    ),
    "rdna": (
        Tiles(16, 64, 128, 4, 2),
        Tiles(64, 64, 64, 4, 2),
    ),
}
GRAD_16: dict[str, Table] = {
    "sm75": (Tiles(32, 32, 32, 4, 2),),
    "sm80": (Tiles(16, 64, 128, 4, 4), Tiles(64, 64, 128, 4, 3), Tiles(128, 64, 128, 8, 3)),
    "sm86": (Tiles(16, 64, 128, 4, 4), Tiles(64, 64, 128, 4, 3), Tiles(128, 64, 128, 8, 3)),
    "sm90": (Tiles(64, 64, 128, 4, 3), Tiles(128, 64, 128, 8, 3)),
    "sm100": (Tiles(64, 64, 128, 4, 3),),
    "cdna": (Tiles(16, 64, 128, 4, 2), Tiles(64, 64, 128, 4, 2), Tiles(128, 64, 128, 8, 2)),
    "rdna": (Tiles(16, 64, 64, 4, 2), Tiles(64, 32, 64, 4, 2)),
}
# float32 x: no tensor core keeps its promise of 1e-5, so plain multiply-adds.
DOT_32: Table = (Tiles(16, 32, 32, 4, 3), Tiles(32, 32, 32, 4, 3))


def pick(table: Table, rows: int) -> Tiles:
    """The entry for a product with `rows` rows of x."""
    return next((entry for entry in table if rows <= entry.m), table[-1])


def family(backend: str, arch: int | str) -> str:
    """The key of the tables for Triton's target, such as ("cuda", 90) or ("hip", "gfx942")."""
    if backend == "hip":
        return "cdna" if str(arch).startswith("gfx9") else "rdna"
    number = int(arch)
    if number >= 120 or number in (86, 87, 89):
        return "sm86"
    return f"sm{max(floor for floor in (75, 80, 90, 100) if number >= floor)}"


@functools.cache
def family_of(device: torch.device) -> str:
    """The key of the tables for a device; the interpreter on the CPU takes the smallest tiles."""
    if device.type != "cuda":
        return "rdna"
    if torch.version.hip:
        return family("hip", torch.cuda.get_device_properties(device).gcnArchName)
    major, minor = torch.cuda.get_device_capability(device)
    return family("cuda", 10 * major + minor)


@functools.cache
def programs_wanted(device: torch.device) -> int:
    """How many programs fill the GPU twice."""
    if device.type != "cuda":
        return 8  # the interpreter: some shapes are split, some are not
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
