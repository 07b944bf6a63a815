"""Cold buffers: how large the last cache is and how many copies of a buffer outgrow it."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

# A cache that evicts the longest unused line holds nothing of a buffer after 1x its size has
# passed through; real caches choose less strictly, hence four times.
TIMES_CACHE = 4
SHARE_OF_MEMORY = 0.25  # of what is free, for each system, but for what all leave free:
SPARE_SHARE = 0.25  # of all memory, for what they compute; a peer decodes whole matrices
# Buffers so small that even this many fit in the cache are not weights worth rotating.
MOST_COPIES = 512
UNKNOWN_CACHE = 64 * 2**20


def copies_for(nbytes: int, device: torch.device) -> int:
    """How many copies of a buffer of `nbytes` to rotate over so that each is cold when used.

    Their total is larger than four times the last cache, within a quarter of the free memory that
    need not stay free. (Caches of servers have hundreds of megabytes.)
    """
    enough = TIMES_CACHE * last_level_cache(device) // nbytes + 1
    spare = SPARE_SHARE * total_memory(device)
    room = int(SHARE_OF_MEMORY * (free_memory(device) - spare) / nbytes)
    return max(1, min(enough, room, MOST_COPIES))


def last_level_cache(device: torch.device) -> int:
    """Bytes of the last cache before memory: the largest of a CPU core's, or the GPU's L2."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return max(_cpu_caches(), default=UNKNOWN_CACHE)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def total_memory(device: torch.device) -> int:
    """Bytes there are, used or not."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().total


def _cpu_caches() -> Iterator[int]:
    """Sizes in bytes as Linux lists them, else as the C library knows them."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KMG])", size.read_text().strip()):
            yield int(found[1]) * units[found[2]]
    for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        if name in os.sysconf_names and os.sysconf(name) > 0:
            yield os.sysconf(name)
