"""The 256-entry tables that codes index: float32, sorted ascending, in [-1, 1], with a 0.

`CODEBOOKS` lists them by name; every entry is called as `CODEBOOKS[name](weight, block_size)`
and returns a new tensor on weight's device.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ENTRIES = 256

# Bins of the histogram that `fitted` asks for. A fit of 4M samples of Student-t(2) at block 4096,
# the hardest of those tried, decodes with 0.1 % more error (RMSE) on 2^15 bins than on 2^16, with
# 0.3 % more on 2^14 and 8 % more on 2^12. Of Gaussian weights 2^13 bins lose 0.02 %.
HISTOGRAM_BINS = 1 << 16

_Float64 = NDArray[np.float64]
_Int64 = NDArray[np.int64]

_ENDS = np.array([0, 1], np.float32)


def dynamic() -> Tensor:
    """Returns bitsandbytes' signed dynamic map: (256,) float32.

    Dettmers, "8-Bit Approximations for Parallelism in Deep Learning" (arXiv 1511.04561): one
    decade per exponent, each decade with twice as many levels as the one below it.
    """
    decades = _decades([1 << exponent for exponent in range(7)])
    return torch.from_numpy(np.sort(np.concatenate([decades, -decades, _ENDS])))


def dynamic_unsigned() -> Tensor:
    """Returns bitsandbytes' unsigned dynamic map, 0 to 1: (256,) float32."""
    decades = _decades([2 << exponent for exponent in range(7)])
    return torch.from_numpy(np.sort(np.concatenate([decades, _ENDS])))


def _decades(levels: list[int]) -> NDArray[np.float32]:
    """Midpoints of `levels[i]` equal steps from 0.1 to 1, scaled by 10^(i - 6), as one array."""
    tables = []
    for i, n in enumerate(levels):
        # bitsandbytes takes torch.linspace, whose last bit depends on the processor. This is what
        # it gives where multiply-adds are fused, as on every x86-64 with AVX2: start + k * step
        # with one rounding (the product is exact in float64), the upper half counted from the end.
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(n))
        k = np.arange(n + 1)
        edges = np.where(
            k < (n + 1) // 2, np.float64(np.float32(0.1)) + k * step, 1 - (n - k) * step
        ).astype(np.float32)
        tables.append((edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6)))
    return np.concatenate(tables)


def linear() -> Tensor:
    """Returns uniform int8, i / 127 with -1 doubled to fill the table: (256,) float32."""
    steps = np.arange(-128, 128).clip(min=-127).astype(np.float32)
    return torch.from_numpy(steps / np.float32(127))


def fitted(weight: Tensor, block_size: int) -> Tensor:
    """Returns the codebook with the least squared error of `weight` once decoded.

    weight: any shape, floating point. block_size: of the scales that it will have.

    Returns (256,) float32 on its device. See `fit`.
    """
    counts: Tensor = torch.ops.gptj_q8.histogram(weight, block_size, HISTOGRAM_BINS)
    return fit(counts)


def fit(counts: Tensor) -> Tensor:
    """Returns the least-squares codebook of a histogram over [-1, 1].

    counts: (bins,) int64, bin i holding the weight of [2i / bins - 1, 2(i + 1) / bins - 1).

    Returns (256,) float32 on its device.

    Least squares as Lloyd ("Least squares quantization in PCM", 1982) and Max ("Quantizing for
    minimum distortion", 1960) define it, over levels that bfloat16 holds exactly and float16
    holds as normal numbers, 0 among them. Only additions, multiplications, divisions and square
    roots, in a fixed order, decide: the same counts give the same codebook on every machine.
    """
    if counts.dtype != torch.int64:
        raise TypeError(f"fit: counts must be int64, got {counts.dtype}")
    if counts.ndim != 1 or counts.numel() == 0:
        raise ValueError(f"fit: counts must have shape (bins,), got {tuple(counts.shape)}")
    levels = _fit(counts.cpu().numpy(), ENTRIES)
    return torch.from_numpy(levels.astype(np.float32)).to(counts.device)


# Every value that a fitted level may take: 0 and the bfloat16 numbers of magnitude 2^-14 (the
# least normal float16) to 1.
_MAGNITUDES = (np.arange(0x3880, 0x3F81, dtype=np.uint32) << 16).view(np.float32)
_GRID: _Float64 = np.concatenate([-_MAGNITUDES[::-1], [0], _MAGNITUDES]).astype(np.float64)
_GRID_MIDPOINTS: _Float64 = (_GRID[:-1] + _GRID[1:]) / 2
_ZERO = len(_MAGNITUDES)


