"""Fitted codebooks against brute force, the published reach and every shape of histogram."""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gptj_q8 import codebooks
from gptj_q8.codebooks import CODEBOOKS, check_codebook, fit

Array = NDArray[np.float64]
Counts = NDArray[np.int64]


def bfloat16_grid() -> Array:
    """0 and every bfloat16 number of magnitude 2^-14 to 1, ascending, built by the definition."""
    octaves = [np.arange(128, 256) / 128 * 2.0**exponent for exponent in range(-14, 0)]
    positive = np.append(np.concatenate(octaves), 1)
    return np.concatenate([-positive[::-1], [0], positive])


def centres(bins: int) -> Array:
    return (np.arange(bins) + 0.5) * 2 / bins - 1


def squared_error(counts: Counts, levels: Array) -> float:
    """Error of the histogram's bin centres, a centre at a midpoint or below going down."""
    x = centres(len(counts))
    decoded = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    return float((counts * (x - decoded) ** 2).sum())


def fit_numpy(counts: Counts) -> Array:
    return fit(torch.from_numpy(counts)).double().numpy()


def histogram(weight: NDArray[np.float32], block_size: int, bins: int) -> Counts:
    """What the op `histogram` counts, for a whole number of blocks."""
    blocks = weight.reshape(-1, block_size)
    absmax = np.abs(blocks).max(axis=1)
    share = absmax / absmax.max()
    units = np.rint(share * share * np.float32(2**30))
    ratio = blocks / np.where(absmax > 0, absmax, 1)[:, None]
    index = ((ratio + np.float32(1)) * np.float32(bins / 2)).astype(np.int64).clip(max=bins - 1)
    counted = np.bincount(index.ravel(), np.repeat(units, block_size), minlength=bins)
    return counted.astype(np.int64)


def relative_rmse(weight: NDArray[np.float32], block_size: int, levels: Array) -> float:
    """Error in percent of `weight` encoded with `levels` and decoded."""
    blocks = weight.reshape(-1, block_size)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    table = levels.astype(np.float32)
    midpoints = (table[:-1] + table[1:]) * np.float32(0.5)
    error = table[np.searchsorted(midpoints, blocks / absmax)] * absmax - blocks
    return 100 * float(np.linalg.norm(error.ravel()) / np.linalg.norm(blocks.ravel()))


def assert_valid(levels: torch.Tensor) -> None:
    """A codebook, of values that are exact in bfloat16 and zero or normal in float16."""
    check_codebook(levels, "fit")
    assert torch.equal(levels.bfloat16().float(), levels)
    assert torch.equal(levels.half().float(), levels)
    assert bool(((levels == 0) | (levels.abs() >= torch.finfo(torch.float16).tiny)).all())


# Fitting: how good


SAMPLES = 1 << 22


def gaussian() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(SAMPLES, dtype=np.float32)


def student_t5() -> NDArray[np.float32]:
    """Student-t with five degrees of freedom: Gaussian over the root of a mean of 5 squares."""
    rng = np.random.default_rng(1)
    chi2 = 2 * rng.standard_gamma(2.5, SAMPLES, dtype=np.float32)
    normal = rng.standard_normal(SAMPLES, dtype=np.float32)
    return np.asarray(normal / np.sqrt(chi2 / 5), np.float32)


@pytest.mark.parametrize(
    ("sample", "block_size", "reach"),
    [
        (gaussian, 4096, 0.630),
        (gaussian, 256, 0.580),
        (student_t5, 4096, 0.855),
        (student_t5, 256, 0.708),
    ],
)
def test_reach(sample: Callable[[], NDArray[np.float32]], block_size: int, reach: float) -> None:
    """Relative RMSE in percent. The design asks for 0.635, 0.585, 0.865 and 0.712.

    Run with `-s` it prints the README's table.
    """
    weight = sample()
    counts = histogram(weight, block_size, codebooks.HISTOGRAM_BINS)
    tables = {
        "fitted": fit_numpy(counts),
        "linear": codebooks.linear().numpy(),
        "dynamic": codebooks.dynamic().numpy(),
    }
    errors = {name: relative_rmse(weight, block_size, table) for name, table in tables.items()}
    for name, error in errors.items():
        print(f"{name}, block {block_size}, {sample.__name__}: {error:.4f} %")
    assert errors["fitted"] <= reach
    assert errors["fitted"] < min(errors["linear"], errors["dynamic"])


def optimal_error(counts: Counts, levels: int) -> float:
    """The least error of any `levels` grid values with 0 among them, by trying every pair."""
    grid, x = bfloat16_grid(), centres(len(counts))
    sums = [np.append(0, np.cumsum(counts * x**power)) for power in range(3)]
    below = np.searchsorted(x, grid, side="right")

    def error(level: Array, start: NDArray[np.int64], stop: NDArray[np.int64]) -> Array:
        mass, first, second = (each[stop] - each[start] for each in sums)
        return np.asarray(second - 2 * level * first + level**2 * mass)

    low, high = grid[:, None], grid[None, :]
    middle = np.searchsorted(x, (low + high) / 2, side="right")
    between = error(low, below[:, None], middle) + error(high, middle, below[None, :])
    between[(low > high) | ((low < 0) & (high > 0))] = np.inf
    ends = np.zeros_like(below), np.full_like(below, len(x))
    least = np.where(grid > 0, np.inf, error(grid, ends[0], below))
    for _ in range(levels - 1):
        least = (least[:, None] + between).min(axis=0)
    return float((least + np.where(grid < 0, np.inf, error(grid, below, ends[1]))).min())


