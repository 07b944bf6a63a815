"""Tiles that `gptj-q8 tune` found to be the fastest on a GPU: a small file for each GPU's name."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import triton

from gptj_q8.backends.triton.configs import Tiles

VERSION = 1
"""Of the file. Raise it when a kernel changes so much that old tiles mean nothing."""


def tuning_key(dtype: torch.dtype, M: int, N: int, K: int) -> str:
    """What a product's tiles are stored under: M rounded up to a power of two."""
    return f"linear {str(dtype).removeprefix('torch.')} {triton.next_power_of_2(M)} {N}x{K}"


def tuned_path(device: torch.device) -> Path:
    """The file of a GPU, in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^a-z0-9]+", "-", _gpu_name(device).lower()).strip("-")
    return Path(cache) / "gptj_q8" / f"tiles-{name}.json"


@functools.cache
def tuned_tiles(device: torch.device) -> Mapping[str, Tiles]:
    """The stored tiles by key; none, and one line said, where the file is stale or broken."""
    path = tuned_path(device)
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        for name, ours in _origin(device).items():
            if stored[name] != ours:
                raise ValueError(f"it is of {name} {stored[name]}, this is {ours}")
        return {key: _checked(Tiles(**tiles)) for key, tiles in stored["tiles"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"gptj_q8 ignores {path} ({error!r}); run `gptj-q8 tune` to make it anew",
            stacklevel=2,
        )
        return {}


def store_tuned(device: torch.device, tiles: Mapping[str, Tiles]) -> Path:
    """Writes the tiles and uses them from now on. Returns the file."""
    path = tuned_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {key: dataclasses.asdict(each) for key, each in tiles.items()}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**_origin(device), "tiles": content}, indent=1) + "\n")
    partial.replace(path)
    tuned_tiles.cache_clear()
    return path


def _origin(device: torch.device) -> dict[str, object]:
    return {"version": VERSION, "gpu": _gpu_name(device), "triton": triton.__version__}


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _checked(tiles: Tiles) -> Tiles:
    """ValueError where Triton could not compile the tiles."""
    for name, number in dataclasses.asdict(tiles).items():
        power = isinstance(number, int) and 1 <= number <= 4096 and not number & (number - 1)
        free = {"num_stages": range(1, 9), "registers": range(256)}.get(name, ())
        if not power and number not in free:
            raise ValueError(f"{name} must be a power of two up to 4096, got {number!r}")
    return tiles
