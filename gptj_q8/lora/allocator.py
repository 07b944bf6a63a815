"""Keeps glibc's malloc from holding on to the large tensors that a training step has freed."""

from __future__ import annotations

import ctypes
import os
import sys

# mallopt's names for them, in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
LARGE = 8 * 2**20
"""Bytes. An activation of 2048 tokens of GPT-J has 16 MiB; what is smaller stays fast to reuse."""


def return_large_blocks() -> bool:
    """From now on a block of 8 MiB or more goes back to the system as soon as it is freed.

    By default glibc raises that size to 32 MiB while a program runs, and what lies between is then
    cut from its heap, which cannot shrink past the first block in use: between the activations
    kept for the backward pass it holds 0.6 GB or more of freed ones (GPT-J-6B, 2048 tokens).

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