def _nearest(values: _Float64) -> _Int64:
    """Index into `_GRID` of the value nearest to each of `values`."""
    return np.asarray(np.searchsorted(_GRID_MIDPOINTS, values), np.int64)


class _Moments:
    """Running sums of a histogram, so that the error of any levels takes a few look-ups."""

    def __init__(self, counts: _Int64) -> None:
        self.bins = len(counts)
        self.mass, self.first = np.zeros((2, self.bins + 1))
        centre = (2 * np.arange(self.bins) + 1 - self.bins) / self.bins
        np.cumsum(counts, dtype=np.float64, out=self.mass[1:])
        np.cumsum(counts * centre, out=self.first[1:])
        self.energy = float(np.cumsum(counts * centre * centre)[-1])

    def boundary_error(self, low: _Float64, high: _Float64) -> _Float64:
        """What the boundary between neighbouring levels adds to the total error.

        The error of levels v, the sum of mass * (x - v)^2, is summed by parts into one term for
        each boundary and one for the end (`end_error`). As in encoding, a bin whose centre is at
        the midpoint or below it belongs to the lower level.
        """
        total = low + high
        cut = ((total / 2 + 1) * self.bins + 1).astype(np.int64) // 2
        return (low - high) * (total * self.mass[cut] - 2 * self.first[cut])

    def end_error(self, last: _Float64) -> _Float64:
        """What the last level adds to the total error, and what no level changes."""
        mass, first = self.mass[-1], self.first[-1]
        return np.asarray(self.energy + last * (last * mass - 2 * first))


def _fit(counts: _Int64, levels: int) -> _Float64:
    """`fit` for any number of levels: (levels,) float64."""
    occupied = np.flatnonzero(counts)
    if len(occupied) < levels:
        return _one_level_per_bin((2 * occupied + 1 - len(counts)) / len(counts), levels)

    moments = _Moments(counts)
    chosen = _nearest(_equal_error_levels(moments, levels))
    chosen[np.argmin(np.abs(_GRID[chosen]))] = _ZERO
    # Each round takes the best of all combinations of candidates; far-off candidates come first,
    # so that levels can cross over from where they are many to where they lack. Of 78 histograms
    # (4M Gaussian to Student-t(2) samples, small samples, spikes) brute force over the whole grid
    # had 0.002 % less squared error in the median; of the 10 large ones, at most 0.01 % less.
    error = np.float64(np.inf)
    for reach in (4, 1, 0):
        settled = False
        while not settled:
            chosen, least = _best_levels(moments, _candidates(chosen, reach))
            settled = bool(error - least <= 1e-3 * abs(least))
            error = least
    return _GRID[chosen]


