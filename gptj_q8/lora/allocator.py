"""Keeps glibc's malloc from holding on to the large tensors that a training step has freed."""

from __future__ import annotations

import ctypes
import os
import sys

# mallopt's names for them, in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
LARGE = 2**20
"""Bytes. Each MiB of a fresh block costs about 0.2 ms of page faults."""


def return_large_blocks() -> bool:
    """From now on a block of 1 MiB or more goes back to the system as soon as it is freed.

    By default glibc raises that size to 32 MiB while a program runs, and what lies between is then
    cut from its heap, which cannot shrink past the first block in use: between the activations
    kept for the backward pass it holds about 1 GB of freed ones (GPT-J-6B, 2048 tokens).

    Holds for the process. Returns whether it was set: not on other systems, and not where the user
    set it, through MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES.
    """
    by_user = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if by_user or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    # Setting one of the two ends the raising of both, so the other needs its value as well.
    return bool(mallopt(_MMAP_THRESHOLD, LARGE) and mallopt(_TRIM_THRESHOLD, 2 * LARGE))
