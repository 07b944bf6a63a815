"""Launches of the products: sums split over several programs, and added up in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptj_q8.backends.triton.configs import Tiles


@dataclass(frozen=True)
class Launch:
    """A product's kernel and all it is launched with, except its tensors and M, N, K."""

    kernel: Any
    grid: tuple[int, int, int]
    constants: dict[str, int]
    options: dict[str, int]

    @property
    def splits(self) -> int:
        return self.grid[2]

    def run(
        self,
        args: Sequence[Tensor | None],
        y: Tensor,
        sides: tuple[int, int, int],
        bias: Tensor | None,
    ) -> None:
        """Runs the kernel on args, what it writes to, M, N and K.

        That is y, or partial sums which a second kernel adds up, and bias with them.
        """
        out = y
        if self.splits > 1:
            rows = y.numel() // y.shape[-1]
            out = y.new_empty(self.splits, rows, y.shape[-1], dtype=torch.float32)
        self.kernel[self.grid](*args, out, *sides, **self.constants, **self.options)
        if self.splits > 1:
            add_up(out, bias, y)


def launch(
    kernel: Any,
    tile: Tiles,
    programs: tuple[int, int],
    summed: int,
    step: int,
    wanted: int,
    **constants: int,
) -> Launch:
    """Splits a sum over `summed`, `step` at a time, so that about `wanted` programs run.

    Without splitting there would be programs[0] * programs[1] of them; a stretch has at least
    four steps.
    """
    splits = max(1, min(summed // (4 * step), 16, wanted // (programs[0] * programs[1])))
    sizes = {"SPLITS": splits, "TILE_M": tile.m, "TILE_N": tile.n, "TILE_K": tile.k}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if tile.registers:
        options["maxnreg"] = tile.registers
    return Launch(kernel, (*programs, splits), {**sizes, **constants}, options)


@triton.jit(do_not_specialize=["M"])
def sum_splits_kernel(partial, bias, y, M, N, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """y[i] = sum over s of partial[s, i] + bias[i % N], rounded once to y's dtype.

    partial: float32 [SPLITS, M * N]; y: [M * N]; bias: [N] or None. A program owns TILE elements.
    Always in the order of s, without atomics, so that the same call gives the same bits.
    """
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    numel = M.to(tl.int64) * N
    total = tl.zeros([TILE], tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(partial + s * numel + i, mask=i < numel, other=0)
    if bias is not None:
        total += tl.load(bias + i % N, mask=i < numel, other=0).to(tl.float32)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=i < numel)


def add_up(partial: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y = the sum over the first dimension of partial [splits, M, N], and bias."""
    splits, M, N = partial.shape
    tile = 1024
    sum_splits_kernel[(triton.cdiv(M * N, tile),)](partial, bias, y, M, N, splits, tile)