def _one_level_per_bin(centres: _Float64, levels: int) -> _Float64:
    """Gives each of fewer than `levels` values its nearest level; spreads the spare evenly."""
    needed = np.union1d(_GRID[_nearest(centres)], [0])
    others = np.setdiff1d(_GRID[_nearest(np.linspace(-1, 1, levels))], needed)
    spare = levels - len(needed)
    return np.union1d(needed, others[np.arange(spare) * len(others) // max(spare, 1)])


def _equal_error_levels(moments: _Moments, levels: int) -> _Float64:
    """Cuts [-1, 1] into cells of about equal error, as the best are, and returns their means.

    The best cells are as wide as density^(-1/3) (Panter and Dite, 1951), so their errors, about
    mass * width^2, are equal. Each pass spreads the fourth root of every old cell's error evenly
    over the new cells. On a smooth density the cube root would arrive in one pass; the fourth root
    divides what is left by four per pass, and is two square roots, rounded alike everywhere.
    """
    edges = np.arange(levels + 1) * moments.bins // levels
    for _ in range(8):
        width = np.diff(edges)
        error = np.diff(moments.mass[edges]) * width * width
        share = np.append(0, np.cumsum(np.sqrt(np.sqrt(error))))
        target = share[-1] * (np.arange(1, levels) / levels)
        cell = np.searchsorted(share, target, side="right") - 1
        part = (target - share[cell]) / (share[cell + 1] - share[cell])
        edges[1:-1] = edges[cell] + (part * width[cell]).astype(np.int64)
    mass, first = np.diff(moments.mass[edges]), np.diff(moments.first[edges])
    middle = (edges[1:] + edges[:-1]) / moments.bins - 1
    return np.where(mass > 0, first / np.maximum(mass, 1), middle)


def _candidates(chosen: _Int64, reach: int) -> _Int64:
    """Seventeen places for each level, the present one in the middle: (levels, 17), as `chosen`.

    They go as far as the place of the `reach`-th level on either side in equal parts of a level,
    or, with `reach` 0, to the eight nearest values on the grid.
    """
    steps = np.arange(-8, 9)
    if reach == 0:
        return (chosen[:, None] + steps).clip(0, len(_GRID) - 1)
    last = len(chosen) - 1
    rank = (np.arange(last + 1)[:, None] + steps * reach / 8).clip(0, last)
    below = rank.astype(np.int64).clip(max=last - 1)
    value = _GRID[chosen]
    return _nearest(value[below] + (rank - below) * np.diff(value)[below])


def _best_levels(moments: _Moments, candidates: _Int64) -> tuple[_Int64, np.float64]:
    """Chooses one candidate per row so that the total error is least, and returns that too.

    candidates: (levels, width), indices into `_GRID`; returns (levels,), ascending, with `_ZERO`.
    Dynamic programming as in Bruce, "Optimum quantization" (1965): the shortest path from row to
    row, where a step is as long as its boundary's error, or shut if it descends or skips zero.
    """
    value = _GRID[candidates]
    low, high = value[:-1, :, None], value[1:, None, :]
    length = moments.boundary_error(low, high)
    length[(low > high) | ((low < 0) & (high > 0))] = np.inf

    column = np.arange(candidates.shape[1])
    least = np.where(value[0] > 0, np.inf, 0)
    origin = np.empty(candidates.shape, np.int64)
    for row, step in enumerate(length, start=1):
        through = least[:, None] + step
        origin[row] = through.argmin(0)
        least = through[origin[row], column]
    least = np.where(value[-1] < 0, np.inf, least + moments.end_error(value[-1]))

    path = np.empty(len(candidates), np.int64)
    path[-1] = least.argmin()
    for row in range(len(candidates) - 1, 0, -1):
        path[row - 1] = origin[row, path[row]]
    return candidates[np.arange(len(candidates)), path], least.min()


Codebook = Callable[[Tensor, int], Tensor]


def _fixed(table: Callable[[], Tensor]) -> Codebook:
    return lambda weight, block_size: table().to(weight.device)


CODEBOOKS: dict[str, Codebook] = {
    "dynamic": _fixed(dynamic),
    "dynamic_unsigned": _fixed(dynamic_unsigned),
    "linear": _fixed(linear),
    "fitted": fitted,
}


# Without negative levels, dynamic_unsigned is of no use to weights.
FOR_WEIGHTS = tuple(sorted(set(CODEBOOKS) - {"dynamic_unsigned"}))


def check_name(who: str, name: object) -> None:
    """ValueError unless `name` is that of a codebook for weights."""
    if name not in FOR_WEIGHTS:
        raise ValueError(f"{who}: codebook must be one of {', '.join(FOR_WEIGHTS)}; got {name!r}")


def check_codebook(codebook: Tensor, who: str) -> None:
    """TypeError or ValueError, in the name of the op `who`, unless `codebook` can encode.

    Repeated levels are allowed. Reads the values, so on a GPU it waits for them.
    """
    check_levels(codebook, who)
    if 0 not in codebook.tolist():
        raise ValueError(f"{who}: codebook must contain 0")


def check_levels(codebook: Tensor, who: str) -> None:
    """TypeError or ValueError, as `check_codebook`, unless `codebook` can decode: no 0 is needed.

    Old checkpoints may hold a table without one, such as 256 even steps from -1 to 1.
    """
    if codebook.dtype != torch.float32:
        raise TypeError(f"{who}: codebook must be float32, got {codebook.dtype}")
    if codebook.shape != (ENTRIES,):
        raise ValueError(f"{who}: codebook must have shape (256,), got {tuple(codebook.shape)}")
    values: list[float] = codebook.tolist()
    for i, value in enumerate(values):
        if not -1 <= value <= 1:
            raise ValueError(f"{who}: codebook must lie in [-1, 1], but entry {i} is {value:.9g}")
    for i, (value, following) in enumerate(pairwise(values)):
        if value > following:
            raise ValueError(
                f"{who}: codebook must be sorted ascending, "
                f"but entry {i} ({value:.9g}) exceeds entry {i + 1} ({following:.9g})"
            )