def bell(bins: int) -> Counts:
    """A heavy-tailed, lopsided bell of exact integers."""
    k = np.arange(bins) - bins * 9 // 16
    return np.asarray(10**12 // (bins**2 // 256 + k * k) + 1)


def spikes(bins: int) -> Counts:
    rng = np.random.default_rng(2)
    return np.where(rng.random(bins) < 0.1, rng.integers(1, 1000, bins), 0)


@pytest.mark.parametrize(("shape", "excess"), [(bell, 1e-9), (spikes, 0.03)])
@pytest.mark.parametrize("levels", [4, 17])
def test_fit_is_near_the_optimum_over_the_whole_grid(
    shape: Callable[[int], Counts], excess: float, levels: int
) -> None:
    """Some spikes per level and nothing between them is the hardest case for a local search."""
    counts = shape(1024)
    fitted = squared_error(counts, codebooks._fit(counts, levels))
    assert fitted <= optimal_error(counts, levels) * (1 + excess)


# Fitting: always valid, always the same


@st.composite
def histograms(draw: st.DrawFn) -> Counts:
    """From all empty to every bin occupied, even or spanning many orders of magnitude, anywhere."""
    bins = 1 << draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = np.exp(rng.normal(0, draw(st.sampled_from([0.1, 2, 6])), bins)) * 1000
    empty = rng.random(bins) < draw(st.sampled_from([0, 0.5, 0.9, 1]))
    first, last = sorted((draw(st.integers(0, bins)), draw(st.integers(0, bins))))
    counts = np.where(empty, 0, size).astype(np.int64)
    counts[:first] = 0
    counts[last:] = 0
    counts[[0, -1]] += draw(st.sampled_from([0, 1, 10**9]))
    return counts


@settings(max_examples=60, deadline=None)
@given(histograms())
def test_fit_is_valid_and_no_worse_than_linear(counts: Counts) -> None:
    """`linear` with its levels rounded to the grid, for the grid is not the fit's to choose."""
    levels = fit(torch.from_numpy(counts))
    assert_valid(levels)
    rounded = codebooks.linear().bfloat16().double().numpy()
    error = squared_error(counts, levels.double().numpy())
    assert error <= squared_error(counts, rounded) * (1 + 1e-9)


@pytest.mark.parametrize("bins", [1, 2, 128, 300, 65536])
def test_nothing_to_fit_gives_an_even_table(bins: int) -> None:
    levels = fit(torch.zeros(bins, dtype=torch.int64))
    assert_valid(levels)
    assert levels.diff().max() <= 0.02


@pytest.mark.parametrize(
    "values",
    [[1.0], [-1.0], [-1.0, 0.0, 1.0], [-1.0, -0.5, 0.25, 0.75], list(np.arange(-127, 128) / 128)],
    ids=["one", "minus one", "ternary", "four", "255 levels"],
)
def test_few_distinct_values_decode_exactly(values: list[float]) -> None:
    """Values on the grid, +-1 at the very edge of the outermost bins, come back unchanged."""
    weight = np.tile(np.array([*values, 1.0], np.float32), (64, 1))
    levels = fit_numpy(histogram(weight, weight.shape[1], 65536))
    assert relative_rmse(weight, weight.shape[1], levels) == 0


def test_an_outlier_in_every_block_does_not_starve_the_rest() -> None:
    weight = np.random.default_rng(3).standard_normal((1024, 256), dtype=np.float32)
    weight[:, 0] = 1000
    rest = weight.copy()
    rest[:, 0] = 0
    fitted = relative_rmse(weight, 256, fit_numpy(histogram(weight, 256, 65536)))
    scale = float(np.linalg.norm(weight) / np.linalg.norm(rest))
    assert fitted * scale < 2  # percent of the rest; uniform int8 would round all of it to 0


def pinned_histogram() -> torch.Tensor:
    return torch.from_numpy(bell(65536))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_fit_is_the_same_everywhere() -> None:
    for count in (1, 2):
        torch.set_num_threads(count)
        levels = fit(pinned_histogram())
        digest = hashlib.sha256(levels.numpy().tobytes()).hexdigest()
        assert digest == "e180bce37e0d20a677092410e21ba91fa954e78e511f9724e58e908def7a1624"


def test_only_ratios_of_counts_matter() -> None:
    counts = pinned_histogram()
    assert torch.equal(fit(counts * 16), fit(counts))


def test_mirrored_counts_are_fitted_as_well() -> None:
    counts = bell(65536)
    mirrored = counts[::-1].copy()
    there = squared_error(counts, fit_numpy(counts))
    back = squared_error(mirrored, fit_numpy(mirrored))
    assert back == pytest.approx(there, rel=1e-3)


def test_fit_checks_its_input() -> None:
    with pytest.raises(TypeError, match=r"fit: counts must be int64, got torch\.float32"):
        fit(torch.zeros(8))
    for shape in [(0,), (2, 2)]:
        with pytest.raises(ValueError, match=r"fit: counts must have shape \(bins,\), got"):
            fit(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("block_size", [64, 4096])
def test_fitted_fits_the_histogram_of_the_weight(block_size: int) -> None:
    pytest.importorskip("gptj_q8.ops")
    weight = np.random.default_rng(4).standard_normal((256, 256), dtype=np.float32)
    counts = histogram(weight, block_size, codebooks.HISTOGRAM_BINS)
    expected = fit(torch.from_numpy(counts))
    assert torch.equal(CODEBOOKS["fitted"](torch.from_numpy(weight), block_size), expected)
