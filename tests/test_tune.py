"""The tiles that `tune` stores, and the files that it must not believe. In the interpreter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_quantized, triton_is_interpreted

from gptj_q8 import backends, ops
from gptj_q8.tune import tune

if not triton_is_interpreted():
    pytest.skip(
        "runs interpreted, in a process of its own, which test_triton.py starts",
        allow_module_level=True,
    )

from gptj_q8.backends.triton import linear_with, tuned
from gptj_q8.backends.triton.configs import Tiles

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.tuned_tiles.cache_clear()
    yield
    tuned.tuned_tiles.cache_clear()


def test_the_fastest_tiles_are_stored_and_used() -> None:
    said: list[str] = []
    chosen: list[float] = []

    def measure(call: Callable[[int], Any], weights: int) -> float:
        """Later candidates are faster, but one fails."""
        if len(chosen) == 1:
            chosen.append(0)
            raise RuntimeError("out of shared memory")
        call(weights - 1)
        chosen.append(1 / (1 + len(chosen)))
        return chosen[-1]

    path = tune(CPU, sides=[(32, 256)], rows=[8], say=said.append, measure=measure)
    assert path == tuned.tuned_path(CPU)
    assert "passes over" in said[0]
    assert len(said) == 2
    (key,) = tuned.tuned_tiles(CPU)
    assert key == tuned.tuning_key(torch.float16, 5, 32, 256), "rows count by powers of two"

    w = random_quantized(32, 256, 256)
    x = torch.ones(8, 256, dtype=torch.float16)
    with backends.use("triton"):
        y = ops.linear(x, *w.parts, None, 256)
    torch.testing.assert_close(y.double(), x.double() @ w.truth.T, rtol=1e-2, atol=1e-2)


def test_a_budget_of_seconds_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    timed: list[int] = []

    def measure(call: Callable[[int], Any], weights: int) -> float:
        now[0] += 2
        timed.append(weights)
        return 1.0

    said: list[str] = []
    tune(CPU, [(32, 256), (64, 256)], [1], say=said.append, measure=measure, seconds=3)
    assert len(timed) == 2, "the second candidate began after 2 of 3 seconds, no third one after 4"
    assert set(tuned.tuned_tiles(CPU)) == {tuned.tuning_key(torch.float16, 1, 32, 256)}
    assert said[-1] == "tune: stops before 64x256, 1 rows: 3 s are over"


@pytest.mark.parametrize("block_size", [32, 256])
@pytest.mark.parametrize("m", [1, 4, 20])
def test_any_tiles_give_the_product(m: int, block_size: int) -> None:
    """Of the other kernel, with many copies of the codebook, or unable to serve."""
    w = random_quantized(70, 512, block_size)
    x = torch.randn(m, 512, generator=torch.Generator().manual_seed(0))
    for tiles in (
        Tiles(16, 64, 128, 4, 2, copies=32),
        Tiles(32, 32, 256, 4, 2),
        Tiles(1, 8, 512, 2, copies=32),
        Tiles(4, 4, 256, 1),
    ):
        y = linear_with(tiles, x, *w.parts, None, block_size)
        torch.testing.assert_close(y.double(), x.double() @ w.truth.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"version": 1', '"version": 0'),
        lambda text: text.replace('"triton": "', '"triton": "0.'),
        lambda text: text.replace('"k": 128', '"k": 129'),
        lambda text: json.dumps([text]),
        lambda text: text.replace('"n"', '"nn"'),
    ],
)
def test_a_stale_or_broken_file_is_ignored_with_one_line(damage: Callable[[str], str]) -> None:
    path = tuned.store_tuned(CPU, {"linear float16 8 32x256": Tiles(16, 64, 128, 4, 2)})
    assert len(tuned.tuned_tiles(CPU)) == 1
    path.write_text(damage(path.read_text()))
    tuned.tuned_tiles.cache_clear()
    with pytest.warns(UserWarning, match=r"gptj_q8 ignores .*run `gptj-q8 tune`") as warned:
        assert tuned.tuned_tiles(CPU) == {}
    assert len(warned) == 1
    assert tuned.tuned_tiles(CPU) == {}, "and does not say it again"
